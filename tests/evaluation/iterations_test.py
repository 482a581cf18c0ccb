"""The picture of Self-Rewarding PPO: what is drawn is what the summary says, named and readable."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from sera_jax.evaluation import iterations
from sera_jax.experiment.method import looks
from sera_jax.experiment.methods.srppo import ARMS
from tests.evaluation import shown as report
from tests.evaluation.srppo_summary import EVERY, make_summary
from tests.tolerances import TOLERANCES


def make_equal_arms():
    summary = make_summary(arms=EVERY)
    for facts in [*summary["arms"].values(), *summary["rounds"]]:
        facts["gold_mean"] = 0.5
    return summary


KINDS = {
    "usual": make_summary(),
    "every arm": make_summary(arms=EVERY),
    "every arm, on real data": make_summary(arms=EVERY, with_gold=False, with_pattern=True),
    "one iteration": make_summary(arms=("srppo",), iterations=1, every=1),
    "equal arms": make_equal_arms(),
}
TITLES = {
    "Gold reward of answers to held-out prompts",
    "NLL of held-out demonstrations",
    "Coherent reward, what PPO optimises",
    "KL to the SFT model",
    "Length of answers",
    "Gold reward of rollouts",
    "Answers cut at the length limit",
    "Variance the critic explains",
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a summary, but for the pixels; the panels by their title, outcome first."""

    def draw(summary):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.touch()))
        report.report_png(summary, tmp_path / "report.png")
        return {axis.get_title(loc="left"): axis for axis in figures[0].axes}

    return draw


@pytest.fixture(scope="module", params=KINDS)
def page(request, tmp_path_factory):
    """(summary, what is in the folder, content of the picture, panels in their places)."""
    figures, save = [], Figure.savefig
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
        report.report_png(KINDS[request.param], folder / "report.png")
    names = [path.name for path in folder.iterdir()]
    return KINDS[request.param], names, (folder / "report.png").read_bytes(), figures[0].axes


def labels_of(axis):
    return {text.get_text(): text.get_window_extent() for text in axis.texts}


def drawn_lines(axis):
    """The points of every line, as (x, y)."""
    return [np.stack(line.get_data(orig=True)).T.tolist() for line in axis.lines]


def test_the_picture_is_whole_and_alone(page):
    _, names, content, _ = page
    assert names == ["report.png"]
    assert content.startswith(b"\x89PNG")
    assert content[-8:-4] == b"IEND"


def test_a_picture_that_cannot_be_finished_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_bytes(b"of an earlier run")

    def break_off(self, place, **_):
        place.write_bytes(b"half a pic")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        report.report_png(make_summary(), path)
    assert path.read_bytes() == b"of an earlier run"


