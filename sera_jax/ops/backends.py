"""The attention back ends by name, what each wants, and the choice among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sera_jax.ops.attention import Attention, Places, blocked_attention
from sera_jax.ops.kernels import LANES, dot_product, of_kernel, splash
from sera_jax.ops.tiles import TILE, tiled

LONGEST = 16384  # tokens of a row whose mask a kernel is given: 2 GiB with its copies
SHORT = 128  # tokens of a row up to which a CPU takes `xla`: most of a short run is not attention, and it has no loops
_DEEPEST = 128  # dimensions of a head, of cuDNN on every GPU that computes in bfloat16


class Asked(NamedTuple):
    """What a back end is asked for.

    Attributes:
        devices: `tpu`, `cuda`, or the platform's name in JAX.
        dtype: of the matmuls. depth: dimensions of a head. tokens: of a row.
        soft_cap: of the scores; None: there is none.
    """

    devices: str
    dtype: str
    depth: int
    tokens: int
    soft_cap: float | None = None


class BackEnd(NamedTuple):
    """attend: what it computes. devices: the only ones that it runs on; "": any. lacks: why it cannot do what is asked,
    and the way out; "": it can."""

    attend: Attention
    devices: str = ""
    lacks: Callable[[Asked], str] = lambda asked: ""


def _rows_too_long(asked: Asked) -> str:
    if asked.tokens <= LONGEST:
        return ""
    return f"is given a mask of every two tokens, and rows of {asked.tokens} are above {LONGEST}: lower data.row_tokens"


def _beyond_splash(asked: Asked) -> str:
    if asked.dtype == "float16":
        return "computes in float32 or bfloat16, not in float16: set model.dtype"
    return _rows_too_long(asked)


def _beyond_cudnn(asked: Asked) -> str:
    if asked.soft_cap is not None:
        return f"has no soft cap of scores, and this model's is {asked.soft_cap}"
    if asked.dtype == "float32":
        return "computes in bfloat16, not in float32: set model.dtype=bfloat16"
    if asked.depth % 8 or asked.depth > _DEEPEST:
        return f"takes heads of 8, 16, ... {_DEEPEST} dimensions, and this model's have {asked.depth}"
    return _rows_too_long(asked)


ATTENTION: dict[str, BackEnd] = {
    "xla": BackEnd(blocked_attention),
    "xla_loop": BackEnd(functools.partial(blocked_attention, one_loop=True)),
    "xla_tiles": BackEnd(of_kernel(tiled, TILE), lacks=_rows_too_long),
    "splash": BackEnd(of_kernel(splash, LANES), "tpu", _beyond_splash),
    "cudnn": BackEnd(of_kernel(dot_product, 2), "cuda", _beyond_cudnn),
}
AUTO = "auto"
_KERNELS = {back_end.devices: name for name, back_end in ATTENTION.items() if back_end.devices}


def devices(mesh: Mesh | AbstractMesh | None = None) -> str:
    """What `Asked` calls the devices of a mesh; of none, those of the mesh that is set, or JAX's own."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    device = (None if abstract.empty else abstract.abstract_device) or jax.devices()[0]
    return "cuda" if device.platform == "gpu" and device.device_kind.startswith("NVIDIA") else device.platform


def choose(name: str, asked: Asked) -> tuple[str, str]:
    """The back end that a name stands for, and, of `auto`, why it is not the kernel of these devices; "" where it is,
    and where they have none.

    Raises:
        ValueError: there is no such back end, or it cannot do what is asked; with the way out.
    """
    if name != AUTO:
        if name not in ATTENTION:
            known = ", ".join((AUTO, *ATTENTION))
            raise ValueError(f"attn_implementation={name!r} is unknown; choose one of {known}")
        if why := _why_not(name, asked):
            raise ValueError(f"attn_implementation={name!r} {why}; or choose {AUTO} or xla_loop")
        return name, ""
    kernel = _KERNELS.get(asked.devices)
    if asked.devices == "cpu":
        return "xla_tiles" if asked.tokens > SHORT and not _why_not("xla_tiles", asked) else "xla", ""
    if kernel is None:
        return "xla_loop", ""
    why = _why_not(kernel, asked)
    return ("xla_loop", f"{kernel} {why}") if why else (kernel, "")


def error_of(name: str, asked: Asked) -> float:
    """How far a back end's values and gradients lie from those of plain XLA on the devices of the mesh that is set, as
    a share of their norm: of a row of two items, one of which has two answers to its prompt, and padding."""
    parts = np.array([(1, 0, 300), (1, 1, 200), (1, 2, 200), (2, 0, 100), (2, 1, 150), (0, 0, 74)])
    segment, branch = (np.repeat(column, parts[:, 2])[None].astype(np.int32) for column in parts.T[:2])
    at = Places.in_rows(segment, branch, np.arange(segment.size, dtype=np.int32)[None])
    rng, shape = np.random.default_rng(0), (1, 2, segment.size, asked.depth)
    heads = [rng.standard_normal(shape).astype(jnp.dtype(asked.dtype))[:, :count] for count in (2, 1, 1)]

    def mixed(attend: Attention) -> list[jax.Array]:
        def total(heads: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            q, k, v = heads
            out = attend(q, k, v, at, at, soft_cap=asked.soft_cap).astype(jnp.float32)
            out = jnp.where(segment[0, :, None] > 0, out, 0.0)
            return jnp.sum(out**2), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(heads)
        return [x.astype(jnp.float32) for x in (out, *grads)]

    @jax.jit
    def error(heads: list[jax.Array]) -> jax.Array:
        plain = mixed(ATTENTION["xla_loop"].attend)
        apart = [jnp.linalg.norm(x - y) / jnp.linalg.norm(y) for x, y in zip(mixed(ATTENTION[name].attend), plain)]
        return jnp.max(jnp.stack(apart))

    return float(error(heads))


def anywhere(name: str) -> str:
    """The same back end where it runs on any devices, else `auto`."""
    return AUTO if name in ATTENTION and ATTENTION[name].devices else name


def _why_not(name: str, asked: Asked) -> str:
    back_end = ATTENTION[name]
    if back_end.devices not in ("", asked.devices):
        return f"runs on {back_end.devices} devices, and these are {asked.devices}"
    return back_end.lacks(asked)
