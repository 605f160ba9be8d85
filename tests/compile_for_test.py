"""Small programs compiled for a TPU slice: what breaks that breaks here."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl.aot import hlo, programs, targets
from tests import conftest

TOPOLOGY, V = 'v5p:2x2x1', 1664
GIB = 2 ** 30


def small_config(**sections):
  """Two layers of the sizes that the kernels take, bfloat16."""
  return conftest.tiny_config(
      model=dict(d_model=256, n_heads=2, n_kv_heads=2, head_dim=128, d_ff=384,
                 vocab_size=V, dtype='bfloat16', tie_embeddings=False,
                 remat='attention', head_chunk=32),
      rollout=dict(max_prompt=128, max_response=128, tensor=2),
      mesh=dict(fsdp=4), **sections)


@pytest.fixture(scope='module', name='rows')
def _rows():
  pytest.importorskip('libtpu')
  config = small_config()
  return {row.name: row for row in programs.compile_all(
      config, TOPOLOGY, ['occ', 'score', 'decode', 'reshard'])}


def test_a_small_config_compiles_for_a_tpu(rows):
  for name, row in rows.items():
    assert row.error is None, (name, row.error)
    assert programs.fits(row, targets.chip(TOPOLOGY))
    assert 0 < row.arguments < row.peak
    json.dumps(programs.to_dict(row, targets.chip(TOPOLOGY)))


def check_flops(row):
  """Weights x tokens x 6, one more pass recomputed; attention and head."""
  config = small_config()
  tokens = row.tokens / 4
  kernels = 3 * (4 * 256 * 256 + 3 * 256 * 384) + 512 * 256  # 2 blocks, MTP's
  head = 2 * 256 * V * config.rollout.max_response / 256
  least = 6 * tokens * (kernels + head)
  assert least < row.summary.flops < 2 * least


def test_flops_are_those_of_the_matmuls(rows):
  check_flops(rows['occ'])


def check_dense_flops(topology, products):
  """An update without recomputation has the FLOPs of its formula within 1 %.

  Args:
    topology: four devices.
    products: matmuls T x T of the attention kernel, forward and backward.
  """
  config = small_config(mtp=dict(regime='rl_only', modules=0))
  config.model.remat, config.model.head_chunk = 'none', 0
  row, = programs.compile_all(config, topology, ['rl_only'])
  assert row.error is None, row.error
  t, scored = 256, config.rollout.max_response
  rows = row.tokens / t / 4
  kernels = 2 * (4 * 256 * 256 + 3 * 256 * 384)
  attention = 2 * products * 2 * t * (t + 1) / 2 * 256
  want = rows * (6 * (t * kernels + scored * 256 * V) + attention)
  assert abs(row.summary.flops / want - 1) < .01, row.summary.flops / want


def test_a_dense_update_has_the_flops_of_its_formula():
  pytest.importorskip('libtpu')
  check_dense_flops(TOPOLOGY, 2 + 7)


def test_no_array_of_tokens_times_vocabulary_for_a_tpu(rows):
  size, kind, where = rows['occ'].summary.vocabulary
  tokens = rows['occ'].tokens / 4
  assert size <= 4 * tokens * V / 4, (kind, where)


def test_whole_logits_are_found_where_the_vocabulary_is_split():
  pytest.importorskip('libtpu')
  config = small_config()
  config.mesh.fsdp, config.mesh.tensor, config.rollout.tensor = 2, 2, 0
  config.model.head_chunk = 0
  row, = programs.compile_all(config, TOPOLOGY, ['rl_only'])
  size, kind, _ = row.summary.vocabulary
  rows = row.tokens // 256 // 2  # on a chip
  assert str(V // 2) in kind and size >= 2 * rows * 128 * V / 2


def test_the_state_beside_a_program_counts(rows):
  config = small_config()
  moments = 3 * 4 * sum(
      n for n in [2 * V * 256, 3 * (4 * 256 * 256 + 3 * 256 * 384), 512 * 256])
  assert rows['occ'].beside == 0 < rows['score'].beside < moments / 4
  assert moments / 4 < rows['decode'].beside < 1.1 * moments / 4
  assert config.rl.kl_coef == 0


def test_all_names_are_checked_before_the_first_is_compiled():
  config = small_config(mtp=dict(regime='occ'), occ=dict(estimator='readout'))
  assert programs.resolve('occ', config).occ.estimator == 'readout'
  assert programs.resolve('detach', config).occ.estimator == 'logprob'
  with pytest.raises(config_lib.ConfigError, match="'ooc' is unknown"):
    programs.resolve('ooc', config)
  with pytest.raises(config_lib.ConfigError, match='choose a regime'):
    programs.resolve('prefill:exact', config)
  config.rollout.tensor = 0
  for name in ('reshard', 'window', 'hold'):
    with pytest.raises(config_lib.ConfigError, match='leave the program out'):
      programs.resolve(name, config)


def test_a_packed_update_reads_segments():
  config = small_config(rl=dict(pack=True))
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=4))
  batch = programs._batch(config, mesh)
  assert batch.segments.dtype == jnp.int32
  assert batch.valid.dtype == jnp.bool_
  assert batch.segments.shape == batch.valid.shape == batch.tokens.shape
  rows = config.rl.prompts // config.rl.minibatches * config.rl.group
  assert batch.mask.shape == batch.tokens.shape == (rows, 256)


def test_a_decoding_step_gathers_no_parameters(rows):
  moved = rows['decode'].summary.collectives
  weights = 2 * 2 * (4 * 256 * 256 + 3 * 256 * 384)
  assert moved.get('all-gather', 0) < weights / 4


def copies_in_loops(text, dims):
  """Return copies of arrays [n, *dims], any n, in the bodies of loops."""
  computations, _ = hlo.parse(text)
  inside = [name for instructions in computations.values()
            for i in instructions for role, name in hlo.called(i)
            if role == 'body']
  assert inside
  for name in inside:
    inside += {other for i in computations[name] for _, other in hlo.called(i)
               if other not in inside}
  return [i for name in inside for i in computations[name]
          if i.opcode in ('copy', 'copy-start')
          and any(shape[1:] == dims for _, shape in hlo.shapes(i.type))]


def check_copies(topology, name, draft):
  """Compile a part of the sampler with a large cache; it may not be copied."""
  config = small_config(rl=dict(prompts=256, group=16))
  config.rollout.slots, config.rollout.draft = 2048, draft
  mesh = sharding.make_mesh(config.mesh, targets.devices(topology))
  with jax.set_mesh(mesh):
    lowered, *_ = programs.program(name, config, mesh)
  text = lowered.compile(compiler_options=targets.options(topology)).as_text()
  rows = (config.rollout.slots if name == 'window'
          else config.rl.prompts * config.rl.group)
  # Rows are split over 2 devices, heads over 2.
  dims = rows // 2, 1, 256 + (8 if draft else 0), 128
  assert f'bf16[2,{",".join(map(str, dims))}]' in text
  assert not copies_in_loops(text, dims)
  if name == 'window' and topology == TOPOLOGY:  # nor on the way in or out
    shape = ','.join(map(str, dims))
    assert not re.search(rf'= bf16\[2,{shape}\]\S* copy', text)


@pytest.mark.parametrize('name, draft', [
    ('rollout', 0), ('window', 0), ('window', 2)])
def test_the_loop_of_decoding_copies_no_cache(name, draft):
  """Else a step costs layers x cache."""
  pytest.importorskip('libtpu')
  check_copies(TOPOLOGY, name, draft)


def test_a_copy_in_a_loop_is_seen():
  before = lambda i, pair: (pair[0].at[i % 2, i].set(1.), pair[0])
  text = jax.jit(lambda c: jax.lax.fori_loop(0, 9, before, (c, c))).lower(
      jnp.ones((2, 64, 128))).compile().as_text()
  assert copies_in_loops(text, (64, 128))
  assert not copies_in_loops(text, (64, 64))


def test_unknown_slices_and_unset_vocabularies_are_refused():
  with pytest.raises(config_lib.ConfigError, match='no known chip'):
    targets.chip('v99:2x2')
  config = small_config()
  config.model.vocab_size = 0
  with pytest.raises(config_lib.ConfigError, match='set model.vocab_size'):
    next(programs.compile_all(config, TOPOLOGY, ['occ']))


def test_a_mesh_must_fill_the_slice():
  pytest.importorskip('libtpu')
  config = small_config()
  config.mesh.fsdp = 2
  with pytest.raises(config_lib.ConfigError, match='fsdp=4'):
    next(programs.compile_all(config, TOPOLOGY, ['occ']))
