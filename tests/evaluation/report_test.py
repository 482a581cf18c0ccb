"""The summary's schema, the table and the picture, with and without a gold reward."""

import copy
import json

import numpy as np
import pytest

from sera_jax.evaluation import report

ARMS = ("daa", "sera", "random")


def make_summary(*, with_gold=True, arms=ARMS, rounds=3):
    """A summary as a run writes it; figures made up."""

    def facts(round_, arm):
        held = {
            "heldout_accuracy": 0.5 + 0.08 * round_,
            "heldout_margin": 1.5 * round_,
            "length_baseline_accuracy": 0.64,
        }
        out = held | {"heldout_accuracy_shorter": 0.4 + 0.05 * round_, "response_tokens_mean": 7.0 + round_}
        return out | ({"gold_mean": 0.4 + 0.05 * round_ + 0.02 * (arm == "sera")} if with_gold else {})

    def row(arm, round_):
        reviewed = round_ > 1 and arm != "daa"
        out = {
            "arm": arm,
            "round": round_,
            "kept": 56 if reviewed else 80,
            "added": 24 if reviewed else 0,
            "updates": 5,
        }
        out |= {"flipped_fraction_kept": 0.08 if reviewed else 0.2, **facts(round_, arm)}
        if reviewed:
            out |= {"margin_mean": 1.0 * round_, "margin_p10": -2.0, "margin_p90": 5.0}
            out |= {"agreement": {"agree": 0.6, "disagree": 0.25, "tie": 0.15}} if with_gold else {}
        return out

    final = {arm: facts(rounds if arm != "sft" else 0, arm) for arm in ("sft", *arms)}
    if with_gold:
        final = {arm: f | {"gold_ci95": [f["gold_mean"] - 0.05, f["gold_mean"] + 0.05]} for arm, f in final.items()}
        final = {arm: f | ({} if arm == "sft" else {"win_rate_vs_sft": 0.6}) for arm, f in final.items()}
    return {
        "arms": final,
        "rounds": [row(arm, round_) for arm in arms for round_ in range(1, rounds + 1)],
        "wall_seconds": {"sft": 3.0},
        "peak_memory_bytes": 10**9,
        "params_sha256": {"sft": "00"},
        "config": {"loss": {"name": "dpo"}, "data": {"label_noise": 0.2}},
        "seed": 0,
        "versions": {"jax": "0"},
    }


def test_what_is_written_is_read_back_whole(tmp_path):
    summary = make_summary()
    report.write_summary(tmp_path / "run" / "summary.json", summary)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_numpy_numbers_become_plain_and_what_does_not_apply_is_left_out(tmp_path):
    summary = make_summary(arms=("sera",))
    summary["arms"]["sera"]["win_rate_vs_sft"] = float("nan")
    summary["rounds"][0] |= {"margin_mean": None, "kept": np.int64(80), "gold_mean": np.float32(0.5)}
    report.write_summary(tmp_path / "summary.json", summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert "win_rate_vs_sft" not in found["arms"]["sera"]
    assert "margin_mean" not in found["rounds"][0]
    assert (found["rounds"][0]["kept"], found["rounds"][0]["gold_mean"]) == (80, 0.5)


@pytest.mark.parametrize("key", report.KEYS)
def test_a_missing_key_is_named(key):
    summary = make_summary()
    del summary[key]
    with pytest.raises(ValueError, match=key):
        report.check_summary(summary)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s["arms"]["sera"].update(heldout_accuracy=67.0), "heldout_accuracy"),
        (lambda s: s["arms"]["sera"].update(gold_mean=float("nan")), "gold_mean"),
        (lambda s: s["rounds"][0].pop("arm"), "rounds"),
        (lambda s: s["rounds"][1].update(round=0), "round"),
        (lambda s: s.update(rounds={}), "rounds"),
    ],
)
def test_a_summary_that_readers_could_not_use_is_refused(change, named):
    summary = copy.deepcopy(make_summary())
    change(summary)
    with pytest.raises(ValueError, match=named):
        report.check_summary(summary)


def test_the_table_has_a_line_per_arm_and_round_and_is_aligned():
    summary = make_summary()
    arms, rounds = report.table(summary).split("\n\n")
    assert [line.split()[0] for line in arms.splitlines()[2:]] == ["sft", *ARMS]
    assert len(rounds.splitlines()) == 2 + len(summary["rounds"])
    for block in (arms, rounds):
        assert len({len(line) for line in block.splitlines()}) == 1
        assert len(block.splitlines()[0]) <= 120
    assert "60 / 25 / 15" in rounds


def test_the_table_of_real_data_speaks_of_no_gold():
    text = report.table(make_summary(with_gold=False, arms=("sera",)))
    assert "gold" not in text
    assert "agree" not in text
    assert "74.0 %" in text


def test_the_legend_explains_columns_that_the_table_has_and_no_other():
    for summary in (make_summary(), make_summary(with_gold=False, arms=("sera",))):
        shown, legend = report.table(summary), report.legend(summary)
        for line in legend.splitlines():
            assert line.split("  ")[-2].strip() in shown
            assert len(line) <= 110
    assert "gold" in report.legend(make_summary())
    assert "gold" not in legend


@pytest.mark.parametrize(
    "kind",
    [
        dict(),
        dict(with_gold=False),
        dict(arms=("daa",), rounds=1),
        dict(with_gold=False, arms=("sera",)),
        dict(arms=("sera", "an_arm_of_ones_own")),
    ],
)
def test_a_picture_is_drawn_of_whatever_the_summary_has(tmp_path, kind):
    path = tmp_path / "report.png"
    report.report_png(make_summary(**kind), path)
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    assert min(width, height) > 400
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]


def test_no_rounds_no_picture(tmp_path):
    report.report_png(make_summary(arms=()), tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()
