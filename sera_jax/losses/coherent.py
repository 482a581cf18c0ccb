"""The coherent reward, log pi_sft - log pi_base: what a response scores, and what its tokens are paid of it.

A response's score is the sum of its tokens' *shares*, in nats. The share is the token's log-ratio, or less: `shares`
holds every rule. Per-token placement pays each share where it arises, EOS placement pays the sum at the last token.

Token arrays are f32[..., R, M] and response arrays f32[..., R, K], in the layout of `core.Rows`; the axes before the
last are arbitrary. `finished` bool[..., R, K] says which responses ended by themselves: their last token is the end
token. The others were cut at the length limit.

Source: Zhang et al. 2025 (Self-Rewarding PPO); the log-ratio as a reward is of Watson et al. 2023 (CSIL).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sera_jax.core import Array
from sera_jax.losses.advantages import follows, masked_mean
from sera_jax.ops.logprob import sum_slots

# What a response gets that was cut: (its log-ratios count, the penalty is taken off).
MISSING_EOS = {"penalty": (False, True), "subtract": (True, True), "keep": (True, False)}

PLACEMENTS = ("eos", "token")

TINY_RMS = 1e-6  # numbers below this are taken for 0: nothing is divided by them


def token_logratios(*, sft_logp: Array, base_logp: Array) -> jax.Array:
    """log pi_sft - log pi_base of each token, nats, f32[..., M]."""
    return jnp.float32(sft_logp) - jnp.float32(base_logp)


def at_tokens(of_slots: Array, *, slot: Array) -> jax.Array:
    """The number of each token's response, [..., M] of [..., K]; 0 (False) at unused columns."""
    of_slots = jnp.asarray(of_slots)
    padded = jnp.concatenate([of_slots, jnp.zeros_like(of_slots[..., :1])], axis=-1)
    return jnp.take_along_axis(padded, jnp.asarray(slot), axis=-1)


def shares(
    logratios: Array,
    *,
    slot: Array,
    num_slots: int,
    finished: Array,
    count_eos: bool,
    length_normalize: bool,
    missing_eos: str,
    missing_eos_penalty: float,
) -> jax.Array:
    """What each token adds to its response's score, nats, f32[..., M]; 0 at unused columns.

    Args:
        logratios: f32[..., M] from `token_logratios`; what unused columns hold is not read.
        slot: i32[..., M] response slot of the column; `num_slots` where unused.
        num_slots: K; static.
        finished: bool[..., K].
        count_eos: whether the log-ratio of a finished response's last token counts.
        length_normalize: divide by the response's number of tokens, the end token included.
        missing_eos: a name in MISSING_EOS: a response that was cut gets, by `penalty`, nothing for its log-ratios and
            -missing_eos_penalty at its last token; by `subtract` its log-ratios and the same; by `keep` its log-ratios.
        missing_eos_penalty: nats, whatever the length.

    Raises:
        ValueError: the name in `missing_eos` is unknown.
    """
    if missing_eos not in MISSING_EOS:
        raise ValueError(f"missing_eos is {missing_eos!r}; choose one of {', '.join(MISSING_EOS)}")
    counts_when_cut, penalised = MISSING_EOS[missing_eos]
    used = jnp.asarray(slot) < num_slots
    last = used & ~follows(slot, num_slots=num_slots)
    ended = at_tokens(jnp.asarray(finished, bool), slot=slot)

    counted = used & (ended | counts_when_cut) & ~(ended & last & (not count_eos))
    share = jnp.where(counted, jnp.float32(logratios), 0.0)
    if length_normalize:
        length = sum_slots(used.astype(jnp.float32), slot, num_slots)
        share = share / jnp.maximum(at_tokens(length, slot=slot), 1.0)
    return share - jnp.where(last & ~ended & penalised, jnp.float32(missing_eos_penalty), 0.0)


