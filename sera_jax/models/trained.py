"""Which parameters a training moves: all, those whose paths match patterns, or adapters beside frozen kernels."""

from __future__ import annotations

import dataclasses

import jax

from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import HEAD
from sera_jax.models.decoder import Params, init_params
from sera_jax.models.lora import ADAPTERS, Lora, has_adapters, init_adapters
from sera_jax.models.parts import merge, nested, paths, split_layers


@dataclasses.dataclass(frozen=True)
class Trained:
    """What moves; the rest is frozen: it is held once, and is in no training state, checkpoint or trained policy.

    Attributes:
        patterns: regular expressions of whole paths, which may name the last layers (`parts.split_layers`); with
            neither them nor `lora`, everything moves.
        lora: the adapters that move in place of parameters of the model.
    """

    patterns: tuple[str, ...] = ()
    lora: Lora | None = None

    @property
    def whole(self) -> bool:
        """Whether everything moves."""
        return not self.patterns and self.lora is None

    def adapted(self, params: Params, key: jax.Array) -> Params:
        """The parameters, with fresh adapters where there should be some and are none; leaves are shared."""
        if self.lora is None or has_adapters(params):
            return params
        return merge(params, init_adapters(self.lora, params, key))

    def divide(self, params: Params) -> tuple[Params, Params]:
        """(what moves, what is frozen). A scalar head always moves."""
        if self.whole:
            return params, {}
        patterns = [ADAPTERS] if self.lora else self.patterns
        return split_layers(params, "|".join(f"(?:{pattern})" for pattern in [*patterns, HEAD]))

    def part(self, params: Params) -> Params:
        """What moves of a model of these parameters, with adapters where it has none yet: for shapes."""
        return self.divide(self.adapted(params, jax.random.key(0)))[0]


ALL = Trained()


def laid_over(part: Params, under: Params) -> Params:
    """`part`, and of `under` the leaves that it lacks; leaves are shared."""
    have = paths(part)
    return merge(part, nested({path: leaf for path, leaf in paths(under).items() if path not in have}))


def adapted_shapes(cfg: ModelConfig, trained: Trained) -> Params:
    """Shapes of a decoder's parameters, with adapters where `trained` has them."""
    return jax.eval_shape(lambda: trained.adapted(init_params(cfg, jax.random.key(0)), jax.random.key(0)))
