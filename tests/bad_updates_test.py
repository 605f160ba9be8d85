"""An update that is not finite changes nothing, on every mesh, and is counted.

NaN is injected into the advantages of one row, outside the config.
"""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_rl import optim, sharding, train_step, trainer, types
from mtp_rl.objectives import advantages
from mtp_rl.report import run_figures, series
from mtp_rl.rollout import experience
from mtp_rl.run import endings, metrics
from tests import batches, conftest, distributed_test, poison

MESHES = {1: {}, 8: dict(data=2, fsdp=2, tensor=2)}


@functools.cache
def _functions(devices, regime='occ', limit=3):
  config = batches.config(regime, mesh=MESHES[devices],
                          occ=dict(ema=.5), run=dict(max_skipped=limit))
  mesh = sharding.make_mesh(config.mesh)
  return mesh, train_step.make(config, mesh)


def _run(devices, given, **kw):
  """States after each of some minibatches, and the metrics of each."""
  mesh, steps = _functions(devices, **kw)
  states, seen = [], []
  with jax.set_mesh(mesh):
    state = steps.init(jax.random.key(0))
    for batch in given:
      state, values = steps.update(state, batch)
      states.append(jax.device_get(state))
      seen.append(jax.device_get(values))
  return states, seen


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


SIX = [batches.batch(1, seed) for seed in range(6)]


def test_nan_at_step_3_of_6_is_left_out_on_one_device_and_on_eight():
  given = SIX[:2] + [poison.poisoned(SIX[2])] + SIX[3:]
  states, seen = _run(1, given)
  _equal(states[2]._replace(skipped=states[1].skipped), states[1])
  assert [int(v['skipped_updates']) for v in seen] == [0, 0, 1, 1, 1, 1]
  assert [int(v['skipped_in_a_row']) for v in seen] == [0, 0, 1, 0, 0, 0]
  assert np.isnan(seen[2]['grad_norm/theta']) and states[-1].step == 5
  without, _ = _run(1, SIX[:2] + SIX[3:])
  _equal(states[-1]._replace(skipped=None), without[-1]._replace(skipped=None))
  many, seen_many = _run(8, given)
  _equal(many[-1].skipped, states[-1].skipped)
  _equal(many[2].params, many[1].params)
  batches.assert_close(many[-1].params, states[-1].params, rtol=1e-5, atol=1e-5)
  assert seen_many[2]['skipped_in_a_row'] == 1


@pytest.mark.parametrize('value', [np.inf, 1e38])
def test_infinities_and_overflow_count_as_well(value):
  states, _ = _run(1, [SIX[0], poison.poisoned(SIX[1], value)])
  _equal(states[1]._replace(skipped=None), states[0]._replace(skipped=None))
  assert states[1].skipped == (1, 1)


def test_at_the_limit_nothing_changes_any_more():
  """The host may look later: what it finds is the state at the limit."""
  bad = poison.poisoned(SIX[0])
  states, _ = _run(1, [SIX[0], bad, bad, bad, SIX[1], bad, SIX[2]])
  assert [int(s.skipped.in_a_row) for s in states] == [0, 1, 2, 3, 3, 3, 3]
  assert states[-1].skipped.total == 3
  _equal(states[-1], states[3])


def test_finite_updates_are_what_the_optimiser_alone_makes():
  """To the last bit or two: XLA may contract a product and a sum elsewhere."""
  config = batches.config('occ', run=dict(max_skipped=3))
  rate = optim.schedule(config.rl.lr, config.optim, 8)
  transform = optim.make(config.optim, rate)
  params = batches.params()
  skipped = types.Skipped(jnp.int32(0), jnp.int32(0))
  before = types.TrainState(jnp.int32(0), params, transform.init(params), (),
                            skipped)
  gradient = jax.tree.map(lambda x: jnp.cos(x * 7), params)
  def plain(state, gradient):
    updates, opt = transform.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt
  def checked(state, gradient):
    return train_step._unless_bad(
        state, train_step._apply(state, gradient, (), transform),
        jnp.float32(0), gradient, {}, 3)[0]
  after = jax.jit(checked)(before, gradient)
  batches.assert_close((after.params, after.opt_state),
                       jax.jit(plain)(before, gradient), rtol=3e-7, atol=1e-9)