def scores(
    logratios: Array,
    *,
    slot: Array,
    num_slots: int,
    finished: Array,
    count_eos: bool,
    length_normalize: bool,
    missing_eos: str,
    missing_eos_penalty: float,
) -> jax.Array:
    """The coherent reward of each response, nats, f32[..., K]: the sum of its `shares`, which see for the arguments.

    0 for an empty slot. At pi = pi_sft, with every response ended and every token counted, its mean is
    KL(pi_sft || pi_base).
    """
    added = shares(
        logratios,
        slot=slot,
        num_slots=num_slots,
        finished=finished,
        count_eos=count_eos,
        length_normalize=length_normalize,
        missing_eos=missing_eos,
        missing_eos_penalty=missing_eos_penalty,
    )
    return sum_slots(added, slot, num_slots)


@struct.dataclass
class Moments:
    """Running moments of all numbers so far: the scores of responses, or the returns of tokens.

    Attributes:
        count: f32[] numbers seen.
        mean: f32[] their mean; 0 before the first.
        m2: f32[] the sum of their squared distances to the mean.
    """

    count: Array
    mean: Array
    m2: Array

    def std(self) -> jax.Array:
        """Standard deviation (over n), f32[]; 1 where fewer than two were seen or they do not vary."""
        variance = jnp.float32(self.m2) / jnp.maximum(self.count, 1.0)
        return jnp.where(variance > 0.0, jnp.sqrt(variance), 1.0)  # fewer than two have a variance of exactly 0

    def rms(self) -> jax.Array:
        """Root mean square, the deviation from 0, f32[]; 1 where it is below TINY_RMS, as it is before the first."""
        rms = jnp.sqrt(jnp.float32(self.m2) / jnp.maximum(self.count, 1.0) + jnp.square(self.mean))
        return jnp.where(rms >= TINY_RMS, rms, 1.0)


def no_moments() -> Moments:
    """Moments before the first number."""
    return Moments(count=jnp.zeros((), jnp.float32), mean=jnp.zeros((), jnp.float32), m2=jnp.zeros((), jnp.float32))


def update_moments(moments: Moments, scores: Array, mask: Array) -> Moments:
    """Moments with more numbers: `scores` f32[...] where `mask` bool[...]; other entries may be nan.

    Source: Chan et al. 1979, the pairwise update.
    """
    scores = jnp.float32(scores)
    fresh = jnp.sum(mask, dtype=jnp.float32)
    count = moments.count + fresh
    fresh_mean = masked_mean(scores, mask)
    fresh_m2 = jnp.sum(jnp.where(mask, jnp.square(scores - fresh_mean), 0.0))
    part = fresh / jnp.maximum(count, 1.0)
    delta = fresh_mean - moments.mean
    return Moments(
        count=count,
        mean=moments.mean + delta * part,
        m2=moments.m2 + fresh_m2 + jnp.square(delta) * moments.count * part,
    )


def place(
    *,
    shares: Array,
    scores: Array,
    slot: Array,
    num_slots: int,
    placement: str,
    mean: Array | float = 0.0,
    std: Array | float = 1.0,
    clip: float | None = None,
) -> jax.Array:
    """What each token is paid, f32[..., M]; 0 at unused columns.

    Without a clip and with mean 0, both placements pay a response the same in sum. With gamma = lam = 1 they then have
    the same expected policy gradient too, unless shares are divided by the length: a share then depends on the tokens
    after its own as well, and per-token placement gives those no credit for it.

    Args:
        shares: f32[..., M] from `shares`; read by placement `token`.
        scores: f32[..., K]; read by placement `eos`, so that they may be of another make than `scores`.
        slot, num_slots: as for `shares`.
        placement: `eos` pays (score - mean) / std at the last token, `token` pays each token its share / std: the mean
            is not taken off, as a shift of every token would pay for length.
        mean, std: of the scores, to whiten by; 0 and 1 do not.
        clip: what is paid at a token, a penalty included, is cut to [-clip, clip]; None: it is not.

    Raises:
        ValueError: the name in `placement` is unknown.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; choose one of {', '.join(PLACEMENTS)}")
    if placement == "eos":
        last = (jnp.asarray(slot) < num_slots) & ~follows(slot, num_slots=num_slots)
        paid = jnp.where(last, at_tokens((jnp.float32(scores) - mean) / std, slot=slot), 0.0)
    else:
        paid = shares / std
    return paid if clip is None else jnp.clip(paid, -clip, clip)