def test_arms_without_iterations_and_evaluations_give_no_picture(tmp_path):
    report.report_png(make_summary(arms=("sft_longer", "best_of_n")), tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


def test_evaluations_alone_and_iterations_alone_are_drawn(drawn):
    panels = drawn(make_summary() | {"iterations": []})
    assert list(panels) == ["Gold reward of answers to held-out prompts", "NLL of held-out demonstrations"]
    alone = make_summary() | {"rounds": []}
    alone["arms"] = {arm: {} for arm in alone["arms"]}
    assert set(drawn(alone)) == TITLES - set(panels)


def test_the_outcome_comes_first_and_a_panel_without_data_is_left_out(drawn):
    panels = drawn(make_summary())
    assert next(iter(panels)) == "Gold reward of answers to held-out prompts"
    assert set(panels) == TITLES
    real = drawn(make_summary(with_gold=False, with_pattern=True))
    assert next(iter(real)) == "Right answers to held-out prompts"
    assert "Well-formed answers" in real
    assert not any("old reward" in title for title in real)


def test_a_trained_arm_goes_from_the_sft_model_through_its_evaluations(drawn):
    summary = make_summary(arms=EVERY)
    sft = summary["arms"]["sft"]["gold_mean"]
    lines = drawn_lines(drawn(summary)["Gold reward of answers to held-out prompts"])
    for arm in ("srppo", "random_reward", "reinforce"):
        rows = [facts for facts in summary["rounds"] if facts["arm"] == arm]
        course = [[0, sft], *([facts["iteration"], facts["gold_mean"]] for facts in rows[:-1])]
        assert [*course, [12, summary["arms"][arm]["gold_mean"]]] in lines
    for arm in ("sft", "sft_longer", "sft_equal_compute", "best_of_n"):
        gold = summary["arms"][arm]["gold_mean"]
        assert [[0, gold], [12, gold]] in lines


@pytest.mark.parametrize(
    "title, name, scale",
    [
        ("Coherent reward, what PPO optimises", "coherent_reward/mean", 1),
        ("KL to the SFT model", "objective/kl", 1),
        ("Length of answers", "completions/mean_length", 1),
        ("Gold reward of rollouts", "rollout/gold_mean", 1),
        ("Answers cut at the length limit", "completions/clipped_ratio", 100),
        ("Variance the critic explains", "critic/vf_explained_var", 1),
    ],
)
def test_nothing_is_smoothed(drawn, title, name, scale):
    summary = make_summary()
    lines = drawn_lines(drawn(summary)[title])
    for arm in ("srppo", "random_reward"):
        assert [[f["iteration"], scale * f[name]] for f in summary["iterations"] if f["arm"] == arm] in lines


def test_a_value_that_is_not_finite_is_a_gap_and_not_a_zero(drawn):
    summary = make_summary(arms=("srppo",))
    summary["iterations"][3]["objective/kl"] = float("nan")
    del summary["iterations"][5]["objective/kl"]
    summary["iterations"][7]["objective/kl"] = None
    line = drawn_lines(drawn(summary)["KL to the SFT model"])[0]
    assert [i for i, (_, y) in enumerate(line) if math.isnan(y)] == [3, 5, 7]


def test_every_arm_is_named_once_and_no_name_lies_on_another_or_outside(page):
    summary, _, _, panels = page
    assert len(panels[0].texts) == len(summary["arms"])
    for axis in panels:
        boxes = labels_of(axis).values()
        assert len(boxes) == len(axis.texts)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        inside = axis.get_window_extent().padded(2)  # pixels: a letter may be drawn wider than its font says
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_no_panel_lies_on_another(page):
    boxes = [axis.get_tightbbox() for axis in page[-1]]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_every_interval_is_shown_whole(drawn):
    summary = make_summary(arms=EVERY)
    axis = drawn(summary)["Gold reward of answers to held-out prompts"]
    shown = [[y for _, y in segment] for lines in axis.collections for segment in lines.get_segments()]
    assert sorted(shown) == sorted(facts["gold_ci95"] for facts in summary["arms"].values())
    low, high = axis.get_ylim()
    assert all(low <= a < b <= high for a, b in shown)


def test_an_arm_keeps_its_colour_whatever_others_there_are_and_arms_differ_in_marker_too():
    alone = iterations._Report(make_summary(arms=("reinforce",)), looks(ARMS))
    all_ = iterations._Report(make_summary(arms=EVERY), looks(ARMS))
    assert alone.looks["reinforce"] == all_.looks["reinforce"]
    trained = [all_.looks[arm] for arm in all_.trained]
    assert len({look.colour for look in trained}) == len({look.marker for look in trained}) == len(trained)


def test_heights_that_are_far_enough_apart_stay():
    wanted = [0.9, 0.1, 0.5]
    assert iterations.spaced(wanted, gap=0.3) == pytest.approx(wanted, rel=TOLERANCES["closed_form"]["rtol"])


def test_two_equal_heights_part_by_half_the_gap_each():
    assert iterations.spaced([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55], rel=TOLERANCES["closed_form"]["rtol"])


@pytest.mark.parametrize("seed", range(8))
def test_spaced_heights_keep_their_order_the_gap_and_the_panel(seed):
    rng = np.random.default_rng(seed)
    wanted = np.round(rng.uniform(0, 1, size=rng.integers(1, 9)), 1)
    got = np.array(iterations.spaced(wanted.tolist(), gap=0.1))
    order = np.argsort(wanted, kind="stable")
    slack = 1e-12  # float64 sums of at most nine terms below 1
    assert (np.diff(got[order]) >= 0.1 - slack).all()
    assert got.min() >= -slack and got.max() <= 1 + slack
