"""Direct alignment losses: one small function per equation, and the implicit reward that belongs to each.

A loss sees a response through one number, its *score*, declared in the decorator above its equation:

    ratio, sum   log pi - log pi_ref, summed over the response's tokens       (dpo, slic, robust, apo_zero, apo_down)
    ratio, mean  the same, averaged over the tokens                           (ipo, dpo_norm)
    logp, sum    log pi, summed, without reference                            (slic_hf)
    logp, mean   log pi, averaged, without reference                          (simpo, orpo)

The implicit reward is `scale * score`, and the implicit reward margin of SeRA is the difference of the scores, so
beta never enters it: (r_w - r_l) / beta. In the equations m is that margin, c and l are the scores of the chosen
and the rejected response, s is the logistic function.

`LOSSES` is the registry; `resolve` fills unset hyper-parameters with the chosen loss's own defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sera_jax.core import at_most

Array = jax.Array | np.ndarray

REDUCTIONS = ("sum", "mean")

# ORPO's odds of a response whose every token is certain are infinite; at this mean log-prob they are cut (and their
# gradient with them), which also keeps filling of length 0 finite.
MAX_ODDS_LOGP = -1e-6


@struct.dataclass
class PairInputs:
    """What a preference loss reads of a batch of pairs; log-probs are SUMS over the response's tokens, nats.

    Attributes:
        chosen_logp, rejected_logp: f32[B] under the policy.
        chosen_length, rejected_length: f32[B] scored tokens; 0 for filling.
        ref_chosen_logp, ref_rejected_logp: f32[B] under the reference; not read by reference-free losses.
    """

    chosen_logp: Array
    rejected_logp: Array
    chosen_length: Array
    rejected_length: Array
    ref_chosen_logp: Array
    ref_rejected_logp: Array


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """One loss as users name it.

    Attributes:
        name: the name in `config.loss.name`.
        fn: the equation; takes the arrays in `takes` and its hyper-parameters by keyword.
        takes: `("margin",)` or `("chosen", "rejected")`: scores, f32[B].
        hyper: hyper-parameter -> default of this loss. `nll_coef` weighs the NLL anchor and is read by every loss.
        uses_reference: the score is made of log-ratios.
        logp: `sum` or `mean` over tokens; a hyper-parameter `logp_reduction` overrides it.
        scale: the hyper-parameter that multiplies a score into the implicit reward; None is 1.
        equation: the loss, as text.
        source: where it is from.
    """

    name: str
    fn: Callable[..., jax.Array]
    takes: tuple[str, ...]
    hyper: Mapping[str, float | str]
    uses_reference: bool
    logp: str
    scale: str | None
    equation: str
    source: str

    @property
    def implicit_reward(self) -> str:
        """The implicit reward as text, for reports; `ResolvedLoss.reward` computes it."""
        score = f"{self.logp} of token {'log-ratios' if self.uses_reference else 'log-probs'}"
        return f"{self.scale} * {score}" if self.scale else score


LOSSES: dict[str, LossSpec] = {}


def _loss(
    equation: str, source: str, score: tuple[str, str], scale: str | None, **hyper: float | str
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Register the decorated equation under its own name; `hyper` are its defaults."""

    def register(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        takes = tuple(name for name in inspect.signature(fn).parameters if name in ("margin", "chosen", "rejected"))
        values = {**hyper, "nll_coef": hyper.get("nll_coef", 0.0)}
        kind, logp = score
        LOSSES[fn.__name__] = LossSpec(
            name=fn.__name__,
            fn=fn,
            takes=takes,
            hyper=values,
            uses_reference=kind == "ratio",
            logp=logp,
            scale=scale,
            equation=equation,
            source=source,
        )
        return fn

    return register


@_loss(
    "-(1 - e) log s(beta m) - e log s(-beta m), e = label_smoothing",
    "Rafailov et al. 2023, eq. 7; with e > 0 cDPO, Mitchell 2023",
    score=("ratio", "sum"), scale="beta", beta=0.1, label_smoothing=0.0,
)  # fmt: skip
def dpo(*, margin: Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO, f32[B]; with `label_smoothing` > 0 the conservative cDPO, which expects that share of flipped labels."""
    logit = beta * margin
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


@_loss(
    "(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e), e = label_smoothing",
    "Chowdhury et al. 2024 (rDPO)",
    score=("ratio", "sum"), scale="beta", beta=0.1, label_smoothing=0.1,
)  # fmt: skip
def robust(*, margin: Array, beta: float, label_smoothing: float) -> jax.Array:
    """Robust DPO, f32[B]: in expectation the loss on clean labels when a share `label_smoothing` < 0.5 is flipped.

    It is not bounded below in the margin: that is the price of being unbiased.
    """
    logit = beta * margin
    clean = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logit)
    flipped = -label_smoothing * jax.nn.log_sigmoid(-logit)
    return (clean - flipped) / (1.0 - 2.0 * label_smoothing)


@_loss(
    "(m - 1 / (2 tau))^2",
    "Azar et al. 2023, eq. 17",
    score=("ratio", "mean"), scale="tau", tau=0.1, logp_reduction="mean",
)  # fmt: skip
def ipo(*, margin: Array, tau: float) -> jax.Array:
    """IPO, f32[B]: the margin is regressed on 1 / (2 tau).

    The margin is of log-ratios averaged over tokens (`logp_reduction="mean"`, which TRL confirmed with the authors)
    or summed (`"sum"`, the letter of the paper).
    """
    return jnp.square(margin - 1.0 / (2.0 * tau))


@_loss(
    "max(0, 1 - beta m)",
    "Zhao et al. 2023, in the form with reference of Liu et al. 2023 (RSO)",
    score=("ratio", "sum"), scale="beta", beta=0.1,
)  # fmt: skip
def slic(*, margin: Array, beta: float) -> jax.Array:
    """SLiC as a hinge on the implicit reward margin, f32[B]; elsewhere called `hinge`."""
    return jax.nn.relu(1.0 - beta * margin)


@_loss(
    "max(0, delta - m) + nll_coef * NLL(chosen) / token",
    "Zhao et al. 2023 (SLiC-HF)",
    score=("logp", "sum"), scale=None, delta=1.0, nll_coef=0.1,
)  # fmt: skip
def slic_hf(*, margin: Array, delta: float) -> jax.Array:
    """The calibration term of SLiC-HF, f32[B], without reference; `nll_coef` adds the regulariser."""
    return jax.nn.relu(delta - margin)


@_loss(
    "-log s(beta (m - gamma_beta_ratio)), gamma_beta_ratio = gamma / beta",
    "Meng et al. 2024, eq. 6",
    score=("logp", "mean"), scale="beta", beta=2.0, gamma_beta_ratio=0.5,
)  # fmt: skip
def simpo(*, margin: Array, beta: float, gamma_beta_ratio: float) -> jax.Array:
    """SimPO, f32[B], without reference: mean log-probs must differ by the target margin gamma / beta."""
    return -jax.nn.log_sigmoid(beta * (margin - gamma_beta_ratio))


@_loss(
    "-log s(beta m)",
    "Lambert et al. 2024 (Tulu 3), length-normalised DPO",
    score=("ratio", "mean"), scale="beta", beta=5.0,
)  # fmt: skip
def dpo_norm(*, margin: Array, beta: float) -> jax.Array:
    """DPO on log-ratios averaged over tokens, f32[B]; elsewhere called `sigmoid_norm`. Its beta is per token."""
    return -jax.nn.log_sigmoid(beta * margin)


def log_odds(*, mean_logp: Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(mean_logp), f32[B]; cut where p is within 1e-6 of 1.

    Source: Hong et al. 2024 (ORPO), eq. 4, with the length-normalised likelihood of its eq. 3.
    """
    logp = at_most(mean_logp, MAX_ODDS_LOGP)
    # Of the two ways to write log(1 - e^x) each is exact on its own side of -log 2; both are finite on either.
    log_complement = jnp.where(logp < -math.log(2.0), jnp.log1p(-jnp.exp(logp)), jnp.log(-jnp.expm1(logp)))
    return logp - log_complement


@_loss(
    "-beta log s(log_odds(c) - log_odds(l)) + nll_coef * NLL(chosen) / token",
    "Hong et al. 2024, eqs. 6 and 7; beta is the paper's lambda",
    score=("logp", "mean"), scale="beta", beta=0.1, nll_coef=1.0,
)  # fmt: skip
def orpo(*, chosen: Array, rejected: Array, beta: float) -> jax.Array:
    """The odds-ratio term of ORPO, f32[B], without reference; `nll_coef` adds the SFT term."""
    return -beta * jax.nn.log_sigmoid(log_odds(mean_logp=chosen) - log_odds(mean_logp=rejected))


@_loss(
    "1 - s(beta c) + s(beta l)",
    "D'Oosterlinck et al. 2024, eq. 7",
    score=("ratio", "sum"), scale="beta", beta=0.1,
)  # fmt: skip
def apo_zero(*, chosen: Array, rejected: Array, beta: float) -> jax.Array:
    """APO-zero, f32[B]: raise the chosen response and lower the rejected one, each against the reference."""
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@_loss(
    "s(beta c) + 1 - s(beta (c - l))",
    "D'Oosterlinck et al. 2024, eq. 8",
    score=("ratio", "sum"), scale="beta", beta=0.1,
)  # fmt: skip
def apo_down(*, chosen: Array, rejected: Array, beta: float) -> jax.Array:
    """APO-down, f32[B]: lower the chosen response, and the rejected one more; for data worse than the policy."""
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def nll(*, chosen_mean_logp: Array) -> Array:
    """The anchor that any loss can add, f32[B]: negative log-likelihood per token of the chosen response."""
    return -chosen_mean_logp


# Names users bring from elsewhere. They are refused with the name used here rather than accepted, so that a saved
# config has one name for one loss.
NAME_HINTS = {
    "sigmoid": "dpo",
    "cdpo": "dpo with label_smoothing > 0",
    "rdpo": "robust",
    "hinge": "slic",
    "slic-hf": "slic_hf",
    "sigmoid_norm": "dpo_norm",
}
FIELD_HINTS = {
    ("ipo", "beta"): "the regulariser of ipo is tau (TRL's beta)",
    ("slic_hf", "beta"): "the hinge of slic_hf is at delta and has no beta; slic has one",
}


@dataclasses.dataclass(frozen=True)
class ResolvedLoss:
    """A loss with all its hyper-parameters, hashable (so it may be a static argument of a jitted step)."""

    name: str
    hyper: tuple[tuple[str, float | str], ...]

    @property
    def spec(self) -> LossSpec:
        return LOSSES[self.name]

    @property
    def uses_reference(self) -> bool:
        return self.spec.uses_reference

    @property
    def logp(self) -> str:
        """`sum` or `mean`: how token log-probs become the score."""
        return str(dict(self.hyper).get("logp_reduction", self.spec.logp))

    @property
    def scale(self) -> float:
        """reward = scale * score."""
        return 1.0 if self.spec.scale is None else float(dict(self.hyper)[self.spec.scale])

    def as_dict(self) -> dict[str, float | str]:
        """Name and resolved values, to print and to save."""
        return {"name": self.name, **dict(self.hyper)}

    def __str__(self) -> str:
        return f"{self.name}(" + ", ".join(f"{key}={value}" for key, value in self.hyper) + ")"

    def score(self, logp: Array, length: Array, ref_logp: Array | None = None) -> Array:
        """Implicit reward before its scale, f32[B]; numpy in, numpy out.

        Args:
            logp: f32[B] summed log-prob under the policy.
            length: f32[B] or i32[B] scored tokens; where 0 the sum stands for the mean.
            ref_logp: f32[B] summed log-prob under the reference; not read by a loss without one.
        """
        value = logp.astype(np.float32)
        if self.uses_reference:
            if ref_logp is None:
                raise ValueError(f"the implicit reward of loss {self.name!r} needs reference log-probs; got None")
            value = value - ref_logp.astype(np.float32)
        return _mean(value, length) if self.logp == "mean" else value

    def reward(self, logp: Array, length: Array, ref_logp: Array | None = None) -> Array:
        """Implicit reward f32[B]: `scale` times `score`, with the same arguments."""
        return self.scale * self.score(logp, length, ref_logp)

    def margin(self, inputs: PairInputs) -> Array:
        """Implicit reward margin in SeRA's sense, f32[B]: reward difference / scale."""
        chosen, rejected = self._scores(inputs)
        return chosen - rejected

    def loss(self, inputs: PairInputs) -> jax.Array:
        """Loss of each pair, f32[B], with the NLL anchor; finite where a length is 0."""
        chosen, rejected = self._scores(inputs)
        available = {"margin": chosen - rejected, "chosen": chosen, "rejected": rejected}
        arrays = {name: available[name] for name in self.spec.takes}
        numbers = {key: value for key, value in self.hyper if key not in ("nll_coef", "logp_reduction")}
        out = self.spec.fn(**arrays, **numbers)
        nll_coef = float(dict(self.hyper)["nll_coef"])
        if nll_coef:
            mean_logp = _mean(inputs.chosen_logp.astype(np.float32), inputs.chosen_length)
            out = out + nll_coef * nll(chosen_mean_logp=mean_logp)
        return out

    def _scores(self, inputs: PairInputs) -> tuple[Array, Array]:
        return (
            self.score(inputs.chosen_logp, inputs.chosen_length, inputs.ref_chosen_logp),
            self.score(inputs.rejected_logp, inputs.rejected_length, inputs.ref_rejected_logp),
        )


def _mean(total: Array, length: Array) -> Array:
    """Sum over tokens -> mean over tokens; the sum itself where there are none."""
    length = length.astype(np.float32)
    return total / (length + (length == 0))


def resolve(name: str, **values: float | str | None) -> ResolvedLoss:
    """The loss `name` with its unset (None) hyper-parameters at the loss's own defaults.

    Raises:
        ValueError: an unknown name, a value that the loss does not read, or one out of range.
    """
    if name not in LOSSES:
        hint = f"; here it is {NAME_HINTS[name]!r}" if name in NAME_HINTS else ""
        raise ValueError(f"unknown loss {name!r}{hint}; choices: {', '.join(sorted(LOSSES))}")
    spec = LOSSES[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if key not in spec.hyper:
            hint = f" ({FIELD_HINTS[name, key]})" if (name, key) in FIELD_HINTS else ""
            raise ValueError(
                f"loss {name!r} does not read {key}={value!r}{hint}; it reads {', '.join(spec.hyper)}; "
                f"leave {key} unset"
            )
    hyper = tuple((key, _checked(name, key, given.get(key, default))) for key, default in spec.hyper.items())
    return ResolvedLoss(name, hyper)


_POSITIVE = (lambda x: x > 0, "> 0")
_NON_NEGATIVE = (lambda x: x >= 0, ">= 0")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": _POSITIVE,
    "tau": _POSITIVE,
    "delta": _POSITIVE,
    "gamma_beta_ratio": _NON_NEGATIVE,
    "label_smoothing": (lambda x: 0 <= x < 0.5, "in [0, 0.5): at 0.5 the labels say nothing"),
    "nll_coef": _NON_NEGATIVE,
}


def _checked(name: str, key: str, value: float | str) -> float | str:
    if key == "logp_reduction":
        if value not in REDUCTIONS:
            raise ValueError(f"loss {name!r}: {key} is {value!r}; choices: {', '.join(REDUCTIONS)}")
        return value
    inside, text = _RANGES[key]
    if isinstance(value, bool | str) or not math.isfinite(value) or not inside(value):
        raise ValueError(f"loss {name!r}: {key} is {value!r}; it must be a finite number {text}")
    return float(value)
