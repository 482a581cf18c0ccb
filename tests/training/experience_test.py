"""From scores to rewards and advantages: the oracle's numbers under every setting, however the rollouts are laid."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.config import PpoGroup, RewardGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.data.rollouts import lay_response_values, lay_rollouts, lay_token_values
from sera_jax.losses.ppo import value_clipped, value_loss
from sera_jax.mesh import host_to_global, make_mesh, replicated, row_shards, rows_sharding
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.training.experience import Passes, initial_control, make_experience
from sera_jax.training.rewards import Scored, coherent_reward, noise
from sera_jax.training.score import make_score, place_rows
from tests import ppo_oracles
from tests.tolerances import TOLERANCES

PROMPTS, SAMPLES = 12, 2
TOKEN_NUMBERS = ("logp", "sft", "base", "sampled", "value")
NUMBERS = ("advantage", "value", "returns")

# Between them: every reward option, both places of the KL, every estimator, discounts, and with and without whitening.
SETTINGS = {
    "plain": (RewardGroup(), PpoGroup(gamma=1.0, lam=1.0)),
    "token": (
        RewardGroup(placement="token", length_normalize=True, missing_eos="keep", whiten=True, clip=0.8),
        PpoGroup(kl_in="loss", kl_controller="adaptive", kl_target=0.5, kl_horizon=300.0, gamma=1.0, lam=0.95),
    ),
    "whitened": (
        RewardGroup(missing_eos="subtract", missing_eos_penalty=2.5, count_eos=False, whiten=True, clip=1.2),
        PpoGroup(
            kl_estimator="k3",
            gamma=0.9,
            lam=0.8,
            whiten_advantages=False,
            kl_controller="adaptive",
            critic_warmup_iterations=1,
            value_scale="none",
        ),
    ),
    "batch_mean": (RewardGroup(length_normalize=True), PpoGroup(kl_estimator="k2", whiten_advantages=False)),
    "random": (RewardGroup(), PpoGroup(kl_coef=0.0, lam=0.95, whiten_advantages=False)),
}


def close(got, want, kind="closed_form", **more):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"], **more)


def rollouts(seed=0):
    """Items of two responses each, and for each response what the models said of it."""
    rng = np.random.default_rng(seed)
    items, said = [], []
    for i in range(PROMPTS):
        lengths = rng.integers(1, 8, SAMPLES)
        responses = tuple(rng.integers(1, 50, n).astype(np.int32) for n in lengths)
        items.append(Item(f"p{i}", rng.integers(1, 50, rng.integers(1, 6)).astype(np.int32), responses))
        for n in lengths:
            logp = -rng.exponential(1.5, n)
            sft = np.minimum(logp + 0.4 * rng.standard_normal(n), 0)
            numbers = dict(
                logp=logp,
                sft=sft,
                base=np.minimum(sft - 0.3 + 0.8 * rng.standard_normal(n), 0),
                sampled=logp + 1e-3 * rng.standard_normal(n),
                value=rng.standard_normal(n),
            )
            # what the package is given, so that rounding the inputs is no difference
            one = {name: np.float32(x).astype(np.float64).tolist() for name, x in numbers.items()}
            said.append(one | dict(finished=bool(rng.random() < 0.7), noise=float(np.float32(rng.standard_normal()))))
    assert len({x["finished"] for x in said}) == 2
    return items, said


ITEMS, SAID = rollouts()


def lay(mesh, said, *, parts=3, microbatches=1, critic=True, row_tokens=32, share_prompt=True, seed=0):
    """The same rollouts in packed parts, and as `Scored` on the mesh."""
    packed = lay_rollouts(
        ITEMS,
        parts,
        Layout(row_tokens, share_prompt, shards=row_shards(mesh)).accumulated(microbatches),
        seed=seed,
        iteration=1,
    )

    def by_item(name):
        values = [np.asarray(x[name]) for x in said]
        return [values[i : i + SAMPLES] for i in range(0, len(values), SAMPLES)]

    scored = []
    for part in packed:
        host = dict(
            **{f"{n}_logp" if n != "logp" else n: lay_token_values(part, by_item(n)) for n in TOKEN_NUMBERS[:4]},
            value=lay_token_values(part, by_item("value")) if critic else None,
            finished=lay_response_values(part, by_item("finished"), bool),
            given=lay_response_values(part, by_item("noise"), np.float32),
        )
        scored.append(Scored(rows=place_rows(part.rows, mesh), **host_to_global(host, rows_sharding(mesh))))
    return packed, scored


def by_response(packed, experience, name):
    """What the experience says of every response, in the order of SAID; unused columns must be 0."""
    found = {}
    for part, one in zip(packed, experience, strict=True):
        values = np.asarray(getattr(one, name))
        assert values.dtype == np.float32
        values = values.reshape(-1, values.shape[-1])
        assert not values[part.rows.slot == part.rows.num_slots].any()
        for r, k in np.argwhere(part.item >= 0):
            found[int(part.item[r, k]), int(part.response[r, k])] = values[r, part.rows.slot[r] == k]
    return [found[i, k] for i in range(PROMPTS) for k in range(SAMPLES)]


@pytest.fixture(scope="module")
def one():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def program(name, mesh, microbatches=1):
    """One compilation for each setting (and each arrangement that differs in shape)."""
    settings, ppo = SETTINGS[name]
    reward = noise(settings) if name == "random" else coherent_reward(settings)
    baseline = "batch_mean" if name == "batch_mean" else "critic"
    passes = dict(passes=Passes(1, 4, 3), warmup_passes=Passes(1, 4, 0))
    how: dict[str, Any] = dict(microbatches=lambda rows, row_tokens: microbatches, baseline=baseline, **passes)
    return make_experience(reward, ppo, mesh, **how)


def make(name, mesh, said=SAID, control=None, microbatches=1, **layout):
    """(experience by response, control, metrics, the experience as it is), with every transfer made beforehand.

    The one metric that tells of the layout is looked at here and left out.
    """
    packed, scored = lay(mesh, said, microbatches=microbatches, critic=name != "batch_mean", **layout)
    control = jax.device_put(initial_control(SETTINGS[name][1]) if control is None else control, replicated(mesh))
    with jax.transfer_guard("disallow"), jax.set_mesh(mesh):
        experience, after, metrics = program(name, mesh, microbatches)(scored, control)
    host = jax.device_get(experience)
    read = {field: by_response(packed, host, {"value": "old_value"}.get(field, field)) for field in NUMBERS}
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    close(metrics.pop("rollout/padding_fraction"), np.mean([part.rows.segment == 0 for part in packed]))
    return read, jax.device_get(after), metrics, experience


def oracle(name, said=SAID, kl_coef=None, **earlier):
    reward, ppo = SETTINGS[name]
    options = {"batch_mean": dict(baseline="batch_mean"), "random": dict(random_reward=True)}.get(name, {})
    kl_coef = ppo.kl_coef if kl_coef is None else kl_coef
    return ppo_oracles.experience(said, reward, ppo, kl_coef=kl_coef, **earlier, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_iterations_are_the_oracles(one, name):
    """Over minibatches whose prompts are shared; the second goes on with the first's moments and coefficient."""
    kl_coef, control, passes_tokens = SETTINGS[name][1].kl_coef, None, 0
    earlier, returns = [], []
    for seed in (0, 1):
        said = SAID if seed == 0 else [x | dict(base=[b + 0.2 * i for i, b in enumerate(x["base"])]) for x in SAID]
        got, control, metrics, experience = make(name, one, said, control)
        want, want_metrics, next_kl_coef = oracle(name, said, kl_coef, earlier=earlier, earlier_returns=returns)
        warming = seed < SETTINGS[name][1].critic_warmup_iterations
        kl_coef = kl_coef if warming else next_kl_coef  # the controller waits for the policy to move
        earlier += [x["score"] for x in want]
        returns += [r for x in want for r in x["returns"]]
        for field in NUMBERS:
            for i, (left, right) in enumerate(zip(got[field], want, strict=True)):
                close(left, right[field], "decoder_oracle", err_msg=f"{field} of response {i} in iteration {seed + 1}")
        laid = sum(len(item.prompt) for item in ITEMS) + want_metrics["rollout/tokens"]
        want_metrics |= {"cost/sampling": laid, "cost/scoring": 4 * laid, "cost/training": 0 if warming else 3 * laid}
        assert set(metrics) == set(want_metrics)
        for key, value in want_metrics.items():
            close(metrics[key], value, "decoder_oracle", err_msg=key)
        close(control.kl_coef, kl_coef)
        close(control.moments.mean, np.mean(earlier))
        close(control.moments.std(), np.std(earlier))
        if name != "batch_mean":  # without a critic there is no value to scale
            assert control.returns.count == len(returns)
            close(control.returns.rms(), np.sqrt(np.mean(np.square(returns))), "decoder_oracle")
        for part in experience:
            close(part.value_scale, np.full(part.value_scale.shape, want_metrics.get("critic/value_scale", 1.0)))
        assert int(control.iteration) == seed + 1
        passes_tokens += (5 if warming else 8) * laid
        assert control.passes_tokens == passes_tokens


