"""Preference losses: a golden table against closed forms, and the laws each of them must keep."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.losses.preference import FIELD_HINTS, LOSSES, NAME_HINTS, PairInputs, log_odds, resolve
from tests import loss_oracles
from tests.tolerances import TOLERANCES


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


# Every loss at its defaults, and each of its hyper-parameters away from them.
SETTINGS = [
    ("dpo", {}),
    ("dpo", {"beta": 0.5}),
    ("dpo", {"label_smoothing": 0.2}),
    ("robust", {}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.4}),
    ("ipo", {}),
    ("ipo", {"tau": 0.7}),
    ("ipo", {"logp_reduction": "sum"}),
    ("slic", {}),
    ("slic", {"beta": 0.02}),
    ("slic_hf", {}),
    ("slic_hf", {"delta": 4.0, "nll_coef": 0.0}),
    ("simpo", {}),
    ("simpo", {"beta": 5.0, "gamma_beta_ratio": 0.1}),
    ("orpo", {}),
    ("orpo", {"beta": 0.4, "nll_coef": 0.0}),
    ("apo_zero", {}),
    ("apo_zero", {"beta": 0.03}),
    ("apo_down", {}),
    ("apo_down", {"beta": 0.03}),
    ("dpo_norm", {}),
    ("dpo_norm", {"beta": 0.5}),
    *((name, {"nll_coef": 0.25}) for name in LOSSES),
]

# name -> the direction in which a step down the loss moves (chosen, rejected), at a small positive margin.
STEP_DIRECTION = dict.fromkeys(LOSSES, (1, -1)) | {"apo_down": (-1, -1)}

ROWS = [  # chosen sum, rejected sum, chosen length, rejected length, reference of both
    (-12.5, -15.0, 8, 11, -14.0, -14.25),
    (-40.0, -22.0, 31, 9, -37.5, -24.0),
    (-3.25, -80.0, 2, 64, -5.0, -61.0),
    (-7.0, -7.5, 7, 5, -7.0, -7.5),
    (-0.5, -1.0, 1, 1, -2.0, -0.25),
]


def pairs(rows=ROWS) -> PairInputs:
    chosen, rejected, n_chosen, n_rejected, ref_chosen, ref_rejected = np.array(rows, np.float32).T
    return PairInputs(
        chosen_logp=jnp.array(chosen),
        rejected_logp=jnp.array(rejected),
        chosen_length=jnp.array(n_chosen),
        rejected_length=jnp.array(n_rejected),
        ref_chosen_logp=jnp.array(ref_chosen),
        ref_rejected_logp=jnp.array(ref_rejected),
    )


def assert_close(got, want, kind="closed_form"):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def value_and_gradients(loss, inputs: PairInputs):
    """Per-pair losses and their derivatives by the two log-probs; a pair's loss reads its own log-probs only."""

    def total(chosen_logp, rejected_logp):
        losses = loss.loss(dataclasses.replace(inputs, chosen_logp=chosen_logp, rejected_logp=rejected_logp))
        return jnp.sum(losses), losses

    (_, losses), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        inputs.chosen_logp, inputs.rejected_logp
    )
    return losses, *grads


@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=str)
def test_values_and_gradients_equal_the_closed_forms(name, values):
    loss = resolve(name, **values)
    got = value_and_gradients(loss, pairs())

    numbers = {key: value for key, value in loss.hyper if key != "nll_coef"}
    w, v, n_w, n_v, ref_w, ref_v = np.array(ROWS, np.float64).T
    want, want_w, want_v = getattr(loss_oracles, name)(w, v, n_w, n_v, ref_w, ref_v, **numbers)
    anchor, anchor_w = loss_oracles.nll(w, n_w)
    nll_coef = dict(loss.hyper)["nll_coef"]
    want, want_w = want + nll_coef * anchor, want_w + nll_coef * anchor_w

    for ours, theirs in zip(got, (want, want_w, want_v), strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=str)
