"""The summary's schema, the tables of both methods and SeRA's picture, with and without a gold reward."""

import copy
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from sera_jax import guards
from sera_jax.evaluation import picture
from tests.evaluation import shown as report
from tests.evaluation import srppo_summary

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


def test_the_gold_by_temperature_has_a_table_of_its_own():
    summary = make_summary(arms=("daa",))
    assert "gold at" not in report.table(summary) + report.legend(summary)
    for k, arm in enumerate(("sft", "daa")):
        summary["arms"][arm]["gold_by_temperature"] = {"0": 0.5 + k, "0.5": 0.25 + k}
    report.check_summary(summary)
    _, gold, _ = report.table(summary).split("\n\n")
    head, _, *lines = [re.split("  +", line.strip()) for line in gold.splitlines()]
    assert head == ["arm", "gold at 0", "gold at 0.5"]
    assert lines == [["sft", "0.500", "0.250"], ["daa", "1.500", "1.250"]]
    assert "gold at  of answers at this temperature" in report.legend(summary)


def test_the_gold_of_held_out_tasks_stands_beside_that_of_the_others():
    summary = make_summary(arms=("daa",))
    summary["arms"]["daa"] |= {"gold_in_domain": 0.7, "gold_out_of_domain": 0.4}
    summary["arms"]["daa"]["gold_out_of_domain_by_temperature"] = {"0": 0.3}
    _, gold, _ = report.table(summary).split("\n\n")
    head, _, line = [re.split("  +", line.strip()) for line in gold.splitlines()]
    assert dict(zip(head, line)) == {
        "arm": "daa", "in domain": "0.700", "out of domain": "0.400", "out of domain at 0": "0.300"
    }  # fmt: skip
    assert "out of domain  gold on the tasks of world.heldout_tasks" in report.legend(summary)


def test_what_guard_rails_refuse_has_a_column_for_each_reason_that_occurs():
    summary = make_summary(arms=("sera",))
    assert not set(guards.REASONS) & set((report.table(summary) + report.legend(summary)).split())
    summary["rounds"][1] |= {"bootstrap/refused_unsupported": 12.0, "bootstrap/refused_outside_band": 3.0}
    head, _, *lines = report.table(summary).split("\n\n")[1].splitlines()
    assert set(guards.REASONS) & set(head.split()) == {"unsupported", "outside_band"}
    assert lines[1].split()[:7] == ["sera", "2", "56", "8.0", "%", "24", "12"] and " 3 " in lines[1]
    assert "unsupported  answers below" in report.legend(summary)


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


def test_a_picture_calls_labels_flipped_where_they_were_and_never_clean():
    summary = make_summary()
    assert "20 % of labels flipped" in picture._heading(summary)
    real = summary | {"config": summary["config"] | {"data": {"label_noise": 0.0}}}
    assert "labels as given" in picture._heading(real)


def panels_of(summary):
    """title -> axis, of SeRA's picture."""
    drawn = {}
    for draw in picture._panels(picture._Report(summary, {})):
        axis = Figure().add_subplot()
        draw(axis)
        drawn[axis.get_title(loc="left") or axis.get_title()] = axis
    return drawn


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_interval_stands_at_the_round_that_is_the_result(kept):
    summary = make_summary(arms=("sera",))
    if kept < 3:
        summary["rounds"][kept - 1]["kept_as_result"] = True
    panels = panels_of(summary)
    (line,) = panels["Gold reward of answers"].collections
    assert line.get_segments()[0][:, 0].tolist() == [kept, kept]
    assert line.get_segments()[0][:, 1].tolist() == summary["arms"]["sera"]["gold_ci95"]


def test_the_picture_has_the_warnings_that_need_no_gold_reward():
    summary, warnings = make_summary(arms=("sera",), with_gold=False), {}
    for i, name in enumerate(("reward_ref_corr", "reward_length_corr", "repeated_ngrams")):
        warnings[name] = (i + 1) / 10
        summary["rounds"][1] |= {f"bootstrap/{name}": warnings[name]}
    without = panels_of(make_summary(arms=("sera",), with_gold=False))
    panels = panels_of(summary)
    new = [panels[title] for title in panels if title not in without]
    assert [float(axis.lines[0].get_ydata()[0]) for axis in new] == list(warnings.values())