def test_the_settings_reach_the_cases_that_tell_them_apart():
    """What the comparison with the oracle would not see if the drawn numbers were too tame."""
    assert 0.1 < np.mean([not x["finished"] for x in SAID]) < 0.5
    for name in ("token", "whitened"):
        clip = SETTINGS[name][0].clip
        paid = np.concatenate([x["paid"] for x in oracle(name)[0]])
        assert (np.abs(paid) == clip).any() and (np.abs(paid) < clip).any()
    assert oracle("token")[2] != SETTINGS["token"][1].kl_coef
    assert oracle("whitened")[2] != SETTINGS["whitened"][1].kl_coef


def test_a_fractional_log_ratio_arrives_as_the_return_to_the_last_float32_digit(one):
    """0.7 and -1.6, with no KL and a critic that says 0. Written into an array of integers they would be 0 and -1."""
    said = []
    for i, x in enumerate(SAID):
        n = len(x["logp"])
        ratio = np.float32((0.7, -1.6)[i % 2])
        last = [0.0] * (n - 1)
        said.append(x | dict(logp=[0.0] * n, sft=[*last, min(ratio, 0)], base=[*last, min(-ratio, 0)], value=[0.0] * n))
        said[-1] |= dict(finished=True)
    # a log-ratio is a difference of two log-probs: one of them is 0 here, so that the difference is exact
    control = dataclasses.replace(initial_control(SETTINGS["plain"][1]), kl_coef=jnp.float32(0))
    got, _, metrics, experience = make("plain", one, said, control)
    for i, returns in enumerate(got["returns"]):
        assert returns.dtype == np.float32
        assert returns.tolist() == [np.float32((0.7, -1.6)[i % 2])] * len(returns)
    close(metrics["objective/scores"], (0.7 - 1.6) / 2)
    close(metrics["objective/rlhf_reward"], (0.7 - 1.6) / 2)
    assert {leaf.dtype for leaf in jax.tree.leaves([dataclasses.replace(e, rows=None) for e in experience])} == {
        np.dtype(np.float32)
    }