def test_the_oracles_gradients_are_the_slopes_of_their_values(name, values):
    """Guards the golden table itself: central differences in float64."""
    loss = resolve(name, **values)
    numbers = {key: value for key, value in loss.hyper if key != "nll_coef"}
    args = list(np.array(ROWS, np.float64).T)
    oracle = getattr(loss_oracles, name)
    step = 1e-6
    for place, analytic in ((0, 1), (1, 2)):
        up, down = list(args), list(args)
        up[place], down[place] = args[place] + step, args[place] - step
        slope = (oracle(*up, **numbers)[0] - oracle(*down, **numbers)[0]) / (2 * step)
        assert_close(oracle(*args, **numbers)[analytic], slope, "finite_difference")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", math.log(2)),
        ("robust", math.log(2)),
        ("dpo_norm", math.log(2)),
        ("ipo", (1 / (2 * 0.1)) ** 2),
        ("slic", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
    ],
)
def test_at_the_reference_the_loss_is_its_known_constant_and_the_reward_exactly_0(name, expected):
    inputs = pairs()
    inputs = dataclasses.replace(inputs, ref_chosen_logp=inputs.chosen_logp, ref_rejected_logp=inputs.rejected_logp)
    loss = resolve(name)
    assert_close(loss.loss(inputs), expected)
    np.testing.assert_array_equal(loss.reward(inputs.chosen_logp, inputs.chosen_length, inputs.ref_chosen_logp), 0.0)
    np.testing.assert_array_equal(loss.margin(inputs), 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_loss_moves_chosen_and_rejected_the_right_way(name):
    _, by_chosen, by_rejected = value_and_gradients(resolve(name), pairs([(-6.0, -6.25, 6, 6, -6.0, -6.0)]))
    assert (-np.sign(by_chosen[0]), -np.sign(by_rejected[0])) == STEP_DIRECTION[name]


@pytest.mark.parametrize("name", LOSSES)
def test_the_nll_anchor_pulls_the_chosen_response_up_and_leaves_the_rejected_one(name):
    plain = value_and_gradients(resolve(name, nll_coef=0.0), pairs())
    anchored = value_and_gradients(resolve(name, nll_coef=3.0), pairs())
    expected = plain[1] - 3.0 / pairs().chosen_length
    assert_close(anchored[1], expected)
    np.testing.assert_array_equal(anchored[2], plain[2])


@pytest.mark.parametrize("name", LOSSES)
def test_filling_of_length_0_gives_finite_losses_and_gradients(name):
    filling = pairs([(0.0, 0.0, 0, 0, 0.0, 0.0)])
    for out in value_and_gradients(resolve(name, nll_coef=1.0), filling):
        assert np.all(np.isfinite(out))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probs_give_finite_losses_and_gradients(name):
    extreme = pairs(
        [(-1e4, -1.0, 500, 1, -1.0, -1e4), (-1.0, -1e4, 1, 500, -1e4, -1.0), (-1e-8, -1e-8, 3, 3, 0.0, 0.0)]
    )
    for out in value_and_gradients(resolve(name), extreme):
        assert np.all(np.isfinite(out))


@pytest.mark.parametrize("name", LOSSES)
def test_permuting_the_pairs_permutes_the_losses(name):
    forward, backward = resolve(name).loss(pairs()), resolve(name).loss(pairs(ROWS[::-1]))
    np.testing.assert_array_equal(forward, backward[::-1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_reference_does_not_read_one(name):
    loss, inputs = resolve(name), pairs()
    moved = dataclasses.replace(inputs, ref_chosen_logp=inputs.ref_chosen_logp - 1.5)
    same = np.array_equal(loss.loss(inputs), loss.loss(moved))
    assert same != loss.uses_reference
    if loss.uses_reference:
        with pytest.raises(ValueError, match="reference"):
            loss.reward(inputs.chosen_logp, inputs.chosen_length)


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].logp == "mean"])
def test_a_loss_of_means_does_not_change_when_a_response_is_said_twice(name):
    once = pairs([(-6.0, -9.0, 4, 5, -5.0, -8.0)])
    twice = pairs([(-12.0, -9.0, 8, 5, -10.0, -8.0)])
    loss = resolve(name, nll_coef=0.0)
    assert_close(loss.loss(once), loss.loss(twice))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [  # log-probs -6 (chosen, 4 tokens) under the policy, -5 under the reference
        ("dpo", {"beta": 0.5}, 0.5 * -1.0),
        ("robust", {"beta": 0.5}, 0.5 * -1.0),
        ("slic", {"beta": 0.5}, 0.5 * -1.0),
        ("apo_zero", {"beta": 0.5}, 0.5 * -1.0),
        ("apo_down", {"beta": 0.5}, 0.5 * -1.0),
        ("ipo", {"tau": 0.5}, 0.5 * -1.0 / 4),
        ("ipo", {"tau": 0.5, "logp_reduction": "sum"}, 0.5 * -1.0),
        ("dpo_norm", {"beta": 0.5}, 0.5 * -1.0 / 4),
        ("simpo", {"beta": 0.5}, 0.5 * -6.0 / 4),
        ("orpo", {"beta": 0.5}, 0.5 * -6.0 / 4),
        ("slic_hf", {}, -6.0),
    ],
    ids=str,
)
def test_the_implicit_reward_is_the_declared_one(name, values, expected):
    loss = resolve(name, **values)
    logp, length, ref = f32([-6.0]), f32([4.0]), f32([-5.0])
    on_host = loss.reward(logp, length, ref)
    assert isinstance(on_host, np.ndarray) and on_host.dtype == np.float32
    assert_close(on_host, expected)
    assert_close(loss.reward(jnp.array(logp), jnp.array(length), jnp.array(ref)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_margin_is_the_reward_difference_over_the_scale(name):
    loss, x = resolve(name), pairs()
    chosen = loss.reward(x.chosen_logp, x.chosen_length, x.ref_chosen_logp)
    rejected = loss.reward(x.rejected_logp, x.rejected_length, x.ref_rejected_logp)
    assert_close(loss.margin(x), (chosen - rejected) / loss.scale)


def test_the_robust_loss_averages_to_the_clean_one_over_flipped_labels():
    """Chowdhury et al. 2024: E over flips with probability e of robust(e) is plain DPO."""
    x, flip = pairs(), 0.3
    turned = PairInputs(
        x.rejected_logp,
        x.chosen_logp,
        x.rejected_length,
        x.chosen_length,
        x.ref_rejected_logp,
        x.ref_chosen_logp,
    )
    loss = resolve("robust", label_smoothing=flip)
    mixed = (1 - flip) * loss.loss(x) + flip * loss.loss(turned)
    assert_close(mixed, resolve("dpo").loss(x))


def test_robust_without_flips_is_dpo():
    np.testing.assert_array_equal(resolve("robust", label_smoothing=0.0).loss(pairs()), resolve("dpo").loss(pairs()))


def test_label_smoothing_is_the_mixture_of_both_labels():
    flipped = resolve("dpo").spec.fn(margin=-resolve("dpo").margin(pairs()), beta=0.1)
    mixed = 0.8 * resolve("dpo").loss(pairs()) + 0.2 * flipped
    assert_close(resolve("dpo", label_smoothing=0.2).loss(pairs()), mixed)


def test_the_log_odds_are_exact_on_both_sides_of_log_2():
    mean_logp = np.array([-1e-4, -0.05, -0.69, -0.70, -3.0, -30.0])
    want = mean_logp - np.log(-np.expm1(mean_logp))
    assert_close(log_odds(mean_logp=jnp.array(mean_logp, jnp.float32)), want)


def test_half_precision_inputs_are_computed_in_float32():
    x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), pairs())
    assert all(resolve(name).loss(x).dtype == jnp.float32 for name in LOSSES)


