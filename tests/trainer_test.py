"""Whole runs on the tiny config: files, resume bit for bit, bad input."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, sharding, train_step, trainer, warmup
from mtp_rl import types as examples
from mtp_rl.run import checkpoint, inventory, metrics, owner
from mtp_rl.run import workdir as workdir_lib
from tests import conftest

V = 14  # tokens of the task's tokenizer


def _rows(workdir, name='metrics.jsonl'):
  keep = lambda r: {k: v for k, v in r.items()
                    if not k.startswith(metrics.VOLATILE)}
  return [keep(r) for r in metrics.read(os.path.join(workdir, name))]


def _state(config, workdir):
  """The latest RL state of a run, as NumPy arrays."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config_lib.with_vocabulary(config, V), mesh)
    saved = checkpoint.Checkpoints(
        os.path.join(workdir, 'checkpoints', 'rl'), 9)
    return jax.device_get(saved.restore(steps.abstract))


def _identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _config(**kw):
  return conftest.tiny_config(
      occ=dict(ema=.5), **kw, rl=dict(kl_coef=.01, tis_cap=2.,
                              dynamic_sampling=1, overlong_buffer=3))


@pytest.fixture(scope='module', name='whole')
def _whole(tmp_path_factory):
  """An uninterrupted run."""
  workdir = str(tmp_path_factory.mktemp('whole'))
  return workdir, trainer.train(_config(), workdir)


def test_a_run_leaves_what_it_promises(whole):
  workdir, summary = whole
  assert summary['status'] == 'complete' and summary['step'] == 4
  rows = _rows(workdir)
  assert [r['step'] for r in rows] == [0, 1, 2, 3, 4]
  assert {'val/arithmetic/greedy', 'val/arithmetic/avg@2',
          'val/arithmetic/maj@2'} <= rows[0].keys()
  names = rows[4].keys()
  assert {'reward/mean', 'actor/pg_loss', 'actor/pg_clipfrac', 'actor/ppo_kl',
          'actor/entropy', 'actor/kl_loss', 'grad_norm/theta', 'grad_norm/psi',
          'response_length/mean', 'response_length/clip_ratio', 'occ/lambda',
          'occ/dot', 'occ/d_rl_norm', 'occ/d_mtp_norm', 'occ/cos', 'mtp_1/loss',
          'mtp_1/pg_loss', 'mtp_1/accept_top1', 'mtp_1/accept_expected',
          'rollout/logprob_gap_max', 'rollout/redraws',
          'reward/overlong_mean', 'val/arithmetic/greedy'} <= names
  assert all(r['rollout/logprob_gap_max'] < 1e-4 for r in rows[1:])
  assert [r['step'] for r in _rows(workdir, 'warmup.jsonl')] == [4]
  for name in ('learning', 'occ', 'acceptance', 'samples'):
    with open(os.path.join(workdir, 'figures', name + '.png'), 'rb') as f:
      assert f.read(4) == b'\x89PNG'
  tokens = _rows(workdir, 'tokens.jsonl')
  assert list(dict.fromkeys((r['step'], r['kind']) for r in tokens)) == [
      (0, 'held_out'), (1, 'rollout'), (2, 'held_out'), (2, 'rollout'),
      (4, 'held_out'), (4, 'rollout')]
  assert len({r['prompt'] for r in tokens if r['kind'] == 'held_out'}) == 4
  assert all(np.isfinite(r['d_rl']).all() for r in tokens if 'd_rl' in r)
  page = pathlib.Path(workdir, 'report.html').read_text(encoding='utf-8')
  assert '"state":"complete"' in page
  assert os.listdir(os.path.join(workdir, 'events'))
  with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
    assert json.load(f) == summary
  assert config_io.load(os.path.join(workdir, 'config.json')) == _config()
  found = inventory.inspect(workdir)
  assert all(item.good for item in found), found


@pytest.mark.parametrize('kind', [
    'stop', 'kill', conftest.long('stop in warm-up')])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    kind, whole, tmp_path, monkeypatch):
  workdir, _ = whole
  config, again = _config(), str(tmp_path)
  write, calls = metrics.Writer.write, []

  def interrupt(self, step, values):
    row = write(self, step, values)
    calls.append(step)
    if kind == 'kill' and step == 3:  # after step 2's checkpoint
      raise KeyboardInterrupt
    if kind == 'stop' and step == 1 and 'reward/mean' in values:
      os.kill(os.getpid(), signal.SIGTERM)
    return row

  with monkeypatch.context() as patched:
    patched.setattr(metrics.Writer, 'write', interrupt)
    if kind == 'stop in warm-up':
      solutions = warmup._solutions
      def draw(*args):
        calls.append(1)
        if len(calls) == 3:
          os.kill(os.getpid(), signal.SIGTERM)
        return solutions(*args)
      patched.setattr(warmup, '_solutions', draw)
    if kind == 'kill':
      with pytest.raises(KeyboardInterrupt):
        trainer.train(config, again)
    else:
      assert trainer.train(config, again)['status'] == 'interrupted'
  assert len(_rows(again)) < 5
  assert trainer.train(config, again)['status'] == 'complete'
  _identical(_state(config, again), _state(config, workdir))
  assert _rows(again) == _rows(workdir)
  for name in ('samples.jsonl', 'tokens.jsonl'):
    assert _rows(again, name) == _rows(workdir, name)


