"""Packed rows compute what rows of one sequence compute."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import forward, gradients, sharding, train_step, trainer
from mtp_rl.diagnose import measure
from mtp_rl.models import attention
from mtp_rl.objectives import logprobs, masked, policy
from mtp_rl.rollout import packing
from mtp_rl.run import metrics
from tests import batches, conftest

V, S, ROWS = batches.V, batches.S, batches.ROWS
T = batches.R + S


def _sources(batch):
  """For each packed response token, its row and column in [B, S]."""
  tags = np.arange(batch.mask.size, dtype=np.float32).reshape(batch.mask.shape)
  packed = packing.pack(batch._replace(reference=tags))
  return np.unravel_index(
      packed.reference[packed.mask].astype(int), batch.mask.shape)


def _assert_same_tokens(packed, unpacked, batch, where=None):
  """Compare [B', T, ..] with [B, S, ..] at every response token."""
  mask = packing.pack(batch).mask
  a, b = np.asarray(packed)[mask], np.asarray(unpacked)[_sources(batch)]
  if where is not None:
    keep = np.asarray(where)[_sources(batch)]
    a, b = a[keep], b[keep]
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(20))
def test_every_sequence_has_a_place_of_its_own(seed):
  rng = np.random.default_rng(seed)
  count, columns = rng.integers(1, 60), int(rng.integers(1, 40))
  lengths = rng.integers(1, columns + 1, count)
  rows, first, segments = packing.place(lengths, columns)
  taken = np.zeros((count, columns), int)
  for row, start, n in zip(rows, first, lengths):
    assert start + n <= columns
    taken[row, start:start + n] += 1
  assert taken.max() == 1 and taken.sum() == lengths.sum()
  for row in range(rows.max() + 1):  # in order from the left, from 1 on
    order = np.argsort(first[rows == row])
    np.testing.assert_array_equal(segments[rows == row][order],
                                  np.arange(1, len(order) + 1))
  # First fit: what two rows hold would not have gone into one.
  half = (taken.sum(1)[:rows.max() + 1] <= columns / 2).sum()
  assert half <= 1


@pytest.mark.parametrize('most, unit', [(1, 1), (16, 4), (24, 8), (100, 5),
                                        (256, 2)])