def test_a_resolved_loss_is_a_static_argument_and_prints_what_it_resolved():
    loss = resolve("simpo", beta=None, gamma_beta_ratio=0.3)
    assert loss == resolve("simpo", gamma_beta_ratio=0.3) and hash(loss) == hash(resolve("simpo", gamma_beta_ratio=0.3))
    assert loss.as_dict() == {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "nll_coef": 0.0}
    assert str(loss) == "simpo(beta=2.0, gamma_beta_ratio=0.3, nll_coef=0.0)"
    jitted = jax.jit(lambda x, spec: spec.loss(x), static_argnums=1)
    assert_close(jitted(pairs(), loss), loss.loss(pairs()))


def test_unset_hyper_parameters_take_the_chosen_losss_own_default():
    assert resolve("dpo").as_dict() == {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "nll_coef": 0.0}
    assert resolve("simpo").as_dict()["beta"] == 2.0
    assert resolve("ipo").as_dict()["tau"] == 0.1 and resolve("ipo").logp == "mean"
    assert resolve("slic_hf").as_dict()["delta"] == 1.0


def test_an_unknown_loss_lists_the_choices_and_knows_other_projects_names():
    with pytest.raises(ValueError, match=r"'dppo'.*apo_down.*simpo"):
        resolve("dppo")
    for name, here in NAME_HINTS.items():
        assert here.split()[0] in LOSSES
        with pytest.raises(ValueError, match=f"here it is '{here}'"):
            resolve(name)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "dpo",
            {"tau": 0.1},
            r"'dpo' does not read tau=0.1; it reads beta, label_smoothing, nll_coef; leave tau unset",
        ),
        ("ipo", {"beta": 0.2}, r"does not read beta=0.2 \(the regulariser of ipo is tau"),
        ("slic_hf", {"beta": 0.2}, r"does not read beta=0.2"),
        ("simpo", {"label_smoothing": 0.1}, r"'simpo' does not read label_smoothing=0.1"),
        ("dpo", {"logp_reduction": "mean"}, r"'dpo' does not read logp_reduction"),
    ],
)
def test_a_value_that_the_loss_does_not_read_is_refused_by_name(name, values, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, **values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"beta": -1.0}),
        ("dpo", {"beta": math.inf}),
        ("dpo", {"beta": math.nan}),
        ("dpo", {"beta": "0.1"}),
        ("dpo", {"beta": True}),
        ("dpo", {"label_smoothing": 0.5}),
        ("robust", {"label_smoothing": 0.5}),
        ("ipo", {"tau": 0.0}),
        ("ipo", {"logp_reduction": "token"}),
        ("slic_hf", {"delta": 0.0}),
        ("slic_hf", {"nll_coef": -0.1}),
        ("simpo", {"gamma_beta_ratio": -0.1}),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_the_field_and_the_value(name, values):
    ((key, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name}.*{key} is {value!r}"):
        resolve(name, **values)


def test_the_registry_is_complete():
    assert set(LOSSES) == {name for name, _ in SETTINGS} == set(STEP_DIRECTION)
    for spec in LOSSES.values():
        assert spec.equation and spec.source and spec.fn.__doc__
        assert dataclasses.replace(spec) == spec
        assert spec.logp in ("sum", "mean")
    assert all(name in LOSSES and key not in LOSSES[name].hyper for name, key in FIELD_HINTS)