def test_advantages_are_whitened_over_the_real_tokens_of_all_minibatches_together(one):
    got, control, *_ = make("plain", one)
    flat = np.concatenate(got["advantage"]).astype(np.float64)
    close(flat.mean(), 0.0)
    close(flat.var(), 1.0)
    packed, _ = lay(one, SAID)
    rows = packed[0].rows
    assert control.shape.tolist() == [*rows.tokens.shape, rows.slot.shape[1], rows.num_slots]
    of_parts = [
        np.concatenate(
            [got["advantage"][SAMPLES * i + k] for i in {*part.item[part.item >= 0]} for k in range(SAMPLES)]
        )
        for part in packed
    ]
    assert max(abs(x.mean()) for x in of_parts) > 0.05  # not each by itself


@pytest.mark.parametrize(
    ("shape", "microbatches", "layout"),
    [
        ((1, 1, 1), 2, dict(parts=2, share_prompt=False, row_tokens=40, seed=5)),
        ((2, 2, 2), 2, dict(parts=1, row_tokens=24)),
    ],
    ids=str,
)
def test_another_arrangement_of_parts_rows_microbatches_and_devices_changes_nothing(one, shape, microbatches, layout):
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    want, control, metrics, _ = make("plain", one)
    got, other, other_metrics, experience = make("plain", mesh, microbatches=microbatches, **layout)
    for field in NUMBERS:
        for left, right in zip(got[field], want[field], strict=True):
            close(left, right, "decoder_oracle", err_msg=field)
    assert other_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        if not name.startswith("cost/") or layout.get("share_prompt", True):  # a prompt that is laid twice costs twice
            close(other_metrics[name], value, "decoder_oracle", err_msg=name)
    assert len(experience) == layout["parts"]
    for leaf in jax.tree.leaves(experience):
        assert leaf.shape[0] == microbatches
        assert leaf.sharding.shard_shape(leaf.shape)[:2] == (microbatches, leaf.shape[1] // row_shards(mesh))
    rows = jax.tree.leaves(experience[0].rows)
    packed, _ = lay(mesh, SAID, microbatches=microbatches, **layout)
    for leaf, host in zip(rows, jax.tree.leaves(packed[0].rows), strict=True):  # rows stay in their order
        np.testing.assert_array_equal(np.asarray(leaf).reshape(host.shape), host)
    assert float(other.moments.count) == float(control.moments.count) == PROMPTS * SAMPLES
    close(other.returns.rms(), control.returns.rms(), "decoder_oracle")


def test_random_rewards_have_the_scores_mean_and_variance_and_follow_from_the_noise(one):
    """Responses of lam = 0.95 and a critic of 0: the return of the last token is what the response is paid."""
    rng = np.random.default_rng(7)
    quiet = [x | dict(value=[0.0] * len(x["logp"])) for x in SAID]
    scores = np.array([x["score"] for x in oracle("random")[0]])
    packed, scored = lay(one, quiet)
    control = initial_control(SETTINGS["random"][1])

    def paid(draw):
        parts = [
            dataclasses.replace(s, given=jnp.asarray(lay_response_values(p, draw, np.float32)))
            for p, s in zip(packed, scored)
        ]
        found = by_response(packed, program("random", one)(parts, control)[0], "returns")
        return np.array([returns[-1] for returns in found], np.float64)

    draws = rng.standard_normal((100, PROMPTS, SAMPLES))
    every = np.array([paid(draw) for draw in draws])
    np.testing.assert_array_equal(paid(draws[3]), every[3])
    close(every, scores.mean() + scores.std() * draws.reshape(every.shape), "decoder_oracle")
    off = 5 / np.sqrt(every.size)  # five standard errors of the mean, in standard deviations
    assert abs(every.mean() - scores.mean()) < off * scores.std()
    assert abs(every.std() / scores.std() - 1) < off
    of_responses = every.mean(0)  # and no response is paid by its own score
    assert abs(np.corrcoef(of_responses, scores)[0, 1]) < 0.7


def test_the_kl_is_exactly_0_where_the_policy_is_the_sft_model(one):
    """The same program scores both, so the same parameters give the same bits, and no KL is paid for."""
    cfg = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    score = make_score(cfg, one, window=32, chunk_tokens=64, per_token=True)
    make_params = jax.jit(functools.partial(init_params, cfg))
    sft, base = make_params(key_for(0, Stream.INIT)), make_params(key_for(1, Stream.INIT))
    _, scored = lay(one, SAID)
    scored = [
        dataclasses.replace(
            part,
            logp=score(jax.tree.map(jnp.copy, sft), part.rows),
            sft_logp=score(sft, part.rows),
            base_logp=score(base, part.rows),
        )
        for part in scored
    ]
    _, _, metrics = program("plain", one)(scored, initial_control(SETTINGS["plain"][1]))
    for name in ("objective/kl", "objective/kl_k3", "objective/non_score_reward"):
        assert float(metrics[name]) == 0.0, name
    assert float(metrics["objective/rlhf_reward"]) == float(metrics["objective/scores"]) != 0.0
    assert float(metrics["coherent_reward/largest"]) > 0


def test_no_response_that_ended_and_a_reward_that_does_not_vary_give_numbers_all_the_same(one):
    said = [x | dict(base=x["sft"], finished=False) for x in SAID]
    got, control, metrics, _ = make("whitened", one, said)
    assert all(np.isfinite(x).all() for field in NUMBERS for x in got[field])
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["coherent_reward/length_corr"] == metrics["completions/mean_terminated_length"] == 0.0
    assert metrics["completions/clipped_ratio"] == 1.0 and metrics["val/num_eos_tokens"] == 0.0
    assert control.moments.std() == 1.0
    assert metrics["objective/finished_scores"] == 0.0


@pytest.mark.parametrize("settings", ["plain", "token"])
def test_c_times_every_reward_and_value_is_c_times_every_return_at_the_same_value_loss(one, settings):
    """The unit of the reward, which is arbitrary, has no say in the critic's loss, its clip, or its share of a joint
    loss."""
    reward_of, ppo = SETTINGS[settings]
    c, inner = 64.0, coherent_reward(reward_of)

    def times_c(batch, moments):
        paid, *rest = inner(batch, moments)
        return c * paid, *rest

    _, scored = lay(one, SAID)
    plain = make_experience(inner, ppo, one)(scored, initial_control(ppo))
    scored = [dataclasses.replace(part, value=c * part.value) for part in scored]
    control = dataclasses.replace(initial_control(ppo), kl_coef=c * jnp.float32(ppo.kl_coef))
    larger = make_experience(times_c, ppo, one)(scored, control)
    assert float(larger[2]["critic/value_scale"]) == c * float(plain[2]["critic/value_scale"])

    def critic(x, value):
        """Where its clip decides, its loss, and the loss's slope."""
        how = dict(old_value=x.old_value, returns=x.returns, scale=x.value_scale[..., None], cliprange_value=0.2)
        loss, pull = jax.vjp(lambda v: value_loss(value=v, **how), value)
        return value_clipped(value=value, **how), loss, pull(jnp.ones_like(loss))[0]

    for a, b in zip(plain[0], larger[0], strict=True):
        np.testing.assert_array_equal(b.returns, c * a.returns)  # to the bit: c is a power of 2
        value = a.old_value + jnp.sin(jnp.arange(a.old_value.shape[-1]))
        (clipped, loss, slope), (clipped_c, loss_c, slope_c) = critic(a, value), critic(b, c * value)
        np.testing.assert_array_equal(clipped_c, clipped)
        np.testing.assert_array_equal(loss_c, loss)
        np.testing.assert_array_equal(c * slope_c, slope)
        assert 0 < clipped.mean() < 1
