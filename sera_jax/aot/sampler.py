"""The programs of the sampler, each on the shapes that the one before it returns: prepare, prefill, insert, decode.

All that is known of the sampler's interface ahead of time stands here, as `sampling.engine` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sera_jax.aot import flops
from sera_jax.aot.programs import NOTHING, Beside, Made, Program
from sera_jax.loops.runtime import Runtime
from sera_jax.mesh import replicated
from sera_jax.models.decoder import Params
from sera_jax.sampling import SamplingParams
from sera_jax.sampling.decode import Placing, programs
from sera_jax.sampling.engine import COLUMN_STEP, PREFILL_TOKENS, cache_columns

LEVERS = ("sampling.slots",)


class Use(NamedTuple):
    """What is sampled for: in `phases` phases of the run, `answers` answers to so many prompts in each.

    Attributes:
        name: of what; how: it is drawn.
    """

    name: str
    how: SamplingParams
    prompts: float
    answers: float
    phases: float


def sampler(
    run: Runtime, uses: Sequence[Use], *, slots: int, longest: int, params: Params, beside: Beside = NOTHING
) -> list[Program]:
    """Of sampling by `params`, which stay in memory, beside all else that does.

    Args:
        uses: of the same `max_new_tokens`, so that one cache serves all; a decoder is compiled for each way to draw.
        slots, longest: as `sampling.generate` takes them; `longest` tokens has the longest prompt.
    """
    mesh, cfg, whole, name, sampling = run.mesh, run.cfg, replicated(run.mesh), uses[0].name, uses[0].how
    made_of = programs(cfg, sampling, mesh, slots)
    prompt_columns = -(-max(longest - 1, 1) // COLUMN_STEP) * COLUMN_STEP
    columns = cache_columns(longest, sampling.max_new_tokens)
    block = max(1, min(slots, PREFILL_TOKENS // prompt_columns))
    wake = max(1, slots // 8)

    def host(shape: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=whole)

    words = (jnp.uint32, jnp.uint32)
    placing = Placing(
        *(host((wake,)) for _ in range(4)), *(host((wake, *more), kind) for more, kind in zip(((2,), ()), words))
    )
    key = host(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape, jnp.uint32)
    names = {part: f"{name}: {part}" for part in ("prepare", "empty cache", "prefill", "insert")}

    def also(*parts: str) -> Any:
        """What lies beside a program: `parts` of what the sampler holds."""

        def of(made: Made) -> Mapping[str, Any]:
            own = {
                "parameters": params,
                "decoder's weights": made.get(names["prepare"]),
                "cache": made.get(names["empty cache"]),
                "prefilled": made.get(names["prefill"]),
            }
            return {**beside, **{part: own[part] for part in parts}}

        return of

    def steps(of: Sequence[Use]) -> float:
        return sum(use.phases * max(use.answers / slots, 1) * sampling.max_new_tokens for use in of)

    phases = sum(use.phases for use in uses)
    decoders: dict[SamplingParams, list[Use]] = {}
    for use in uses:
        decoders.setdefault(use.how, []).append(use)
    answered = flops.Tokens(slots, slots * (longest + sampling.max_new_tokens / 2), slots)
    return [
        Program(names["prepare"], made_of.prepare, lambda made: (params,), phases, beside=also()),
        Program(
            names["empty cache"],
            made_of.empty,
            lambda made: (slots, columns),
            phases,
            beside=also("parameters", "decoder's weights"),
            levers=LEVERS,
        ),
        Program(
            names["prefill"],
            made_of.prefill,
            lambda made: (params, host((block, prompt_columns))),
            sum(use.phases * use.prompts for use in uses) / block,
            flops.forward(cfg, flops.of_prompts(block, prompt_columns)),
            beside=also("decoder's weights", "cache"),
            levers=LEVERS,
        ),
        Program(
            names["insert"],
            made_of.insert,
            lambda made: (made[names["empty cache"]], *made[names["prefill"]], key, placing),
            sum(use.phases * use.answers for use in uses) / wake,
            beside=also("parameters", "decoder's weights"),
            loops=True,
            levers=LEVERS,
        ),
        *(
            Program(
                f"{those[0].name}: decode",
                programs(cfg, how, mesh, slots).decode,
                lambda made: (made[names["prepare"]], made[names["empty cache"]], host(()), host(())),
                steps(those),
                flops.forward(cfg, answered),
                beside=also("parameters", "prefilled"),
                loops=True,
                levers=LEVERS,
            )
            for how, those in decoders.items()
        ),
    ]
