"""What the coherent reward, the KL and PPO's gradient add up to, on a policy small enough to enumerate.

Three tokens, of which 0 ends the response, and at most three of them: at the third only the end is allowed, so every
response ends and there are seven. A policy is a table of logits, one row per prefix at which there is a choice. The
seven responses lie in two packed rows; an expectation is a sum over all of them, weighted by their probabilities.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sera_jax.losses import advantages, coherent, ppo
from sera_jax.ops.logprob import sum_slots
from tests import ppo_oracles
from tests.tolerances import TOLERANCES

RESPONSES = [[(0,), (1, 0), (2, 0), (1, 1, 0)], [(1, 2, 0), (2, 1, 0), (2, 2, 0)]]
FORCED = 3  # the prefixes (), (1), (2) are rows 0, 1, 2 of a table; at all longer ones the end is certain
WIDTH, NUM_SLOTS = 10, 5

TOKEN = ppo_oracles.lay(RESPONSES, WIDTH).astype(np.int32)
PREFIX = ppo_oracles.lay([[[0, y[0], FORCED][: len(y)] for y in row] for row in RESPONSES], WIDTH, fill=FORCED).astype(
    np.int32
)
SLOT = ppo_oracles.slots(RESPONSES, WIDTH, NUM_SLOTS)
EXISTS = ppo_oracles.of_slots([[1] * len(row) for row in RESPONSES], NUM_SLOTS) > 0
FOLLOWS = np.array(advantages.follows(SLOT, num_slots=NUM_SLOTS))
RULES = dict(
    slot=SLOT,
    num_slots=NUM_SLOTS,
    finished=EXISTS,
    missing_eos="penalty",
    missing_eos_penalty=1.0,
    count_eos=True,
    length_normalize=False,
)


def assert_close(got, want, kind="closed_form"):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def table(seed):
    """Logits f32[3, 3] of a random policy."""
    return np.random.default_rng(seed).standard_normal((3, 3)).astype(np.float32)


BASE, SFT, POLICY = table(0), table(1), table(2)


def token_logp(logits):
    """f32[R, M] of every token of every response; 0 at unused columns."""
    logp = jnp.concatenate([jax.nn.log_softmax(logits, axis=-1), jnp.zeros((1, 3))])
    return jnp.where(SLOT < NUM_SLOTS, logp[PREFIX, TOKEN], 0.0)


def probabilities(logits):
    """f64[7] of the responses, multiplied out."""
    exact = np.asarray(logits, np.float64)
    exact = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    return np.array(
        [np.prod([exact[prefix, token] for prefix, token in zip((0, y[0]), y)]) for row in RESPONSES for y in row]
    )


def weights(logp):
    """f32[R, K] probability of each response, through which no gradient goes; 0 at empty slots."""
    return jnp.where(EXISTS, jnp.exp(sum_slots(jax.lax.stop_gradient(logp), SLOT, NUM_SLOTS)), 0.0)


def payments(logp, *, placement="eos", kl_coef=0.0, reference=SFT, rules=RULES):
    """f32[R, M]: the coherent reward as placed, less the KL to the reference, token by token."""
    logratios = coherent.token_logratios(sft_logp=token_logp(SFT), base_logp=token_logp(BASE))
    scores = coherent.scores(logratios, **rules)
    at = {name: rules[name] for name in ("slot", "num_slots")}
    shares = coherent.shares(logratios, **rules)
    reward = coherent.place(shares=shares, scores=scores, placement=placement, **at)
    return reward - kl_coef * ppo.kl_estimate(logp=logp, ref_logp=token_logp(reference), estimator="k1")


@functools.partial(jax.jit, static_argnames=("placement", "baseline", "count_eos", "length_normalize"))
def expected_gradient(
    logits,
    *,
    placement="eos",
    kl_coef=0.0,
    reference=SFT,
    gamma=1.0,
    lam=1.0,
    values=None,
    baseline=False,
    count_eos=True,
    length_normalize=False,
):
    """Of PPO's loss at the rollout's own policy, in expectation over all responses: f32[3, 3], uphill."""
    rules = RULES | dict(count_eos=count_eos, length_normalize=length_normalize)

    def loss(logits):
        logp = token_logp(logits)
        held = jax.lax.stop_gradient(logp)
        rewards = payments(held, placement=placement, kl_coef=kl_coef, reference=reference, rules=rules)
        if baseline:
            returns = advantages.rewards_to_go(rewards=rewards, follows=FOLLOWS, gamma=gamma)
            advantage = returns - advantages.batch_baseline(returns=returns, slot=SLOT, num_slots=NUM_SLOTS)
        else:
            critic = jnp.zeros_like(rewards) if values is None else values
            advantage = advantages.gae(rewards=rewards, values=critic, follows=FOLLOWS, gamma=gamma, lam=lam)
        each = ppo.policy_loss(logp=logp, old_logp=held, advantage=advantage, cliprange=0.2)
        return jnp.sum(coherent.at_tokens(weights(logp), slot=SLOT) * each)

    return -jax.grad(loss)(logits)


def objective(logits, *, kl_coef, reference):
    """E[score] - kl_coef KL(pi || reference), differentiated through the probabilities themselves."""
    logp = token_logp(logits)
    p = jnp.where(EXISTS, jnp.exp(sum_slots(logp, SLOT, NUM_SLOTS)), 0.0)
    score = sum_slots(token_logp(SFT) - token_logp(BASE), SLOT, NUM_SLOTS)
    return jnp.sum(p * (score - kl_coef * sum_slots(logp - token_logp(reference), SLOT, NUM_SLOTS)))


@jax.jit
def climbed(start, kl_coef, reference):
    """Where ascent of the expected gradient ends."""
    steps = 2000
    adam = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry, _):
        logits, state = carry
        uphill = expected_gradient(logits, kl_coef=kl_coef, reference=reference)
        updates, state = adam.update(-uphill, state)
        return (optax.apply_updates(logits, updates), state), None

    return jax.lax.scan(step, (start, adam.init(start)), length=steps)[0][0]


def test_the_seven_responses_are_all_there_are():
    for logits in (BASE, SFT, POLICY):
        assert_close(probabilities(logits).sum(), 1.0)
        assert_close(np.array(weights(token_logp(logits)))[EXISTS], probabilities(logits))


@pytest.mark.parametrize("kl_coef", [0.5, 1.0, 3.0])
def test_ppos_expected_gradient_is_that_of_the_objective(kl_coef):
    want = jax.grad(functools.partial(objective, kl_coef=kl_coef, reference=SFT))(POLICY)
    assert np.abs(want).max() > 0.1
    assert_close(expected_gradient(POLICY, kl_coef=kl_coef), want)


@pytest.mark.parametrize("kl_coef", [0.5, 1.0, 3.0])
def test_the_optimum_is_the_sft_policy_tilted_away_from_the_base(kl_coef):
    """pi* is proportional to pi_sft^(1 + 1/lambda) pi_base^(-1/lambda)."""
    sft, base = probabilities(SFT), probabilities(BASE)
    best = sft ** (1 + 1 / kl_coef) * base ** (-1 / kl_coef)
    best /= best.sum()
    assert np.abs(best - sft).max() > 0.05
    assert_close(probabilities(climbed(SFT, kl_coef, SFT)), best, "toy_optimum")


def test_with_the_kl_to_the_base_and_lambda_1_the_optimum_is_the_sft_policy():
    assert np.abs(probabilities(BASE) - probabilities(SFT)).max() > 0.1
    assert_close(probabilities(climbed(BASE, 1.0, BASE)), probabilities(SFT), "toy_optimum")


@pytest.mark.parametrize("count_eos", [True, False])
def test_without_discounts_both_placements_have_the_same_expected_gradient(count_eos):
    eos, token = (expected_gradient(POLICY, placement=placement, count_eos=count_eos) for placement in ("eos", "token"))
    assert np.abs(eos).max() > 0.1
    assert_close(eos, token)


@pytest.mark.parametrize(
    "setting", [{"lam": 0.8}, {"gamma": 0.8}, {"length_normalize": True}], ids=["lam", "gamma", "length_normalize"]
)
def test_with_discounts_or_shares_divided_by_the_length_the_placements_differ(setting):
    """A share divided by the length depends on later tokens too, which per-token placement gives no credit for it."""
    eos, token = (expected_gradient(POLICY, placement=placement, **setting) for placement in ("eos", "token"))
    assert np.abs(eos - token).max() > 1e-3


@pytest.mark.parametrize("placement", ["eos", "token"])
def test_neither_a_constant_baseline_nor_a_critic_changes_the_expected_gradient(placement):
    plain = expected_gradient(POLICY, placement=placement, kl_coef=0.5)
    assert_close(expected_gradient(POLICY, placement=placement, kl_coef=0.5, baseline=True), plain)
    of_prefix = np.append(np.random.default_rng(3).standard_normal(3), 0.0).astype(np.float32)
    values = np.where(SLOT < NUM_SLOTS, of_prefix[PREFIX], np.float32(0.0))  # a critic sees the prefix only
    assert_close(expected_gradient(POLICY, placement=placement, kl_coef=0.5, values=values), plain)
    flat = expected_gradient(POLICY, placement=placement, kl_coef=0.5, values=values, lam=0.5)
    assert np.abs(flat - plain).max() > 1e-2  # below lambda 1 the critic's errors do tell


@pytest.mark.parametrize("seed", range(3))
def test_at_the_sft_policy_the_expected_score_is_its_kl_to_the_base_and_no_tokens_part_is_negative(seed):
    sft, base = table(10 + seed), table(20 + seed)
    logratios = coherent.token_logratios(sft_logp=token_logp(sft), base_logp=token_logp(base))
    p = np.array(weights(token_logp(sft)), np.float64)
    expected = np.sum(p * coherent.scores(logratios, **RULES))
    exact = probabilities(sft)
    kl = np.sum(exact * np.log(exact / probabilities(base)))
    assert kl > 0.0
    assert_close(expected, kl)

    shares = np.array(coherent.shares(logratios, **RULES), np.float64)
    of_prefix = np.bincount(PREFIX.ravel(), (np.array(coherent.at_tokens(p, slot=SLOT)) * shares).ravel(), FORCED + 1)
    assert np.all(of_prefix[:FORCED] > 0.0) and of_prefix[FORCED] == 0.0
    assert_close(of_prefix.sum(), kl)