def _interfere(monkeypatch, bad_steps):
  """Make the rollouts of some RL steps poisonous, in their first minibatch."""
  monkeypatch.setattr(experience, 'collect', poison.collector(bad_steps))


def _six(**sections):
  sections.setdefault('run', {}).update(checkpoint_every=2, keep=9)
  return conftest.tiny_config(
      warmup=dict(steps=0), eval=dict(every=6),
      rl=dict(steps=6, **sections.pop('rl', {})), **sections)


def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(
    tmp_path, monkeypatch):
  _interfere(monkeypatch, (3, 4, 5, 6))
  config = _six(rl=dict(minibatches=1), run=dict(max_skipped=2),
                mtp=dict(modules=0, regime='rl_only'), model=dict(n_layers=1))
  with pytest.raises(endings.DivergedError) as e:
    trainer.train(config, str(tmp_path))
  said = str(e.value)
  assert endings.exit_code(e.value) == 3 and '\n' not in said
  assert 'diverged at step 4' in said and 'rl.lr=0.001' in said
  assert said.endswith(os.path.join('checkpoints', 'rl', '2'))
  rows = metrics.read(str(tmp_path / 'metrics.jsonl'))
  assert [r.get('skipped_in_a_row') for r in rows] == [None, 0, 0, 1, 2]
  assert rows[3]['grad_norm/theta'] is None
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['status'] == 'diverged' and summary['step'] == 4
  # The count survives a resume: a checkpoint within the row knows of it.
  config.run.checkpoint_every = 1
  with pytest.raises(endings.DivergedError, match='at step 4'):
    trainer.train(config, str(tmp_path))
  with pytest.raises(endings.DivergedError) as e:
    trainer.train(config, str(tmp_path))
  assert str(e.value).endswith(os.path.join('rl', '3'))


def test_a_reward_that_is_no_number_costs_that_answer_alone(monkeypatch):
  rewards, bad = advantages.finite_rewards([1., np.nan, 0., -np.inf])
  np.testing.assert_array_equal(rewards, [1., 0., 0., 0.])
  assert bad == 2 and rewards.dtype == np.float32


def test_figures_show_gaps():
  rows = [{'step': 0, 'x': 1.}, {'step': 1, 'x': None}, {'step': 2},
          {'step': 3, 'x': 2.}, {'step': 6, 'x': 3.}]
  x, y = series.series(rows, 'x')
  assert x == [0, 1, 3, 4, 6] and y == [1., None, 2., None, 3.]
  figure, axes = run_figures._new(1, 'title')
  run_figures._panel(axes[0], rows, [('x', 'x')], 'x', 'unit')
  gaps = axes[0].lines[-1]
  assert gaps.get_label() == 'missing or not finite'
  np.testing.assert_array_equal(gaps.get_xdata(), [1, 4])
  del figure


_SPOILER = '''
from experiments import train
from mtp_rl.rollout import experience
from tests import poison
experience.collect = poison.collector((3,))
train.launch.run(train.main)
'''


@pytest.mark.long
def test_one_device_eight_devices_and_two_processes_skip_the_same(
    tmp_path, monkeypatch):
  finals = []
  for name, mesh in (('one', {}), ('many', MESHES[8])):
    config = _six(mesh=mesh)
    with monkeypatch.context() as patched:
      _interfere(patched, (3,))
      trainer.train(config, str(tmp_path / name))
    finals.append(distributed_test._state(str(tmp_path / name))[0])
  config, workdir = _six(mesh=MESHES[8]), str(tmp_path / 'two')
  flags = distributed_test._train(config, workdir)[2:]
  for code, out, err in distributed_test._end(
      distributed_test._start(['-c', _SPOILER, *flags])):
    assert code == 0, out + err
  finals.append(distributed_test._state(workdir)[0])
  for state in finals:
    assert state.skipped == (1, 0) and state.step == 11
    batches.assert_close(state.params, finals[0].params, rtol=1e-5, atol=1e-5)
