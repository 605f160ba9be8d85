"""Runs that start from pretrained weights and train the MTP modules alone."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from mtp_rl import config as config_lib
from mtp_rl import config_io, sharding, train_step, trainer, tree, warmup
from mtp_rl.models import pretrained
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib
from tests import conftest, published

ROOT = pathlib.Path(__file__).parent.parent
V = 17  # of the token table; the task's tokenizer has 14


def _config(path, **warmup):
  return conftest.tiny_config(
      model=dict(qk_norm=False, vocab_size=V, pretrained=path),
      mtp=dict(fresh=True, unroll=2, psi_loss='tv_e2e'),
      rl=dict(steps=2, kl_coef=.01),
      rollout=dict(draft=1, verify='rejection'),  # tokens depend on drafts
      warmup=dict(dict(steps=21, lr=1e-2, train='mtp', data='samples',
                       mtp_loss='hybrid',
                       pool_steps=9, pool=2, batch=16), **warmup))


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  """A folder of the tiny trunk without MTP modules."""
  m = _config('x').model
  bare = config_lib.MTP(modules=0)
  where = tmp_path_factory.mktemp('pretrained') / 'hf'
  return published.write(where, m, bare, published.weights(m, bare))


def _params(config, workdir, phase):
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh, phase)
    saved = checkpoint.Checkpoints(
        os.path.join(workdir, 'checkpoints', phase), 9)
    return jax.device_get(saved.restore(steps.abstract, params_only=True))


def _rows(workdir, name):
  keep = lambda r: {k: v for k, v in r.items()
                    if not k.startswith(metrics.VOLATILE)}
  return [keep(r) for r in metrics.read(os.path.join(workdir, name))]


@pytest.fixture(scope='module', name='whole')
def _whole(folder, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('whole'))
  config = _config(folder)
  assert trainer.train(config, workdir)['status'] == 'complete'
  return config, workdir


def test_the_modules_learn_and_the_pretrained_trunk_stays(whole, folder):
  config, workdir = whole
  warm = _params(config, workdir, 'warmup')
  _, abstract = published.network(config.model, config_lib.MTP(modules=0))
  trunk = pretrained.load(folder, abstract, config.model,
                          config_lib.MTP(modules=0))
  jax.tree.map(np.testing.assert_array_equal, tree.theta(warm),
               jax.device_get(trunk))
  rows = _rows(workdir, 'warmup.jsonl')
  assert [r['step'] for r in rows] == [20, 21]
  assert all(0 <= r['mtp_1/accept_top1'] <= 1 for r in rows)
  first, *_, last = _rows(workdir, 'metrics.jsonl')
  assert 'after_warmup/loss' not in first  # of its own samples, not solutions
  for row in (*rows, last):  # one module, two depths
    first, second = (row[f'mtp_{k}/accept_cumulative'] for k in (1, 2))
    np.testing.assert_allclose(first, row['mtp_1/accept_expected'], rtol=1e-6)
    np.testing.assert_allclose(first + second, row['mtp/accept_length'],
                               rtol=1e-6)
    assert 0 < second < first < 1
  assert warm['mtp'].keys() == {'depth_1'}
  assert all(r['grad_norm/theta'] == 0 < r['grad_norm/psi'] for r in rows)
  # RL then moves both from where the warm-up left them.
  last = _params(config, workdir, 'rl')
  for part in (tree.theta, tree.psi):
    assert float(tree.norm(jax.tree.map(np.subtract, part(last),
                                        part(warm)))) > 0
  saved = config_io.load(os.path.join(workdir, 'config.json'))
  assert saved.model.pretrained == folder


def test_a_resumed_run_draws_the_same_pools_and_never_reads_again(
    whole, folder, tmp_path, monkeypatch):
  _, workdir = whole
  moved, again = tmp_path / 'hf', str(tmp_path / 'run')
  shutil.copytree(folder, moved)
  config, calls = _config(str(moved)), []
  batch = trainer.warmup.Samples.batch

  def interrupt(self, params, step):
    calls.append(step)
    if step == 13:  # inside the second pool
      os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, params, step)

  with monkeypatch.context() as patched:
    patched.setattr(trainer.warmup.Samples, 'batch', interrupt)
    assert trainer.train(config, again)['status'] == 'interrupted'
  assert calls[-1] == 13
  shutil.rmtree(moved)
  assert trainer.train(config, again)['status'] == 'complete'
  for phase in ('warmup', 'rl'):
    jax.tree.map(np.testing.assert_array_equal, _params(config, again, phase),
                 _params(config, workdir, phase))
  for name in ('warmup.jsonl', 'metrics.jsonl', 'samples.jsonl'):
    assert _rows(again, name) == _rows(workdir, name)


def test_without_warm_up_steps_the_first_checkpoint_is_the_pretrained_trunk(
    folder, tmp_path):
  config = _config(folder, steps=0)
  assert trainer.pretrain(config, str(tmp_path))
  assert 'warm-up complete' in (tmp_path / 'report.html').read_text()
  first = _params(config, str(tmp_path), 'warmup')
  np.testing.assert_array_equal(
      first['embed']['embedding'],
      published.weights(config.model, config_lib.MTP(modules=0))[
          'model.embed_tokens.weight'])


def test_a_start_from_weights_computes_no_random_trunk(folder):
  config, rows = _config(folder), 20000  # a token table that dwarfs the rest
  key = jax.random.key(3)
  config.model.vocab_size = rows
  steps = train_step.make(config, sharding.make_mesh(config.mesh), 'warmup')
  whole, rest = steps.init(key), steps.init_rest(key)
  jax.tree.map(np.testing.assert_array_equal, rest,
               whole._replace(params=tree.psi(whole.params)))
  table = rows * config.model.d_model * 4  # bytes
  for function, held in ((steps.init, True), (steps.init_rest, False)):
    used = function.lower(key).compile().memory_analysis()
    total = used.output_size_in_bytes + used.temp_size_in_bytes
    assert (total > table) == held


def _convert(*flags):
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.convert', *flags], text=True,
      cwd=ROOT, capture_output=True, timeout=300)
  assert done.returncode == 0 or done.stderr.startswith('error: '), done.stderr
  return done.stderr if done.returncode else ''


def test_a_run_becomes_a_folder_and_the_folder_a_run(whole, tmp_path):
  config, workdir = whole
  out, again = str(tmp_path / 'out'), str(tmp_path / 'again')
  assert not _convert(f'--workdir={workdir}', f'--target={out}')
  saved = os.path.join(workdir, 'config.json')
  assert not _convert(f'--workdir={again}', f'--source={out}',
                      f'--config=configs/from_json.py:{saved}')
  trained = _params(config, workdir, 'rl')
  jax.tree.map(np.testing.assert_array_equal, _params(config, again, 'warmup'),
               trained)
  assert '--config' in _convert(f'--workdir={again}', f'--source={out}')
  assert '--source and --target' in _convert(f'--workdir={again}')


@pytest.mark.long
def test_a_folder_becomes_a_run_and_the_same_folder_again(whole, tmp_path):
  """Tensors and config.json, entries included that nothing here reads."""
  _, workdir = whole
  out, run, back = (str(tmp_path / n) for n in ('out', 'run', 'back'))
  assert not _convert(f'--workdir={workdir}', f'--target={out}')
  path = pathlib.Path(out) / 'config.json'
  values = json.loads(path.read_text()) | {
      'bos_token_id': 3, 'initializer_range': .02, 'rope_scaling': None,
      'max_position_embeddings': 4096}
  path.write_text(json.dumps(values))
  saved = os.path.join(workdir, 'config.json')
  assert not _convert(f'--workdir={run}', f'--source={out}',
                      f'--config=configs/from_json.py:{saved}')
  assert not _convert(f'--workdir={run}', '--phase=warmup', f'--target={back}')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text()) == values
  one, two = (safetensors.load_file(f'{d}/model.safetensors')
              for d in (out, back))
  assert one.keys() == two.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(two[name], value, err_msg=name)


def test_pretrained_weights_that_do_not_fit_are_refused_at_once(
    folder, tmp_path):
  def refused(said, **fields):
    config = _config(folder)
    for name, value in fields.items():
      setattr(config.model, name, value)
    with pytest.raises(config_lib.ConfigError, match=said):
      trainer.train(config, str(tmp_path))
    assert not (tmp_path / 'checkpoints').exists()
  refused(r'model.d_ff \(48, 32\)', d_ff=48)
  refused('the tokenizer has 14 tokens', vocab_size=10)
  refused('neither a folder', pretrained=str(tmp_path / 'none'))


def test_decoding_ids_beyond_the_tokenizer_is_no_crash():
  from mtp_rl import tokenizers
  tokenizer = tokenizers.CharTokenizer('ab')
  assert tokenizer.decode([0, 3, 0, 4, 16, 2, 1, 3]) == 'a\ufffdb\ufffd\ufffd'


def test_without_a_warm_up_the_first_parameters_come_from_the_seed(tmp_path):
  """What diagnosis takes as the reference policy of a KL penalty."""
  config = conftest.tiny_config(warmup=dict(steps=0))
  run = workdir_lib.setup(config, str(tmp_path))
  with jax.set_mesh(run.mesh):
    first = jax.device_get(warmup.train(run, lambda: False))
    again = jax.device_get(warmup.restore(run))
  jax.tree.map(np.testing.assert_array_equal, first, again)
