"""Scoring a checkpoint: rows, resuming after a kill, identity, the table."""

import dataclasses
import json
import os
import pathlib

import pytest

from mtp_rl import config as config_lib
from mtp_rl import trainer
from mtp_rl.evaluation import held_out, scoring
from mtp_rl.run import metrics
from mtp_rl.run import workdir as workdir_lib
from tests import conftest

MATH = ('task.name=math', 'task.template=plain', 'task.train=mine',
        'task.processes=1', 'rollout.max_prompt=300', 'rollout.max_response=3',
        'eval.batch=4')


@pytest.fixture(scope='module', name='workdir')
def _workdir(tmp_path_factory):
  """A warm-up checkpoint of arithmetic."""
  workdir = str(tmp_path_factory.mktemp('scored'))
  config = conftest.tiny_config(
      mtp=dict(modules=0, regime='rl_only'), warmup=dict(steps=2))
  assert trainer.pretrain(config, workdir)
  return workdir


def _score(workdir, settings=(), samples=2):
  return scoring.score_checkpoint(workdir, 'warmup', None, samples, settings)


def test_an_evaluation_is_kept_row_by_row_and_resumes(workdir, monkeypatch):
  values, path = _score(workdir)
  rows = metrics.read(path + 'l')
  assert list(rows[0]) == ['identity'] and len(rows) == 1 + 16 * (1 + 2)
  assert rows[1]['mode'] == 'greedy' and rows[-1]['sample'] == 1
  mean, low, high = values['val/arithmetic/avg@2']
  assert low <= mean <= high
  sampled = [r['reward'] for r in rows if r.get('mode') == 'sample']
  assert mean == pytest.approx(sum(sampled) / 32)
  with open(path, encoding='utf-8') as f:
    assert json.load(f)['val/arithmetic/avg@2'] == mean

  failures = lambda: json.loads(pathlib.Path(path).read_text())['verifier']
  assert failures() == {}
  whole = pathlib.Path(path + 'l').read_bytes()
  calls, complete = [], held_out.complete
  monkeypatch.setattr(held_out, 'complete',
                      lambda *args: calls.append(1) or complete(*args))
  assert _score(workdir)[0] == values and not calls and failures() == {}
  os.remove(path)
  # A kill in the middle of a line of the last batch: it alone is made again.
  pathlib.Path(path + 'l').write_bytes(whole[:-40])
  assert _score(workdir)[0] == values and len(calls) == 1
  assert failures() is None  # those of the process that was killed are lost
  assert metrics.read(path + 'l') == rows  # none of them twice
  assert _score(workdir)[0] == values and len(calls) == 1


def test_samples_of_another_evaluation_are_not_mixed_in(workdir):
  path = _score(workdir)[1]
  rows = metrics.read(path + 'l')
  rows[0]['identity']['sha256'] = 'x'
  pathlib.Path(path + 'l').write_text(
      ''.join(json.dumps(r) + '\n' for r in rows))
  with pytest.raises(config_lib.ConfigError, match='another evaluation'):
    _score(workdir)


def test_math_sets_end_with_a_table(workdir, tmp_path, monkeypatch):
  for name in ('mine', 'a', 'b'):
    (tmp_path / f'{name}.jsonl').write_text(''.join(
        json.dumps({'problem': f'{name} {i}', 'answer': r'\frac{1}{2}'}) + '\n'
        for i in range(5)))
  settings = (*MATH, 'task.evals=a,b', f'task.data_dir={tmp_path}',
              f'task.cache_dir={tmp_path}')
  with pytest.raises(config_lib.ConfigError, match='does not know: .*abdef'):
    _score(workdir, settings)  # the model reads digits alone
  monkeypatch.setattr(workdir_lib, '_check_texts', lambda *_: None)
  values, path = _score(workdir, settings)
  lines = scoring.table(values).split('\n')
  assert lines[0] == '| set (%) | greedy | avg@2 | pass@1 | pass@2 | maj@2 |'
  assert [line.split()[1] for line in lines[2:]] == ['a', 'b', 'mean']
  assert len(metrics.read(path + 'l')) == 1 + 2 * 5 * (1 + 2)
  with open(path, encoding='utf-8') as f:
    saved = json.load(f)
  assert saved['problems']['val/a/greedy'] == 5
  assert saved['verifier'] == {'errors': 0, 'timeouts': 0, 'crashes': 0}


def test_the_table_by_hand():
  got = scoring.table({'val/a/greedy': (.5, .25, .75),
                       'val/b/greedy': (1., 1., 1.)})
  assert got.split('\n')[2:] == ['| a | 50.0 [25.0, 75.0] |',
                                 '| b | 100.0 [100.0, 100.0] |',
                                 '| mean | 75.0 |']


def test_names_of_sets_may_have_slashes():
  got = scoring.table({'val/x/aime24/greedy': (.5, .25, .75)})
  assert '| x/aime24 | 50.0 [25.0, 75.0] |' in got


def test_k_is_32_for_math_and_settings_are_checked():
  config = conftest.tiny_config()
  assert scoring.configure(config, None, []).eval.samples == 16
  config.task = dataclasses.replace(config.task, name='math')
  assert scoring.configure(config, None, []).eval.samples == 32
  for setting, said in (('rl.lr=1', 'section of task'), ('task.name', 'value'),
                        ('eval.batch=0', 'eval.batch=0'),
                        ('task.size=x', 'is no int'),
                        ('eval.samples=3', 'use --k=3'),
                        ('task.colour=1', 'does not exist')):
    with pytest.raises(config_lib.ConfigError, match=said):
      scoring.configure(conftest.tiny_config(), 1, [setting])
