"""Operations of matmuls counted from what a program was traced to, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from sera_jax.aot.executed import matmul_flops

A, B = jnp.ones((4, 6)), jnp.ones((6, 6))
ONE = 2 * 4 * 6 * 6  # of A @ B


def counted(program, *arguments, **how) -> float | None:
    return matmul_flops(jax.jit(program).trace(*arguments).jaxpr, **how)


def endless(a, b):
    """A loop that does not say how many trips it makes."""
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ b, a)


def test_a_loop_counts_its_trips_and_batches_their_axes():
    assert counted(lambda a, b: a @ b, A, B) == ONE
    assert counted(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=5)[0], A, B) == 5 * ONE
    assert counted(lambda a, b: jax.lax.map(lambda x: x @ b, a[None].repeat(3, 0)), A, B) == 3 * ONE
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), A[None].repeat(7, 0), B[None].repeat(7, 0)) == 7 * ONE
    assert counted(lambda a: jnp.tanh(a) + 1, A) == 0


def test_a_loop_that_does_not_say_its_trips_is_not_known_and_counts_a_step_where_that_is_asked():
    assert counted(endless, A, B) is None
    assert counted(endless, A, B, a_step=True) == ONE
    assert counted(lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 9, jnp.tanh, a), A) == 0


def test_of_branches_the_dearest_counts():
    assert counted(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b, lambda: a @ b), A, B) == 2 * ONE

    for branches in ((endless, jnp.matmul), (jnp.matmul, endless)):
        assert counted(lambda a, b, of=branches: jax.lax.cond(a[0, 0] > 0, *of, a, b), A, B) is None


def test_what_is_computed_again_for_the_backward_pass_counts():
    def loss(wrap):
        return lambda a, b: jnp.sum(wrap(lambda x: jnp.tanh(jnp.tanh(x @ b) @ b))(a))

    # forward, and two gradients of each product
    assert counted(jax.value_and_grad(loss(lambda f: f), argnums=(0, 1)), A, B) == 6 * ONE
    assert counted(jax.value_and_grad(loss(jax.checkpoint), argnums=(0, 1)), A, B) == 8 * ONE


def test_what_is_written_for_one_device_counts_for_all():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for axes in ({"data"}, {"data", "fsdp"}):  # of axes that are not named, what stands within is for all
        split = P(tuple(sorted(axes)))
        specs = dict(in_specs=(split, P()), out_specs=split, axis_names=axes)
        assert counted(jax.shard_map(lambda a, b: a @ b, mesh=mesh, **specs), A, B) == ONE


def test_a_kernel_counts_its_grid():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def program(a, b):
        spec = pl.BlockSpec((2, 6), lambda i: (i, 0))
        whole = pl.BlockSpec((6, 6), lambda i: (0, 0))
        shape = jax.ShapeDtypeStruct(a.shape, a.dtype)
        return pl.pallas_call(kernel, shape, grid=(2,), in_specs=[spec, whole], out_specs=spec, interpret=True)(a, b)

    assert counted(program, A, B) == ONE
