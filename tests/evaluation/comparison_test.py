"""Means, intervals and paired differences over seeds: closed forms, and what is said of them."""

import contextlib
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from sera_jax.evaluation.comparison import compare, estimate
from sera_jax.evaluation.comparison_report import draw, markdown, table
from sera_jax.evaluation.look import OTHERS, ArmLook, looks_of

# t(0.975, n - 1) of printed tables, by n.
QUANTILES = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 31: 2.042, 121: 1.980}


def row(setting="", arm="daa", seed=0, **metrics):
    varied = dict(part.split("=") for part in setting.split(",") if "=" in part)
    return {"setting": setting, "arm": arm, "seed": seed, "varied": varied, "metrics": metrics}


def entry(comparison, arm, setting=""):
    (found,) = [e for e in comparison.entries if (e.setting, e.arm) == (setting, arm)]
    return found


@pytest.mark.parametrize("n", QUANTILES)
def test_half_the_interval_is_students_quantile_times_the_standard_error(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = estimate(values)
    assert found.mean == pytest.approx(values.sum() / n)
    error = math.sqrt(((values - values.sum() / n) ** 2).sum() / (n - 1) / n)
    assert found.half / error == pytest.approx(QUANTILES[n], abs=6e-4)
    assert found.count == n


def test_two_seeds_have_the_interval_of_the_cauchy_distribution():
    """t with one degree of freedom: its quantile at 0.975 is tan(0.475 pi); the standard error of 0 and 2 is 1."""
    assert estimate([0.0, 2.0]).half == pytest.approx(math.tan(0.475 * math.pi))


def test_one_seed_has_no_interval_and_it_is_said():
    found = compare([row(gold=0.5)], ["gold"])
    assert math.isnan(estimate([0.5]).half)
    assert "0.500 (1)" in table(found)
    assert "one seed, so there is no interval" in table(found)
    assert found.as_dict()["entries"][0]["metrics"]["gold"] == {"mean": 0.5, "half": None, "n": 1}
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_all_arms_share_of_a_seed_is_not_in_a_paired_difference():
    """Seeds far apart, arms a constant apart: the difference is that constant with an interval of 0."""
    rows = [row(arm=arm, seed=s, gold=10.0 * s + plus) for s in range(4) for arm, plus in (("daa", 0), ("sera", 0.25))]
    found = entry(compare(rows, ["gold"], baseline="daa"), "sera")
    assert found.differences["gold"].mean == pytest.approx(0.25)
    assert found.differences["gold"].half == pytest.approx(0, abs=1e-12)
    assert found.means["gold"].half > 10


def test_differences_are_of_the_seeds_that_both_have_whatever_the_order():
    values = {"daa": {0: 1.0, 1: 5.0, 2: 2.0}, "sera": {3: 100.0, 2: 2.5, 0: 2.5}}
    rows = [row(arm=arm, seed=s, gold=v) for arm, by_seed in values.items() for s, v in by_seed.items()]
    for order in (rows, rows[::-1]):
        found = entry(compare(order, ["gold"], baseline="daa"), "sera")
        assert found.differences["gold"] == estimate([1.5, 0.5])
        assert found.means["gold"].count == 3


@pytest.mark.parametrize(
    "baseline, other",
    [
        ("daa", "b,noise=1/daa"),
        ("a", "a,noise=1/sera"),
        ("a/daa", "a,noise=1/daa"),
        ("a,noise=2/daa", "a,noise=2/daa"),
    ],
)
def test_a_baseline_is_an_arm_or_a_part_of_a_setting_or_one_entry(baseline, other):
    rows = [row(f"{name},noise={n}", arm, gold=1.0) for name in "ab" for n in (1, 2) for arm in ("daa", "sera")]
    found = entry(compare(rows, ["gold"], baseline=baseline), "sera", "b,noise=1")
    assert found.against == tuple(other.rsplit("/", 1))


def test_an_entry_that_is_named_in_full_is_the_baseline_though_others_have_its_setting_as_a_part():
    rows = [row(setting, "daa", gold=1.0) for setting in ("a", "a,noise=1", "b,noise=1")]
    assert entry(compare(rows, ["gold"], baseline="a/daa"), "daa", "b,noise=1").against == ("a", "daa")


def test_entries_are_ranked_by_the_first_metric_within_their_panel():
    rows = [
        row(f"noise={n}", arm, gold=g + n / 2, length=-g) for n in (0, 1) for arm, g in (("a", 1), ("b", 3), ("c", 2))
    ]

    def order(**options):
        return [(e.panel, e.arm) for e in compare(rows, ["gold", "length"], **options).entries]

    assert [arm for _, arm in order()] == list("bbccaa")
    assert order(panels="noise") == [(f"noise={n}", arm) for n in (0, 1) for arm in "bca"]
    assert order(panels="noise", smaller_is_better=True) == [(f"noise={n}", arm) for n in (0, 1) for arm in "acb"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"metrics": ["goold"]}, "no run has the metric 'goold'; they have gold"),
        ({"arms": ["seera"]}, "no run has the arm 'seera'; they have daa, sera"),
        ({"baseline": "dpo"}, "baseline='dpo' is nothing here; choose of daa, sera"),
        ({"panels": "noise"}, "panels='noise' is no field of the setting ''; .* every setting has: none"),
        ({"curve": "noise"}, "curve='noise' is no field of the setting ''; .* every setting has: none"),
        ({"metrics": []}, r"metrics=\(\); name one at least"),
        ({"metrics": ["gold:goold"], "baseline": "daa"}, "no run has the metric 'goold'; they have gold"),
        ({"metrics": ["goold/*"]}, r"no run has the metric 'goold/\*'; they have gold"),
        ({"metrics": ["gold:gold"]}, "metric 'gold:gold' is a difference to a baseline; name one"),
    ],
)
def test_what_no_row_has_is_refused_with_what_they_have(options, words):
    rows = [row(arm="daa", gold=1.0), row(arm="sera", gold=2.0)]
    with pytest.raises(ValueError, match=words):
        compare(rows, **{"metrics": ["gold"], **options})


