"""Attention by what is handed the mask: splash attention on TPUs, cuDNN's on NVIDIA GPUs, `ops.tiles` on a CPU.

All are told who sees whom by the mask itself, bool[R, T, T] of `ops.attention.visible`: ids of segments alone cannot
say that the branches of an item see its prompt and not each other. They leave out whole blocks of keys that no query of
a block sees (splash, tiles), or none (cuDNN). The compiler cannot split what they do, so each device is handed its own
rows and heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sera_jax.mesh import ROW_AXES, row_shards
from sera_jax.ops.attention import KEPT, Attention, Places, visible

LANES = 128  # numbers that a TPU handles side by side: the least block of queries or keys
BLOCKS = (512, 256, LANES)  # of queries and of keys; the largest that divides the row


class Kernel(Protocol):
    """q [R, H, T, d], k and v [R, G, T, d], seen bool[R, T, T], where every query sees itself and padding no more than
    that -> [R, H, T, d]."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, /, *, scale: float, soft_cap: float | None
    ) -> jax.Array: ...


def of_kernel(kernel: Kernel, multiple: int) -> Attention:
    """`Attention` by a kernel that wants rows of a multiple of so many tokens."""

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        queries: Places,
        keys: Places,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
        longest_item: int | None = None,
    ) -> jax.Array:
        rows, _, length, depth = q.shape
        more = -length % multiple
        given = functools.partial(kernel, scale=depth**-0.5 if scale is None else scale, soft_cap=soft_cap)

        seen = visible(queries, keys, sliding_window=sliding_window) & (queries.segment > 0)[:, :, None]
        seen = jnp.pad(seen, ((0, 0), (0, more), (0, more))) | jnp.eye(length + more, dtype=bool)
        seen = jnp.broadcast_to(seen, (rows, *seen.shape[1:]))
        if more:
            q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
        return _on_each_device(given, q, k, v, seen)[:, :, :length]

    return attend


def _on_each_device(
    kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
) -> jax.Array:
    """The kernel on each device's own rows and heads; where the mesh does not divide them, on all."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, seen)
    rows = ROW_AXES if q.shape[0] % row_shards(mesh) == 0 else None
    heads = P(rows, "tensor" if k.shape[1] % mesh.shape["tensor"] == 0 else None)
    own = jax.shard_map(kernel, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False)
    return own(q, k, v, seen)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention of rows of a multiple of `LANES` tokens, one row after the other.

    Args:
        interpret: compute what the kernel would, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    block = next(size for size in BLOCKS if q.shape[2] % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{name}": block for name in names})

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        attend = kernels.make_splash_mha(
            mask=seen[None],  # of all heads
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
        # made an array with all else of the mask, and yet asked for in Python, where under jit it has no value
        attend.fwd_mask_info = attend.fwd_mask_info._replace(is_dynamic_mask=True)
        return attend(q, k, v)

    q = (q * scale).astype(q.dtype)
    if q.shape[0] == 1:
        return of_row(q[0], k[0], v[0], seen[0])[None]
    return jax.lax.map(lambda row: of_row(*row), (q, k, v, seen))


def dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """`jax.nn.dot_product_attention`, without a soft cap, which it does not have."""
    assert soft_cap is None
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale, implementation=implementation)
    return mixed.swapaxes(1, 2)
