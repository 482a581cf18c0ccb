"""The programs of the sampler, each on the shapes that the one before it returns: prepare, prefill, insert, decode.

All that is known of the sampler's interface ahead of time stands here, as `sampling.engine` uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sera_jax.aot import flops
from sera_jax.aot.programs import NOTHING, Beside, Made, Program
from sera_jax.loops.runtime import Runtime
from sera_jax.mesh import replicated
from sera_jax.models.decoder import Params
from sera_jax.sampling import SamplingParams
from sera_jax.sampling.decode import Placing, form_for, programs
from sera_jax.sampling.engine import block_rows, cache_columns, mesh_for, prompt_columns, slots_at_a_time

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
        slots, longest: as `sampling.generate` takes them (tokens of the longest prompt).
    """
    cfg, name, sampling = run.cfg, uses[0].name, uses[0].how
    mesh = mesh_for(cfg, run.mesh, run.decode_tensor)
    form = form_for(mesh.devices.flat)
    made_of = programs(cfg, sampling, mesh, slots, form)
    prompt, columns = prompt_columns(longest), cache_columns(longest, sampling.max_new_tokens)
    block, wake = block_rows(prompt, slots, mesh), slots_at_a_time(slots)

    def host(shape: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=replicated(mesh))

    names = {part: f"{name}: {part}" for part in ("prepare", "empty cache", "prefill", "insert")}

    def also(*parts: str) -> Any:
        """What lies beside a program: `parts` of what the sampler holds."""

        def of(made: Made) -> Mapping[str, Any]:
            own = {"parameters": params, "decoder's weights": made.get(names["prepare"])}
            own |= {"cache": made.get(names["empty cache"]), "prefilled": made.get(names["prefill"])}
            return {**beside, **{part: own[part] for part in parts}}

        return of

    phases = sum(use.phases for use in uses)
    answered = flops.Tokens(slots, slots * (longest + sampling.max_new_tokens / 2), slots)
    found = [
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
            lambda made: (made[names["prepare"]], host((block, prompt))),
            sum(use.phases * use.prompts for use in uses) / block,
            flops.forward(cfg, flops.of_prompts(block, prompt)),
            beside=also("parameters", "cache"),
            levers=LEVERS,
        ),
        Program(
            names["insert"],
            made_of.insert,
            lambda made: (made[names["empty cache"]], made[names["prefill"]], *_placing(host, wake)),
            sum(use.phases * use.answers for use in uses) / wake,
            beside=also("parameters", "decoder's weights"),
            loops=True,
            levers=LEVERS,
        ),
        *(
            Program(
                f"{those[0].name}: decode",
                programs(cfg, how, mesh, slots, form).decode,
                lambda made: (made[names["prepare"]], made[names["empty cache"]], host(()), host(())),
                sum(use.phases * max(use.answers / slots, 1) for use in those) * sampling.max_new_tokens,
                flops.forward(cfg, answered),
                beside=also("parameters", "prefilled"),
                loops=True,
                levers=LEVERS,
            )
            for how, those in _by_how(uses).items()
        ),
    ]
    return [dataclasses.replace(program, mesh=mesh) for program in found]


def _by_how(uses: Sequence[Use]) -> dict[SamplingParams, list[Use]]:
    return {how: [use for use in uses if use.how == how] for how in dict.fromkeys(use.how for use in uses)}


def _placing(host: Callable[..., Any], places: int) -> tuple[Any, Placing]:
    """The shapes of what `insert` is told: the data of a key, and what goes where."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return host(key.shape, key.dtype), Placing(
        *(host((places,)) for _ in range(4)),
        prompt_id=host((places, 2), jnp.uint32),
        sample=host((places,), jnp.uint32),
    )
