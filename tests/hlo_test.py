"""FLOPs, bytes and arrays of compiled programs, against hand counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl.aot import hlo

N, D, LAYERS = 8, 16, 5


def _summary(f, *args, **options):
  return hlo.summarise(jax.jit(f).lower(*args).compile().as_text(), **options)


def _layers(x, weights):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_runs():
  x, w = jnp.ones((N, D)), jnp.ones((LAYERS, D, D))
  forward = 2 * N * D * D * LAYERS
  assert _summary(_layers, x, w).flops == forward
  # The backward pass has two matmuls for each of the forward pass.
  loss = lambda x, w: jnp.sum(_layers(x, w))
  assert _summary(jax.grad(loss, argnums=(0, 1)), x, w).flops == 3 * forward
  # A loop in a loop.
  twice = lambda x, w: jax.lax.fori_loop(0, 3, lambda _, y: _layers(y, w), x)
  assert _summary(twice, x, w).flops == 3 * forward


def test_of_a_conditional_the_dearest_branch_counts():
  x, w = jnp.ones((N, D)), jnp.ones((LAYERS, D, D))
  branches = [lambda x: x, lambda x: _layers(x, w[:3]),
              lambda x: _layers(x, w), lambda x: x @ w[0]]
  f = lambda i, x: jax.lax.switch(i, branches, x) @ w[0]
  got = _summary(f, jnp.int32(1), x)
  assert got.flops == 2 * N * D * D * (LAYERS + 1)


def test_batched_matmuls():
  a, b = jnp.ones((3, N, D)), jnp.ones((3, D, 7))
  assert _summary(jnp.matmul, a, b).flops == 2 * 3 * N * D * 7


# A matmul [2 * 512, 512] x [512, 4 * 128] and a batched one, as TPU has them.
_TPU = '''HloModule m

%fused.1 (p.1: bf16[2,512,512,1], p.2: bf16[4,128,512,1]) -> bf16[2] {
  %p.1 = bf16[2,512,512,1]{2,1,0,3:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[4,128,512,1]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c.1 = bf16[2,512,4,128]{3,1,2,0:T(8,128)(2,1)} convolution(%p.1,\\
      %p.2), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1},\\
      dim_labels=0bf1_1oi0->0b1f, metadata={op_name="jit(f)/a"}
}

ENTRY %main (q.1: bf16[2,512,512,1], q.3: f32[64,9,32]) -> (f32[64,9,5]) {
  %q.1 = bf16[2,512,512,1]{2,1,0,3:T(8,128)(2,1)} parameter(0)
  %q.2 = bf16[4,128,512,1]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %q.3 = f32[64,9,32]{2,1,0} parameter(2)
  %q.4 = f32[64,32,5]{2,1,0} parameter(3)
  %f.1 = bf16[2,512,4,128]{3,1,2,0:T(8,128)(2,1)} fusion(%q.1, %q.2),\\
      kind=kOutput, calls=%fused.1, metadata={op_name="jit(f)/b"}
  %c.2 = f32[64,9,5]{2,1,0} convolution(%q.3, %q.4),\\
      window={size=64 stride=63 lhs_dilate=64}, dim_labels=0bf_0io->0bf,\\
      metadata={op_name="jit(f)/c"}
  ROOT %t = (bf16[2,512,4,128]{3,1,2,0}, f32[64,9,5]{2,1,0}) tuple(%f.1, %c.2)
}
'''.replace('\\\n     ', '')


def test_matmuls_that_a_tpu_writes_as_convolutions():
  got = hlo.summarise(_TPU, {9})
  assert got.flops == 2 * 1024 * 512 * 512 + 2 * 64 * 9 * 32 * 5
  assert got.largest == (2 * 2 * 512 * 4 * 128, 'bf16[2,512,4,128]', 'jit(f)/b')
  assert got.vocabulary == (4 * 64 * 9 * 5, 'f32[64,9,5]', 'jit(f)/c')
  assert hlo.summarise(_TPU, {9}, {(5, 9, 64)}).vocabulary is None


@pytest.mark.parametrize('kind, bytes_', [
    ('all-gather', 4 * N * D), ('all-reduce', 4 * N * D),
    ('reduce-scatter', 4 * 8 * N * D)])
def test_bytes_of_collectives(kind, bytes_):
  mesh = sharding.make_mesh(config_lib.Mesh(data=8))
  rows = NamedSharding(mesh, P('data'))
  x = jax.device_put(jnp.ones((N, D)), rows)
  with jax.set_mesh(mesh):
    f = {'all-gather': lambda x: jax.lax.with_sharding_constraint(x, P()),
         'all-reduce': lambda x: jax.shard_map(
             lambda y: jax.lax.psum(jnp.tile(y, (N, 1)), 'data'),
             in_specs=P('data'), out_specs=P())(x),
         'reduce-scatter': lambda x: jax.shard_map(
             lambda y: jax.lax.psum_scatter(
                 jnp.tile(y, (8 * N, 1)), 'data', tiled=True),
             in_specs=P('data'), out_specs=P('data'))(x)}[kind]
    got = _summary(f, x)
  assert got.collectives == {kind: bytes_}