def test_the_best_part_of_a_fact_is_chosen_once_for_all_seeds():
    """The baseline's is that at 1 (its mean is 3, at 0 it is 2), though at 0 the first seed has more."""
    at = {"daa": {"0": [4.0, 0.0], "1": [3.0, 3.0]}, "sera": {"0": [5.0, 7.0], "1": [0.0, 0.0]}}
    rows = [row(arm=arm, seed=s, **{f"gold/{t}": golds[s] for t, golds in by.items()})
            for arm, by in at.items() for s in (0, 1)]  # fmt: skip
    asked = ["gold/0:gold/*", "gold/*"]
    found = compare(rows, asked, baseline="daa")
    sera = entry(found, "sera")
    assert sera.differences["gold/0:gold/*"] == estimate([2.0, 4.0])
    assert sera.means == {"gold/0:gold/*": estimate([5.0, 7.0]), "gold/*": estimate([5.0, 7.0])}
    assert entry(found, "daa").means["gold/*"] == estimate([3.0, 3.0])
    assert "gold/*: chosen by the mean over the seeds, which makes it a little too good: daa 1, sera 0" in table(found)
    assert "minus daa: gold/*" in table(found)
    small = compare(rows, asked[:1], baseline="daa", smaller_is_better=True)
    assert entry(small, "sera").differences["gold/0:gold/*"] == estimate([1.0, 7.0]), "the smallest mean is 2, at 0"


def test_the_picture_has_every_entry_at_its_mean_with_its_interval(monkeypatch):
    drawn = Figure()
    monkeypatch.setattr("sera_jax.evaluation.look.page", lambda *_, **__: contextlib.nullcontext(drawn))
    gold = {"daa": [1.0, 3.0], "sera": [2.0, 6.0]}
    rows = [row(f"noise={n}", arm, s, gold=n + g) for n in (0, 1) for arm in gold for s, g in enumerate(gold[arm])]
    found = compare(rows, ["gold"], baseline="daa", panels="noise")
    draw(found, "", {})
    of_means, of_differences, *_ = drawn.axes
    assert [label.get_text() for label in of_means.get_yticklabels()] == ["sera (2)", "daa (2)"]
    assert [label.get_text() for label in of_differences.get_yticklabels()] == ["sera (2)", "daa"]
    assert (of_means.get_title(loc="left") or of_means.get_title()) == "noise=0"
    for axis, expected in ((of_means, [(4.0, 0), (2.0, 1)]), (of_differences, [(2.0, 0)])):
        assert [tuple(bar[0].get_xydata()[0]) for bar in axis.containers] == expected
    (segment,) = of_differences.containers[0][2][0].get_segments()
    assert segment[:, 0] == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)


def test_arms_without_a_look_get_none_that_another_has():
    """Nor a colour, while there are others; what is taken by an arm that is not there is free."""
    taken = {"same": ArmLook("", *OTHERS[0]), "alike": ArmLook("", OTHERS[1][0], "o")}
    found = looks_of([*taken, *"abcde"], taken)
    assert all(found[arm] is its for arm, its in taken.items())
    assert len({its.colour for its in found.values()}) == len(found) == len(OTHERS)
    every = taken | {colour: ArmLook("", colour, "o") for colour, _ in OTHERS[2:]}
    found = looks_of([*every, "a"], every)
    assert len({(its.colour, its.marker) for its in found.values()}) == len(found)
    assert looks_of(["a"], taken)["a"].colour == OTHERS[0][0]