_CHILD = '''
import sys
sys.path.insert(0, sys.argv[1])
from tests import trainer_test
from mtp_rl import trainer
trainer.train(trainer_test._config(), sys.argv[2])
'''


@pytest.mark.long
def test_a_killed_process_loses_nothing(whole, tmp_path):
  """SIGKILL while the RL phase runs, then the same call again."""
  workdir, _ = whole
  root = pathlib.Path(__file__).parent.parent
  child = subprocess.Popen([sys.executable, '-c', _CHILD, str(root),
                            str(tmp_path)], cwd=root)
  try:
    deadline = time.monotonic() + 200
    while len(_rows(tmp_path)) < 3 and child.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(.005)
  finally:
    child.kill()
    child.wait()
  assert trainer.train(_config(), str(tmp_path))['status'] == 'complete'
  _identical(_state(_config(), str(tmp_path)), _state(_config(), workdir))
  assert _rows(tmp_path) == _rows(workdir)


@pytest.mark.parametrize('sections', [
    dict(mtp=dict(modules=0, regime='rl_only')),
    conftest.long(dict(
        mtp=dict(modules=2),
        model=dict(dtype='bfloat16', tie_embeddings=False, head_chunk=2,
                   remat='block'),
        mesh=dict(data=2, tensor=2), rl=dict(microbatches=2)))])
def test_unusual_models_run_to_the_end(sections, tmp_path):
  config = conftest.tiny_config(**sections)
  assert trainer.train(config, str(tmp_path))['status'] == 'complete'
  rows = _rows(tmp_path)
  modules = config.mtp.modules
  assert ('mtp_2/accept_top1' in rows[-1]) == (modules == 2)
  assert all(v is not None for r in rows for v in r.values())
  assert os.path.exists(tmp_path / 'figures' / 'learning.png')


def test_a_diverged_warm_up_is_named(tmp_path):
  config = conftest.tiny_config(warmup=dict(lr=1e30))
  _refused(config, tmp_path, 'warmup.lr')


def test_a_finished_run_only_draws_its_figures_again(whole, monkeypatch):
  workdir, summary = whole
  before = _rows(workdir)
  assert trainer.train(_config(), workdir) == summary
  assert _rows(workdir) == before


def test_rl_from_another_runs_warm_up_is_the_same_run(whole, tmp_path):
  workdir, _ = whole
  config = _config(warmup=dict(init=workdir))
  trainer.train(config, str(tmp_path))
  _identical(_state(config, str(tmp_path)).params,
             _state(_config(), workdir).params)


def test_the_first_row_says_what_the_warm_up_reached(whole, tmp_path):
  workdir, _ = whole
  losses = [r['warmup/loss'] for r in _rows(workdir, 'warmup.jsonl')]
  loss = {'after_warmup/loss': pytest.approx(np.mean(losses[-5:]))}
  first = _rows(workdir)[0]
  assert {k: v for k, v in first.items() if k.startswith('after')} == loss
  task = types.SimpleNamespace(floor=.2)
  outcome = lambda **kw: warmup.outcome(workdir_lib.Run(
      _config(**kw), str(tmp_path), task, None, None))
  assert outcome() == {}  # there is no warm-up
  init = dict(warmup=dict(init=workdir))
  assert outcome(**init) == loss | {'after_warmup/floor': .2}
  assert outcome(**init, seed=9) == loss  # another graph has another floor


def test_a_damaged_row_of_the_other_warm_up_is_named(whole, tmp_path):
  other = tmp_path / 'warm'
  shutil.copytree(whole[0], other)
  with open(other / 'warmup.jsonl', 'a', encoding='utf-8') as f:
    f.write('[]\n')
  _refused(_config(warmup=dict(init=str(other))), tmp_path / 'run',
           'warmup.jsonl is damaged')


def _refused(config, workdir, said):
  with pytest.raises(config_lib.ConfigError, match=said) as error:
    trainer.train(config, str(workdir))
  assert '\n' not in str(error.value)