@pytest.mark.parametrize("name", ["reward_ref_corr", "reward_length_corr", "repeated_ngrams"])
def test_a_warning_out_of_its_range_is_refused(name):
    summary = make_summary(arms=("sera",))
    summary["rounds"][1][f"bootstrap/{name}"] = 1.5
    with pytest.raises(ValueError, match=f"bootstrap/{name}'. is 1.5; it is a"):
        report.check_summary(summary)


def test_no_rounds_no_picture(tmp_path):
    report.report_png(make_summary(arms=()), tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()


# Made by hand from the facts of `make_summary`.
SERA_TABLE = """\
 arm           gold [95 %]  wins vs sft  accuracy  by length  on shorter  margin  tokens
----  --------------------  -----------  --------  ---------  ----------  ------  ------
 sft  0.400 [0.350, 0.450]            -    50.0 %     64.0 %      40.0 %    0.00     7.0
sera  0.520 [0.470, 0.570]       60.0 %    66.0 %     64.0 %      50.0 %    3.00     9.0

 arm  round  kept  flipped  added  agree/not/tie  margin   gold  accuracy  on shorter  tokens
----  -----  ----  -------  -----  -------------  ------  -----  --------  ----------  ------
sera      1    80   20.0 %      0              -       -  0.470    58.0 %      45.0 %     8.0
sera      2    56    8.0 %     24   60 / 25 / 15    2.00  0.520    66.0 %      50.0 %     9.0"""


@pytest.mark.parametrize("named", [{}, {"method": "sera"}])
def test_the_table_of_sera_has_its_columns_in_their_order(named):
    summary = make_summary(arms=("sera",), rounds=2)
    summary["config"] |= named
    assert report.table(summary) == SERA_TABLE


# Heading, fact and how it is written, of what Self-Rewarding PPO's table of the arms shows.
SHOWN = [
    ("gold [95 %]", "gold_mean", "{:.3f}"),
    ("wins vs sft", "win_rate_vs_sft", "{:.1%}"),
    ("right", "answer_accuracy", "{:.1%}"),
    ("well-formed", "wellformed_fraction", "{:.1%}"),
    ("coherent [95 %]", "coherent_reward_mean", "{:.2f}"),
    ("corr.", "coherent_reward_length_corr", "{:.2f}"),
    ("KL", "kl_to_sft", "{:.2f}"),
    ("NLL", "heldout_nll", "{:.3f}"),
    ("tokens", "response_tokens_mean", "{:.1f}"),
    ("ended", "eos_fraction", "{:.1%}"),
]


def cells_of(block):
    """heading -> arm -> cell, of a table whose columns stand two spaces apart at least, as its rule says."""
    head, rule, *lines = block.splitlines()
    ends = [i for i in range(len(rule)) if rule[i] == "-" and rule[i + 1 : i + 2] != "-"]
    starts = [0, *(end + 1 for end in ends)]
    columns = [slice(a, b + 1) for a, b in zip(starts, ends)]
    return {head[c].strip(): {line[columns[0]].strip(): line[c].strip() for line in lines} for c in columns}


def test_every_arm_of_srppo_is_shown_with_all_of_its_facts():
    summary = srppo_summary.make_summary(arms=srppo_summary.EVERY, with_pattern=True)
    cells = cells_of(report.table(summary).split("\n\n")[0])
    assert list(cells) == ["arm", *(heading for heading, _, _ in SHOWN)]
    for heading, name, form in SHOWN:
        assert list(cells[heading]) == ["sft", *srppo_summary.EVERY]
        for arm, cell in cells[heading].items():
            facts = summary["arms"][arm]
            said = form.format(facts[name]).replace("%", " %") if name in facts else "-"
            assert cell.split(" [")[0] == said
            if "[" in heading:
                low, high = facts[name.replace("mean", "ci95")]
                assert cell.endswith(f"[{form.format(low)}, {form.format(high)}]")


@pytest.mark.parametrize("heading, name", [(heading, name) for heading, name, _ in SHOWN])
def test_a_fact_that_no_arm_has_has_no_column_and_the_others_stay(heading, name):
    summary = srppo_summary.make_summary(with_pattern=True)
    before = cells_of(report.table(summary).split("\n\n")[0])
    for facts in summary["arms"].values():
        facts.pop(name, None)
    after = cells_of(report.table(summary).split("\n\n")[0])
    assert after == {head: column for head, column in before.items() if head != heading}


def test_the_evaluations_of_srppo_have_a_line_each_and_no_unknown_arm():
    summary = srppo_summary.make_summary()
    head, _, *lines = report.table(summary).split("\n\n")[1].splitlines()
    assert head.split() == ["arm", "iteration", "gold", "coherent", "corr.", "KL", "NLL", "tokens", "ended"]
    said = [line.split()[:3] for line in lines]
    assert said == [[f["arm"], str(f["iteration"]), f"{f['gold_mean']:.3f}"] for f in summary["rounds"]]


@pytest.mark.parametrize("kind", [dict(), dict(arms=srppo_summary.EVERY), dict(with_gold=False, with_pattern=True)])
def test_the_tables_of_srppo_fit_a_terminal_and_their_legend_explains_what_they_show(kind):
    summary = srppo_summary.make_summary(**kind)
    shown, legend = report.table(summary), report.legend(summary)
    for block in (*shown.split("\n\n"), legend):
        assert max(map(len, block.splitlines())) <= 120
    heads = [line.split("  ")[-2].strip() for line in legend.splitlines()]
    assert all(head in shown for head in heads)
    assert ("gold" in heads) == ("gold" in shown)
    assert {"coherent", "corr.", "KL", "NLL", "ended"} <= set(heads)


@pytest.mark.parametrize(
    "kind, outcomes",
    [
        (dict(), "gold"),
        (dict(with_pattern=True), "gold or right"),
        (dict(with_gold=False), "NLL"),
    ],
)
def test_the_legend_says_that_ppo_optimises_the_coherent_reward_and_where_a_gain_must_show(kind, outcomes):
    line = next(line for line in report.legend(srppo_summary.make_summary(**kind)).splitlines() if "coherent  " in line)
    assert line.endswith(f"PPO optimises it: a gain must show in {outcomes}")


def test_the_table_of_what_was_written_is_the_table_of_what_was_at_hand(tmp_path):
    summary = srppo_summary.make_summary()
    summary["arms"]["srppo"]["coherent_reward_length_corr"] = float("nan")
    summary["rounds"][0]["heldout_nll"] = None
    summary["iterations"][0]["critic/vf_explained_var"] = float("-inf")
    summary["iterations"][1]["objective/kl"] = np.float32(0.25)
    report.write_summary(tmp_path / "summary.json", summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert "critic/vf_explained_var" not in found["iterations"][0]
    assert found["iterations"][1]["objective/kl"] == 0.25
    assert report.table(found) == report.table(summary)
    assert report.legend(found) == report.legend(summary)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.pop("iterations"), "iterations"),
        (lambda s: s.pop("prompts"), "prompts"),
        (lambda s: s.update(iterations={}), "iterations"),
        (lambda s: s["iterations"][0].pop("arm"), r"iterations\[0\].*arm"),
        (lambda s: s["iterations"][1].update(iteration=0), r"iterations\[1\].*iteration"),
        (lambda s: s["rounds"][1].pop("iteration"), r"rounds\[1\].*iteration"),
        (lambda s: s["arms"]["srppo"].update(eos_fraction=98.0), "eos_fraction.*share"),
        (lambda s: s["arms"]["srppo"].update(wellformed_fraction=-0.1), "wellformed_fraction.*share"),
        (lambda s: s["rounds"][0].update(answer_accuracy=31.0), "answer_accuracy.*share"),
        (lambda s: s["iterations"][0].update({"completions/clipped_ratio": 1.2}), "clipped_ratio.*share"),
        (lambda s: s["arms"]["sft"].update(coherent_reward_length_corr=-1.2), "length_corr.*correlation"),
        (lambda s: s["iterations"][0].update({"coherent_reward/length_corr": 2.0}), "length_corr.*correlation"),
        (lambda s: s["iterations"][2].update({"objective/kl": float("nan")}), "objective/kl"),
    ],
)
def test_a_summary_of_srppo_that_readers_could_not_use_is_refused(change, named):
    summary = srppo_summary.make_summary()
    report.check_summary(summary)
    change(summary)
    with pytest.raises(ValueError, match=named):
        report.check_summary(summary)