@pytest.mark.parametrize(
    "values, options, words",
    [
        ((1, 2), {"panels": "n"}, "panels='n' and curve='n'; a picture has one or the other"),
        (("few", 2), {}, "curve='n' is 'few' in the setting 'a'; it must be a number"),
        ((True, 2), {}, "curve='n' is True in the setting 'a'"),
        ((2, 2), {}, "curve='n' is 2 in the settings 'a' and 'b'; it must tell them apart"),
    ],
)
def test_a_curve_is_over_numbers_of_which_each_setting_has_its_own(values, options, words):
    rows = [row(name, gold=1.0) | {"varied": {"n": value}} for name, value in zip("ab", values, strict=True)]
    with pytest.raises(ValueError, match=words):
        compare(rows, ["gold"], curve="n", **options)


def test_a_curve_has_every_arm_at_its_means_in_the_order_of_the_field_with_its_intervals(monkeypatch, tmp_path):
    gold, sizes = {"daa": [1.0, 3.0], "sera": [2.0, 6.0]}, (100, 5, 20)
    rows = [
        row(f"{n} pairs", arm, seed, gold=n + g) | {"varied": {"n": n}}
        for n in sizes
        for arm in gold
        for seed, g in enumerate(gold[arm])
    ]
    found = compare(rows, ["gold"], baseline="daa", curve="n")
    draw(found, tmp_path / "picture.png", {})
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    drawn = Figure()
    monkeypatch.setattr("sera_jax.evaluation.look.page", lambda *_, **__: contextlib.nullcontext(drawn))
    draw(found, "", {})
    of_means, of_differences = drawn.axes
    for container, arm in zip(of_means.containers, dict.fromkeys(entry.arm for entry in found.entries), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_xydata(), [(n, n + np.mean(gold[arm])) for n in sorted(sizes)])
        halves = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
        np.testing.assert_allclose(halves, estimate(gold[arm]).half)
    (differences,) = of_differences.containers
    np.testing.assert_allclose(differences[0].get_xydata()[:, 1], 2.0)
    assert of_means.get_xscale() == "log"
    assert [legend.get_text() for legend in drawn.legends[0].get_texts()] == ["sera", "daa"]


def test_a_curve_over_a_metric_has_every_arm_at_both_its_means_with_the_intervals_of_both(monkeypatch, tmp_path):
    kl = {"a": [4.0, 6.0], "b": [1.0, 2.0], "c": [9.0, 9.5]}  # of settings that no number tells apart
    rows = [
        row(setting, "daa", seed, gold=10 - value, kl=value) | {"varied": {"how": setting}}
        for setting, values in kl.items()
        for seed, value in enumerate(values)
    ]
    rows.append(row("a", "sft", gold=1.0) | {"varied": {"how": "a"}})  # of which no KL is known: it has no place
    found = compare(rows, ["gold", "kl"], curve="kl")
    drawn = Figure()
    monkeypatch.setattr("sera_jax.evaluation.look.page", lambda *_, **__: contextlib.nullcontext(drawn))
    draw(found, "", {})
    (container,) = drawn.axes[0].containers
    line, _, (across, up) = container
    means = [np.mean(kl[setting]) for setting in "bac"]
    np.testing.assert_allclose(line.get_xydata(), [(x, 10 - x) for x in means])
    for axis, bars in enumerate((across, up)):
        halves = [(segment[1, axis] - segment[0, axis]) / 2 for segment in bars.get_segments()]
        np.testing.assert_allclose(halves, [estimate(kl[setting]).half for setting in "bac"])
    assert drawn.axes[0].get_xlabel() == "kl"
    for metrics, options in ((["gold"], {}), (["kl", "gold"], {}), (["gold", "kl"], {"panels": "how"})):
        with pytest.raises(ValueError, match="curve='kl'"):
            compare(rows, metrics, curve="kl", **options)


def test_every_figure_of_the_page_has_its_number_of_runs_and_is_bold_where_0_is_left_out(tmp_path):
    gold = {"daa": [0.1, 0.2, 0.3], "sera": [0.5, 0.61, 0.7], "random": [0.1, 0.5]}
    rows = [row("noise=0.2", arm, s, gold=g) for arm, golds in gold.items() for s, g in enumerate(golds)]
    found = compare(rows, ["gold"], baseline="daa", panels="noise")
    page = markdown(found)
    assert "| sera | 0.603 ± 0.249 (3) | **0.403 ± 0.014 (3)** |" in page
    assert "| random | 0.300 ± 2.541 (2) | 0.150 ± 1.906 (2) |" in page
    assert page.startswith("noise=0.2\n\n| arm | gold | minus daa |\n| --- | --- | --- |\n| sera |")
    draw(found, tmp_path / "picture.png", {})
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
