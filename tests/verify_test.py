"""experiments.verify: what it says of whole and of damaged workdirs."""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io
from mtp_rl.run import checkpoint, inventory, metrics
from mtp_rl.tasks import arithmetic
from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent


class State(NamedTuple):
  """Named as `types.TrainState`."""
  params: dict
  step: jax.Array


@pytest.fixture(scope='module', name='made')
def _made(tmp_path_factory):
  """A workdir as a complete run leaves it, without the run."""
  where = tmp_path_factory.mktemp('verify') / 'run'
  where.mkdir()
  config = conftest.tiny_config()
  metrics.write_json(f'{where}/config.json', config_io.to_dict(config))
  metrics.write_json(f'{where}/tokenizer.json', arithmetic.Arithmetic(
      config.task, 0).tokenizer.to_dict())
  rows = lambda name, steps: (where / name).write_text(
      ''.join(json.dumps({'step': s, 'x': None}) + '\n' for s in steps))
  rows('warmup.jsonl', [4])
  rows('metrics.jsonl', range(5))
  rows('samples.jsonl', [1, 1, 2, 2, 4, 4])
  for phase, steps in ('warmup', [4]), ('rl', [2, 4]):
    saved = checkpoint.Checkpoints(where / 'checkpoints' / phase, 2)
    for step in steps:
      saved.save(step, State({'a': jnp.ones(9)}, jnp.int32(step)))
  metrics.write_json(f'{where}/summary.json',
                     {'status': 'complete', 'step': 4, 'steps': 4})
  return where


def _verify(where):
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.verify', f'--workdir={where}'],
      cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert 'Traceback' not in done.stderr, done.stderr
  return done.returncode, done.stdout, done.stderr


def test_a_whole_workdir_is_good(made):
  code, out, err = _verify(made)
  assert code == 0 and not err, out
  for said in ('occ, seed 0, 4 warm-up and 4 RL steps', '14 tokens',
               '5 rows, steps 0 to 4', 'checkpoints/rl/2',
               'complete at step 4 of 4'):
    assert said in out, out


@pytest.mark.parametrize('event', ['saved', 'removed', 'complete'])
def test_a_live_run_is_no_damage(event, made, tmp_path, monkeypatch):
  """The run goes on while the first checkpoint of RL is read."""
  where = tmp_path / 'run'
  shutil.copytree(made, where)
  summary = {'status': 'interrupted', 'step': 2, 'steps': 4}
  metrics.write_json(f'{where}/summary.json', summary)
  metrics_file, rl = where / 'metrics.jsonl', where / 'checkpoints' / 'rl'
  if event != 'removed':
    shutil.move(rl / '4', tmp_path / '4')
    metrics_file.write_text(metrics_file.read_text().rsplit('\n', 3)[0] + '\n')
  damage, seen = checkpoint.Checkpoints.damage, []

  def later(saved, step):
    if not seen and saved.path(step) == str(rl / '2'):
      seen.append(step)
      if event == 'removed':
        shutil.rmtree(rl / '2')
      else:
        shutil.copy(made / 'metrics.jsonl', metrics_file)
        shutil.move(tmp_path / '4', rl / '4')
      if event == 'complete':
        metrics.write_json(f'{where}/summary.json',
                           summary | {'status': 'complete', 'step': 4})
    return damage(saved, step)

  monkeypatch.setattr(checkpoint.Checkpoints, 'damage', later)
  items = inventory.inspect(str(where))
  assert seen and not [i for i in items if not i.good]


def test_damage_and_no_workdir_end_with_a_sentence(made, tmp_path):
  shutil.copytree(made, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / 'rl' / '4' / '_CHECKPOINT_METADATA'
   ).write_text('')
  code, out, err = _verify(tmp_path / 'run')
  assert code == 2 and 'DAMAGED' in out
  assert 'is damaged in checkpoints/rl/4, summary.json' in err
  rows = tmp_path / 'run' / 'metrics.jsonl'
  for step, said in ('true', 'line 6 is no row'), (10 ** 18, 'step 5 is mis'):
    rows.write_text((made / 'metrics.jsonl').read_text()
                    + f'{{"step": {step}}}\n')
    (tmp_path / 'run' / 'summary.json').write_text('[' * 10 ** 5)
    found = [f'{i.name}: {i.found}' for i in
             inventory.inspect(tmp_path / 'run')]
    assert f'metrics.jsonl: {said}' in ' '.join(found), found
    assert 'summary.json: cannot be read (RecursionError' in ' '.join(found)
  with pytest.raises(config_lib.ConfigError, match='has no config.json'):
    inventory.inspect(tmp_path)


@pytest.mark.parametrize('name, change, found', [
    ('metrics.jsonl', lambda x: x.replace('"step": 2', '"stop": 2'),
     'line 3 is no row'),
    ('metrics.jsonl', lambda x: '123\n' + x, 'line 1 is no row'),
    ('metrics.jsonl', lambda x: x.replace('{"step": 2, "x": null}\n', ''),
     'step 2 is missing'),
    ('metrics.jsonl', lambda x: x + x.splitlines()[-1] + '\n',
     'step 4 is there twice'),
    ('metrics.jsonl', lambda x: x.replace('{"step": 4, "x": null}\n', ''),
     'ends at step 3'),
    ('samples.jsonl', lambda x: x + '{"step": 1}\n', 'comes after a later'),
    ('config.json', lambda x: x.replace('"seed"', '"sead"'), 'sead'),
    ('tokenizer.json', lambda x: x[:-9], 'cannot be read'),
    ('summary.json', lambda x: x.replace('"step": 4', '"step": 5'),
     'no good checkpoint of that step')])
def test_each_damaged_file_is_named(name, change, found, made, tmp_path):
  shutil.copytree(made, tmp_path / 'run')
  path = tmp_path / 'run' / name
  path.write_text(change(path.read_text()))
  bad = [i for i in inventory.inspect(tmp_path / 'run') if not i.good]
  assert {i.name for i in bad} == {name} and found in bad[0].found, bad


def test_what_a_kill_leaves_is_good(made, tmp_path):
  """A last line cut off, a checkpoint half written, one set aside."""
  where = tmp_path / 'run'
  shutil.copytree(made, where)
  with open(where / 'metrics.jsonl', 'a', encoding='utf-8') as f:
    f.write('{"step": 5, "x"')
  (where / 'lock.json').write_text('{')
  for name in ('5.part', '3.damaged'):
    (where / 'checkpoints' / 'rl' / name).mkdir()
  found = {i.name: i for i in inventory.inspect(where)}
  assert all(i.good for i in found.values())
  assert 'running' in found['lock.json'].found
  assert 'cut off' in found['metrics.jsonl'].found
  assert 'unfinished' in found['checkpoints/rl/5.part'].found
  assert 'set aside' in found['checkpoints/rl/3.damaged'].found