def test_another_config_in_the_same_workdir_is_refused(whole):
  workdir, _ = whole
  config = _config()
  config.rl.lr, config.mtp.regime = .5, 'detach'
  _refused(config, workdir, 'differs in mtp.regime, rl.lr')
  before = _rows(workdir)
  assert len(before) == 5


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
  workdir, _ = whole
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  for path in (copy / 'checkpoints' / 'rl').rglob('*'):
    if path.is_file() and path.stat().st_size > 0 and 'd' in path.parts[-2:-1]:
      path.write_bytes(b'\0' * 10)
  _refused(_config(), copy, 'no good checkpoint is left in .*checkpoints/rl')


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(
    whole, tmp_path, capsys):
  """One changed bit in the newest: the result is that of the whole run."""
  workdir, _ = whole
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  newest = copy / 'checkpoints' / 'rl' / '4'
  path = max(newest.rglob('*'), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  config = _config()
  config.run.strict = True
  _refused(config, copy, 'rl/4 is damaged .* run.strict')
  assert trainer.train(_config(), str(copy))['status'] == 'complete'
  assert 'goes on from step 2' in capsys.readouterr().err
  assert sorted(os.listdir(newest.parent)) == ['2', '4', '4.damaged']
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert _rows(copy, name) == _rows(workdir, name)
  _identical(_state(_config(), copy), _state(_config(), workdir))


@pytest.mark.parametrize('fault, said', [
    (dict(rewards=lambda *_: [None]), 'one finite number an answer'),
    (dict(rewards=lambda *_: [float('nan')]), 'one finite number an answer'),
    (dict(rewards=lambda *_: None), 'are None for one answer'),
    (dict(rewards=lambda *_: ['yes']), 'fail on one answer .*ValueError'),
    (dict(probe=lambda: [examples.Example('1', '1')]), 'no solution to imi'),
    (dict(prompts=lambda *_: [examples.Example('2x=', '1')]), "know: 'x'")])
def test_a_faulty_task_is_refused_before_the_warmup(fault, said, tmp_path,
                                                    monkeypatch):
  make = workdir_lib.tasks.make

  def faulty(config):
    task = make(config)
    vars(task).update(fault)
    return task

  monkeypatch.setattr(workdir_lib.tasks, 'make', faulty)
  _refused(conftest.tiny_config(), tmp_path, said)
  owner.release()


def test_a_coefficient_that_nothing_reads_is_said(tmp_path, capsys):
  config = conftest.tiny_config(mtp=dict(regime='occ', coef=1.))
  run = workdir_lib.setup(config, str(tmp_path))
  run.task.close()
  owner.release()
  assert 'mtp.coef=1.0 has no effect' in capsys.readouterr().err


def test_a_warmup_of_another_task_is_refused(whole, tmp_path):
  workdir, _ = whole
  config = _config(warmup=dict(init=workdir),
                   task=dict(name='subset_sum', min_terms=3),
                   rollout=dict(max_prompt=40, max_response=40))
  _refused(config, tmp_path, "does not know: '[|].*was trained on")
  owner.release()


def test_a_warmup_that_rl_no_longer_needs_is_not_read(tmp_path):
  config = conftest.tiny_config()
  run = workdir_lib.setup(config, str(tmp_path))
  (tmp_path / 'checkpoints' / 'warmup' / '4').mkdir(parents=True)
  (tmp_path / 'checkpoints' / 'rl' / '2').mkdir(parents=True)
  with jax.set_mesh(run.mesh):
    assert warmup.train(run, lambda: False) == {}
    config.rl.kl_coef = .1  # holds on to these parameters
    with pytest.raises(config_lib.ConfigError,
                       match='no good checkpoint is left in .*warmup'):
      warmup.train(run, lambda: False)
  owner.release()


def test_a_foreign_checkpoint_is_named(whole, tmp_path):
  workdir, _ = whole
  for model, said in ((dict(d_ff=48), 'd_ff=48'), (
      dict(n_heads=2, n_kv_heads=1), 'n_heads=2, model.n_kv_heads=1')):
    config = _config(model=model, warmup=dict(init=workdir))
    _refused(config, tmp_path, f'trained with .*but here is .*{said}')
  config = _config(mtp=dict(hidden='pre_norm'), warmup=dict(init=workdir))
  _refused(config, tmp_path, 'mtp.hidden=post_norm, but here is')
  config = _config(warmup=dict(init=str(tmp_path / 'nothing')))
  _refused(config, tmp_path / 'other', 'nothing')


def test_unwritable_workdir_and_too_large_mesh_are_named(tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  _refused(_config(), blocked / 'run', 'cannot be written')
  config = conftest.tiny_config(mesh=dict(data=16),
                                rl=dict(prompts=32, minibatches=2),
                                warmup=dict(batch=16))
  _refused(config, tmp_path / 'run', 'needs 16 devices')


@pytest.mark.parametrize('sections, said', [
    (dict(rollout=dict(max_prompt=3)), 'rollout.max_prompt=3'),
    (dict(rollout=dict(max_response=3)), 'rollout.max_response=3'),
    (dict(task=dict(min_terms=1, max_terms=1)), 'empty')])
def test_a_task_that_does_not_fit_is_refused_before_any_work(
    sections, said, tmp_path):
  _refused(conftest.tiny_config(**sections), tmp_path, said)
  assert not (tmp_path / 'checkpoints').exists()