def test_few_numbers_of_rows_and_all_divide_over_the_devices(most, unit):
  most = -(-most // unit) * unit
  counts = [packing.row_count(n, most, unit) for n in range(1, most + 1)]
  assert all(n <= c <= most and c % unit == 0
             for n, c in zip(range(1, most + 1), counts))
  assert len(set(counts)) <= 8
  assert all(c - n < max(unit, most / 8 + unit)
             for n, c in zip(range(1, most + 1), counts))


def test_no_token_is_lost_or_changed():
  batch = batches.batch(2)
  packed = packing.pack(batch)
  rows, segments = packed.mask.shape[0], packed.segments
  assert rows < ROWS and packed.tokens.shape == (rows, T)
  assert packed.old_mtp.shape == (rows, T, 2)
  found = sorted((*packed.tokens[row, segments[row] == n],
                  -1, *packed.mask[row, segments[row] == n],
                  -1, *packed.old_main[row, segments[row] == n])
                 for row in range(rows) for n in range(1, T + 1)
                 if (segments[row] == n).any())
  wide = lambda x: np.pad(x, ((0, 0), (batches.R, 0)))
  expected = sorted((*batch.tokens[row, v], -1, *wide(batch.mask)[row, v], -1,
                     *(wide(batch.old_main)[row, v]))
                    for row, v in enumerate(batch.valid))
  assert len(found) == ROWS
  assert found == expected
  assert not packed.mask[segments == 0].any()
  assert packed.valid.dtype == bool and segments.dtype == np.int32
  np.testing.assert_array_equal(packed.valid, segments > 0)
  for new, old in zip(packed, packing.pack(batch, unit=ROWS)):
    assert len(old) == ROWS and new.dtype == old.dtype


_VARIANTS = {
    'sequential': {}, 'parallel': dict(mtp=dict(kind='parallel')),
    'microbatches': dict(rl=dict(microbatches=2)),
    'blocks': dict(model=dict(attention='blocks', head_chunk=5)),
    'experts': dict(model=dict(experts=4, experts_per_token=2, expert_ff=8))}


@functools.cache
def _scored(variant):
  """Scores of K = 2: of the rows as they are, and packed."""
  sections = dict(_VARIANTS[variant])
  config = batches.config(
      mtp=dict(modules=2, **sections.pop('mtp', {})), **sections)
  batch = batches.batch(2)
  params = batches.params(2)
  if variant in ('parallel', 'experts'):
    params = forward.init(config, jax.random.key(1))
  run = jax.jit(functools.partial(forward.score, config=config, entropy=True))
  packed = packing.pack(batch, 2)
  return run(params, batch.rows), run(params, packed.rows)


@pytest.mark.parametrize('variant', _VARIANTS)
def test_every_token_has_its_log_probs(variant):
  batch = batches.batch(2)
  plain, packed = _scored(variant)
  _assert_same_tokens(packed.main, plain.main, batch)
  _assert_same_tokens(packed.entropy, plain.entropy, batch)
  seen = np.asarray(logprobs.mtp_mask(batch.valid, S, 2))
  for k in range(2):
    _assert_same_tokens(packed.mtp[..., k], plain.mtp[..., k], batch,
                        seen[..., k])


def test_modules_predict_the_same_tokens():
  batch = batches.batch(2)
  packed = packing.pack(batch)
  seen = logprobs.mtp_mask(batch.valid, S, 2) & batch.mask[..., None]
  np.testing.assert_array_equal(seen, logprobs.mtp_mask(batch.valid, S, 2))
  got = logprobs.mtp_mask(packed.segments, T, 2) & packed.mask[..., None]
  assert got.sum() == seen.sum()
  _assert_same_tokens(got, seen, batch)


def test_what_stands_in_the_next_segment_reaches_no_prediction():
  """State i of module k sees column i + k, and where it counts no further."""
  modules = 3
  config = batches.config(mtp=dict(modules=modules))
  params = forward.init(config, jax.random.key(1))
  packed = packing.pack(batches.batch(1))
  first = packed.segments == 1
  tokens = np.where(first, packed.tokens, (packed.tokens + 1) % V)
  net = forward.network(config)
  run = jax.jit(lambda tokens: net.apply({'params': params}, tokens,
                                         packed.segments)[1])
  a, b = run(packed.tokens), run(tokens)
  mask = np.asarray(logprobs.mtp_mask(packed.segments, T, modules))
  for k in range(1, modules + 1):
    changed = np.any(np.asarray(a[k - 1]) != np.asarray(b[k - 1]), -1)
    ahead = np.pad(first, ((0, 0), (0, k)))[:, k:]  # column i + k is its own
    assert not changed[first & ahead].any()
    followed = (packed.segments == 2).any(1)
    assert changed[followed][(first & ~ahead)[followed]].all()
    read = np.pad(mask[..., k - 1], ((0, 0), (0, k + 1)))[:, k + 1:]
    assert (first & read).sum() > 10
    assert not (first & read & ~ahead).any()


@pytest.mark.parametrize('how', masked.AGGREGATIONS)
def test_aggregations_are_per_sequence(how):
  batch = batches.batch(1)  # one row has no response
  packed = packing.pack(batch)
  np.testing.assert_allclose(
      masked.aggregate(packed.sampler, packed.mask, how,
                       masked.Sequences(packed.segments, S)),
      masked.aggregate(batch.sampler, batch.mask, how), rtol=1e-6)


def test_a_packed_row_does_not_say_how_long_a_response_may_be():
  packed = packing.pack(batches.batch(1))
  with pytest.raises(ValueError, match='max_response'):
    masked.aggregate(packed.sampler, packed.mask, 'seq-mean-token-sum-norm',
                     masked.Sequences(packed.segments))


@pytest.mark.parametrize('preset', ['dapo', 'gspo', 'cispo', 'grpo', 'dr_grpo'])
def test_losses_and_their_gradients(preset):
  config = config_lib.preset(batches.config(), preset)
  config.rl.entropy_coef, config.rl.kl_coef, config.rl.tis_cap = .1, .05, 1.1
  batch = batches.batch(1)
  packed = packing.pack(batch)
  def run(batch):
    f = lambda x: policy.rl_loss(x, x ** 2, batch, config.rl, S)
    return jax.value_and_grad(f, has_aux=True)(jnp.asarray(batch.sampler))
  (loss, seen), grad = run(batch)
  (packed_loss, packed_seen), packed_grad = run(packed)
  np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
  batches.assert_close(packed_seen, seen, rtol=1e-5)
  _assert_same_tokens(packed_grad, grad, batch)
  assert np.abs(grad).max() > 1e-3


def _update(config, batch, modules):
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))._replace(params=jax.tree.map(
        lambda x, like: jax.device_put(jnp.copy(x), like.sharding),
        batches.params(modules), steps.abstract.params))
    return jax.device_get(steps.update(state, batch))


