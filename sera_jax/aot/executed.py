"""Floating-point operations of the matmuls that a program does, read from what it was traced to: beside the useful ones
(`aot.flops`) they tell what is computed again for the backward pass, masked, or filling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, *, a_step: bool = False) -> float | None:
    """On all devices together; of branches the dearest counts, so that a kernel that skips what is masked counts as if
    it did not. None where matmuls stand in a loop that does not say how many trips it makes.

    Args:
        a_step: such a loop counts one trip, as of a decoder.
    """
    found = _total(jaxpr, 1.0 if a_step else math.nan)
    return None if math.isnan(found) else found


def _total(jaxpr: core.ClosedJaxpr | core.Jaxpr, unknown: float) -> float:
    """`unknown`: what a loop's trips are taken to be that does not say them."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of(equation, unknown) for equation in opened.eqns)


def _of(equation: core.JaxprEqn, unknown: float) -> float:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    parts = [_total(part, unknown) for part in _within(params)]
    if not any(parts):
        return 0.0
    if name == "cond":
        return math.nan if any(map(math.isnan, parts)) else max(parts)
    return _times(name, params, unknown) * sum(parts)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _times(name: str, params: dict[str, Any], unknown: float) -> float:
    """How often what stands within an equation is done."""
    if name == "while":
        return unknown
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # of the axes that it names it is written for one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _within(params: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    """What a call, a loop or a kernel does; nothing of how it would be differentiated, which are functions."""
    for value in jax.tree.leaves(params, is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            yield value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (core.ClosedJaxpr, core.Jaxpr))
