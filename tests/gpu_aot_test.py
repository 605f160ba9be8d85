"""Small programs compiled for H100s: counts by hand, a config's programs."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl.aot import hlo, programs, targets
from mtp_rl.models import attention
from tests import compile_for_test, moe_test

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec('jax_cuda13_plugin') is None,
        reason='needs the extra gpu-aot'),
    # A program of another machine's cannot be read back.
    pytest.mark.filterwarnings('ignore:Error reading persistent compilation')]
ROWS, INNER, OUT = 4096, 512, 1024


def _lower(f, *args, shape='1x1x1', specs=None):
  """Lower f for H100s; arrays or ShapeDtypeStructs, split as `specs` say."""
  mesh = jax.sharding.Mesh(np.array(targets.devices(f'h100:{shape}')), ('d',))
  flat, tree = jax.tree.flatten(args)
  specs = specs or [P()] * len(flat)
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
      mesh, spec)) for x, spec in zip(flat, specs, strict=True)]
  with jax.set_mesh(mesh):
    return jax.jit(f).lower(*tree.unflatten(placed))


def _array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_matmuls_in_loops_by_triton_and_by_cublas():
  layers = lambda x, w: jax.lax.scan(
      lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  lowered = _lower(layers, _array(ROWS, INNER), _array(5, INNER, INNER))
  for triton in (True, False):
    text = lowered.compile(compiler_options={
        'xla_gpu_enable_triton_gemm': triton}).as_text()
    assert ('__cublas$' in text) != triton
    assert hlo.summarise(text).flops == 5 * 2 * ROWS * INNER * INNER


def test_every_member_of_a_combined_collective_counts():
  """Two matmuls whose weights lie in eight parts, and their gradients."""
  def f(x, w, v):
    loss = lambda w, v: jnp.sum((jnp.tanh(x @ w) @ v).astype(jnp.float32) ** 2)
    return jax.tree.map(lambda g: jax.lax.with_sharding_constraint(
        g, P('d')), jax.grad(loss, (0, 1))(w, v))
  text = _lower(f, _array(ROWS, INNER), _array(INNER, OUT), _array(OUT, 256),
                shape='1x1x8', specs=[P('d')] * 3).compile().as_text()
  assert len(re.findall(r' all-gather-start\(', text)) == 1  # of both
  got = hlo.summarise(text)
  both = 2 * (INNER * OUT + OUT * 256)
  assert got.collectives == {'all-gather': both, 'reduce-scatter': both}
  assert got.flops == 2 * ROWS // 8 * (2 * INNER * OUT + 3 * OUT * 256)


def test_attention_by_cudnn():
  pytest.importorskip('nvidia.cudnn')
  b, t, h, c = 2, 256, 4, 128
  def loss(q, k, v, there):
    y = attention.attend(q, k, v, attention.full(there), 'cudnn')
    return jnp.sum(y.astype(jnp.float32) ** 2)
  text = _lower(jax.grad(loss, (0, 1, 2)), _array(b, t, h, c),
                _array(b, t, 2, c), _array(b, t, 2, c),
                _array(b, t, dtype=bool)).compile().as_text()
  assert hlo.summarise(text).flops == 2 * 7 * b * h * c * t * (t + 1) / 2


def test_experts_cost_the_tokens_routed():
  for experts in (4, 64):
    got, least = moe_test.flops_of_blocks(experts, True, _lower)
    assert least <= got <= 1.25 * least, (experts, got / least)


@pytest.fixture(scope='module', name='rows')
def _rows():
  pytest.importorskip('nvidia.cudnn')
  config = compile_for_test.small_config()
  return {row.name: row for row in programs.compile_all(
      config, 'h100:1x1x4', ['occ', 'decode'])}


def test_a_small_config_compiles_for_gpus(rows):
  target = targets.chip('h100:1x1x4')
  for name, row in rows.items():
    assert row.error is None, (name, row.error)
    assert programs.fits(row, target)
    assert 0 < row.arguments < row.peak
    json.dumps(programs.to_dict(row, target))


def test_flops_of_the_small_config(rows):
  compile_for_test.check_flops(rows['occ'])


def test_a_dense_update_has_the_flops_of_its_formula():
  pytest.importorskip('nvidia.cudnn')
  compile_for_test.check_dense_flops('h100:1x1x4', 2 + 5)


def test_no_array_of_tokens_times_vocabulary(rows):
  size, kind, where = rows['occ'].summary.vocabulary
  tokens = rows['occ'].tokens / 4
  assert size <= 4 * tokens * compile_for_test.V / 4, (kind, where)


@pytest.mark.parametrize('name, draft', [('rollout', 0), ('window', 2)])
def test_the_loop_of_decoding_copies_no_cache(name, draft):
  compile_for_test.check_copies('h100:1x1x4', name, draft)


def test_unknown_topologies_are_refused():
  with pytest.raises(config_lib.ConfigError, match='hosts x GPUs'):
    targets.chip('h99:1x1x8')
  with pytest.raises(config_lib.ConfigError, match='gpu-aot'):
    targets.devices('h100:eight')