@pytest.mark.parametrize('regime', [
    *map(conftest.long, ('detach', 'ce', 'policy', 'readout')), 'logprob'])
def test_an_update_is_the_same(regime):
  config = batches.config(
      regime, mtp=dict(modules=2), optim=dict(clip=0.),
      rl=dict(aggregation='seq-mean-token-mean', entropy_coef=.01))
  batch = batches.batch(2)
  state, seen = _update(config, batch, 2)
  packed_state, packed_seen = _update(config, packing.pack(batch), 2)
  batches.assert_close(packed_state.params, state.params, rtol=1e-5, atol=1e-5)
  batches.assert_close(packed_seen, seen, rtol=1e-4, atol=1e-5)
  if regime in ('logprob', 'readout'):
    assert abs(seen['occ/lambda']) > 1e-3


def test_curvature_of_packed_rows():
  config = batches.config('curvature')
  @jax.jit
  def run(batch):
    work = gradients.score(batches.params(1), batch, config)
    unit, = gradients.pull_each(work, 'policy')
    return gradients.evidence(work, [unit], ('hessian',)).hessian
  batch = batches.batch(1)
  batches.assert_close(run(packing.pack(batch)), run(batch), rtol=1e-4,
                       atol=1e-5)


def test_a_mesh_of_8_takes_packed_rows():
  over = dict(rl=dict(loss='gspo', dual_clip=0.,
                      aggregation='seq-mean-token-mean'))
  batch = batches.batch(1)
  state, seen = _update(batches.config('logprob', **over), batch, 1)
  many = batches.config('logprob', **over,
                        mesh=dict(data=2, fsdp=2, tensor=2))
  packed = packing.pack(batch, sharding.batch_devices(many.mesh))
  assert len(packed.mask) == 12
  packed_state, packed_seen = _update(many, packed, 1)
  batches.assert_close(packed_state.params, state.params, rtol=1e-5, atol=1e-5)
  batches.assert_close(packed_seen, seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sections, said', [
    (dict(mtp=dict(regime='occ_authors')), 'mtp.regime=occ_authors'),
    (dict(occ=dict(estimator='authors')), 'occ.estimator=authors'),
    (dict(occ=dict(estimator='cross_fitted')), 'occ.estimator=cross_fitted'),
    (dict(occ=dict(estimator='exact')), 'occ.disjoint_parts=1'),
    (dict(model=dict(attention='cudnn')), 'model.attention=cudnn')])
def test_what_cannot_be_packed_is_refused(sections, said):
  conftest.tiny_config(**sections)
  rl = dict(sections.pop('rl', {}), pack=True)
  with pytest.raises(config_lib.ConfigError, match=f'rl.pack=true.*{said}'):
    conftest.tiny_config(**sections, rl=rl)


def test_diagnosis_takes_prompts_apart():
  config = conftest.tiny_config(rl=dict(pack=True))
  assert not measure.measuring_config(config, 1.).rl.pack


def test_auto_attention_takes_no_kernel_of_one_sequence(monkeypatch):
  for kind, expected in (('cudnn', 'blocks'), ('splash', 'auto')):
    monkeypatch.setattr(attention, 'resolve', lambda *_, kind=kind: kind)
    got = attention.for_segments(config_lib.Model(), 16, 128)
    assert got.attention == expected


@pytest.mark.long
def test_a_packed_run_is_the_run(tmp_path):
  """Two steps of two minibatches, through the trainer."""
  rows = []
  for pack in (False, True):
    config = conftest.tiny_config(
        rl=dict(steps=2, pack=pack, aggregation='seq-mean-token-mean'),
        rollout=dict(max_prompt=12))
    workdir = str(tmp_path / str(pack))
    trainer.train(config, workdir)
    rows.append(metrics.read(os.path.join(workdir, 'metrics.jsonl')))
  plain, packed = rows
  assert len(plain) == len(packed) == 3
  for a, b in zip(plain, packed):
    b = {k: v for k, v in b.items() if not k.startswith(metrics.VOLATILE)}
    if b['step']:
      assert .4 < b.pop('rollout/packed_rows') < .9
    # In the first minibatch the policy has not moved: delta_RL is rounding,
    # and its direction means nothing.
    b = {k: v for k, v in b.items() if not k.endswith('/cos')}
    for name, value in b.items():
      np.testing.assert_allclose(value, a[name], rtol=1e-4, atol=1e-4,
                                 err_msg=name)
