"""A workdir goes on on other devices, in other portions: the same run."""

import functools
import os

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, sharding, train_step, trainer
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib
from tests import batches, conftest, distributed_test

ONE, EIGHT = {}, dict(data=2, fsdp=2, tensor=2)
TWICE_FOUR = dict(data=4, fsdp=2)


def _config(steps, mesh, occ=None, rl=None, **sections):
  return conftest.tiny_config(
      mesh=mesh, occ=dict(ema=.5) | (occ or {}), eval=dict(every=1),
      rl=dict(steps=steps, dynamic_sampling=1) | (rl or {}), **sections)


def _assert_same_run(workdir, wanted):
  """Data exactly, parameters up to rounding."""
  for name in ('metrics.jsonl', 'samples.jsonl'):
    ours, theirs = (metrics.read(os.path.join(w, name))
                    for w in (workdir, wanted))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
      for key in a.keys() | b.keys():
        if name == 'samples.jsonl' or key.startswith(
            ('step', 'reward/', 'response_length/', 'rollout/redraws')):
          assert a[key] == b[key], key
  ours, theirs = (distributed_test._state(w)[0] for w in (workdir, wanted))
  assert ours.step == theirs.step
  batches.assert_close((ours.params, ours.occ), (theirs.params, theirs.occ),
                       rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_one_device_goes_on_on_eight(tmp_path):
  """Saved after one update, loaded straight into other shards, updated."""
  made = {}
  for name, mesh in (('one', dict(data=1)), ('eight', EIGHT)):
    config = batches.config('policy', mesh=mesh)
    mesh = sharding.make_mesh(config.mesh)
    saved = checkpoint.Checkpoints(str(tmp_path), 9)
    with jax.set_mesh(mesh):
      steps = train_step.make(config, mesh)
      if saved.latest() is None:
        state, _ = steps.update(steps.init(jax.random.key(0)),
                                batches.batch(1, 0))
        saved.save(1, state)
        made['saved'] = jax.device_get(state)
      else:
        state = saved.restore(steps.abstract)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state),
                     made['saved'])
      state, _ = steps.update(state, batches.batch(1, 1))
      made[name] = jax.device_get(state)
  assert made['eight'].step == 2
  batches.assert_close(made['eight'].params, made['one'].params, rtol=1e-5,
                       atol=1e-5)


@pytest.mark.long
def test_one_device_then_eight_is_one_device(tmp_path, capsys):
  whole, workdir = str(tmp_path / 'whole'), str(tmp_path / 'run')
  trainer.train(_config(2, ONE), whole)
  trainer.train(_config(1, ONE), workdir)
  assert not capsys.readouterr().err
  trainer.train(
      _config(2, EIGHT, rl=dict(microbatches=2), model=dict(head_chunk=2),
              rollout=dict(tensor=4, slots=16)), workdir)
  said = capsys.readouterr().err
  assert 'rl.microbatches=2' in said and 'instead of' in said
  assert 'mesh.fsdp=2' in said and 'rollout.slots=0' in said
  _assert_same_run(workdir, whole)


@pytest.mark.long
@pytest.mark.parametrize('occ', [
    {}, dict(estimator='cross_fitted', probe_every=3)])
def test_one_then_eight_then_twice_four_devices(occ, tmp_path):
  config = functools.partial(_config, occ=occ)
  whole, workdir = str(tmp_path / 'whole'), str(tmp_path / 'run')
  trainer.train(config(6, ONE), whole)
  trainer.train(config(2, ONE), workdir)
  trainer.train(config(4, EIGHT), workdir)
  for code, out, err in distributed_test._end(distributed_test._start(
      distributed_test._train(config(6, TWICE_FOUR), workdir))):
    assert code == 0, out + err
  assert metrics.read(os.path.join(workdir, 'metrics.jsonl'))[-1]['step'] == 6
  _assert_same_run(workdir, whole)
  trainer.train(config(7, ONE), workdir)  # and back


@pytest.mark.parametrize('first, then', [
    (dict(mtp=dict(regime='occ_authors')), dict(rl=dict(microbatches=2))),
    (dict(rollout=dict(draft=1, verify='rejection')),
     dict(rollout=dict(draft=1, verify='rejection', slots=8))),
    (dict(rollout=dict(draft=1, verify='rejection', slots=8, draft_rows=4)),
     dict(rollout=dict(draft=1, verify='rejection', slots=8, draft_rows=4),
          mesh=dict(fsdp=2)))])
def test_what_would_change_the_result_may_not_change(first, then, tmp_path):
  begun = conftest.tiny_config(**first)
  path = str(tmp_path / 'config.json')
  metrics.write_json(path, config_io.to_dict(begun))
  workdir_lib._same_config(path, begun)
  with pytest.raises(config_lib.ConfigError, match='that differs in [rm]'):
    workdir_lib._same_config(path, conftest.tiny_config(**{**first, **then}))
