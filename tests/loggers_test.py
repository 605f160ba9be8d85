"""Loggers: a table that survives kills, one run of wandb, clear refusals."""

import csv
import importlib.machinery
import importlib.util
import json
import os
import sys
import types

import pytest

from mtp_rl import config as config_lib
from mtp_rl import validate
from mtp_rl.run import loggers, metrics
from mtp_rl.run import workdir as workdir_lib
from tests import conftest


def _go_on(workdir, phase, saved, steps, names):
  """Write rows, some with a metric of their own; the writer stays open."""
  names_of = {'warmup': ('lr', 'mtp_1/loss', 'warmup/loss'),
              'rl': ('lr', 'mtp_1/loss', 'occ/lambda')}[phase]
  name = {'warmup': 'warmup', 'rl': 'metrics'}[phase]
  writer = metrics.Writer(str(workdir / f'{name}.jsonl'),
                          str(workdir / 'events' / phase), saved,
                          loggers=names)
  for step in steps:
    values = {n: step / 3 + i for i, n in enumerate(names_of)}
    if step == 3:
      values['occ/lambda'] = float('nan')
    if step % 2 == 0:
      values['val/a/greedy'] = step / 8
    writer.write(step, values)
  writer.flush()
  return writer


def test_the_table_of_a_killed_run_is_that_of_a_whole_one(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  whole.mkdir()
  killed.mkdir()
  _go_on(whole, 'rl', None, range(1, 7), 'csv').close()
  _go_on(killed, 'rl', None, (1,), 'csv')
  _go_on(killed, 'rl', None, (1, 2, 3, 4), 'csv')
  with open(killed / 'metrics.csv', 'a', encoding='utf-8') as f:
    f.write('5,"cut sh')  # the kill cut a line short
  _go_on(killed, 'rl', 2, (3,), 'tensorboard')  # left out for a while
  _go_on(killed, 'rl', 3, (4, 5, 6), 'csv,tensorboard').close()
  text = (whole / 'metrics.csv').read_text()
  assert (killed / 'metrics.csv').read_text() == text
  assert not (whole / 'events').exists()
  rows = metrics.read(str(whole / 'metrics.jsonl'))
  table = list(csv.DictReader(text.splitlines()))
  # 'val/a/greedy' came with the second row.
  assert list(table[0]) == ['step', 'lr', 'mtp_1/loss', 'occ/lambda',
                            'val/a/greedy']
  assert [{k: float(v) for k, v in line.items() if v} for line in table] == [
      {k: v for k, v in row.items() if v is not None} for row in rows]


@pytest.mark.parametrize('text', ['tensorbord', 'csv,tsv', 'csv;wandb'])
def test_unknown_loggers_are_refused(text):
  config = conftest.tiny_config()
  config.run.loggers = text
  with pytest.raises(config_lib.ConfigError) as e:
    validate.validate(config)
  assert 'choose from tensorboard, csv, wandb' in str(e.value)
  assert '\n' not in str(e.value)


def test_no_logger_is_a_choice_and_repeats_count_once():
  assert loggers.names('') == []
  assert loggers.names('csv, tensorboard,csv') == ['csv', 'tensorboard']


def test_a_missing_package_is_said_before_anything_is_made(
    tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: (
      None if name == 'wandb' else find(name, *a)))
  config = conftest.tiny_config(run=dict(loggers='csv,wandb'))
  with pytest.raises(config_lib.ConfigError, match=r'\.\[wandb\]') as e:
    workdir_lib.setup(config, str(tmp_path / 'run'))
  assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_loggers_may_change_at_a_resume(tmp_path):
  before = conftest.tiny_config()
  path = tmp_path / 'config.json'
  metrics.write_json(str(path), workdir_lib.config_io.to_dict(before))
  after = conftest.tiny_config(run=dict(loggers='csv'))
  workdir_lib._same_config(str(path), after)
  after.seed = 1
  with pytest.raises(config_lib.ConfigError, match='seed'):
    workdir_lib._same_config(str(path), after)


class _Fake(types.ModuleType):
  """What `loggers` uses of wandb; keeps what a server would."""

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    self.run, self.begun, self.sent, self.axes = None, [], [], {}
    self.broken = False

  def init(self, **kw):
    if self.broken:
      raise RuntimeError('api_key not configured\nand more')
    self.begun.append(kw)
    self.run = self
    self.id = kw['id']
    return self

  def define_metric(self, name, step_metric):
    self.axes[name] = step_metric

  def log(self, row):
    if self.broken:
      raise ConnectionError('gone')
    self.sent.append(row)

  def finish(self):
    self.run = None


@pytest.fixture(name='wandb')
def _wandb(monkeypatch):
  fake = _Fake()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  return fake


def _steps(fake, name='step'):
  return [row[name] for row in fake.sent if name in row]


def test_wandb_has_one_run_a_workdir_and_each_step_once(tmp_path, wandb):
  (tmp_path / 'config.json').write_text('{"seed": 7}')
  _go_on(tmp_path, 'warmup', None, (20, 40), 'wandb').close()
  assert wandb.run is not None  # goes on into RL
  _go_on(tmp_path, 'rl', None, (0, 1, 2, 3, 4), 'wandb')
  wandb.run = None  # killed
  _go_on(tmp_path, 'rl', 2, (3, 4, 5), 'wandb').close()
  assert wandb.run is None
  assert _steps(wandb) == list(range(6))
  assert _steps(wandb, 'warmup/step') == [20, 40]
  ids = {kw['id'] for kw in wandb.begun}
  assert len(wandb.begun) == 2 and ids == {
      json.loads((tmp_path / 'wandb.json').read_text())['id']}
  assert all(kw['resume'] == 'allow' and kw['config'] == {'seed': 7}
             and kw['name'] == tmp_path.name for kw in wandb.begun)
  assert wandb.axes['mtp_1/loss'] == wandb.axes['occ/lambda'] == 'step'
  assert wandb.axes['warmup/mtp_1/loss'] == wandb.axes['warmup/loss'] == (
      'warmup/step')
  assert 'occ/lambda' not in next(r for r in wandb.sent if r.get('step') == 3)


def test_wandb_may_break_and_catches_up(tmp_path, wandb, capsys):
  writer = _go_on(tmp_path, 'rl', None, (0, 1), 'wandb')
  wandb.broken = True
  for step in 2, 3:
    writer.write(step, {'lr': 0.})
  writer.close()
  said = capsys.readouterr().err.strip()
  assert said.startswith('wandb gets no more rows (ConnectionError: gone)')
  assert '\n' not in said and _steps(wandb) == [0, 1]
  wandb.broken, wandb.run = False, None
  _go_on(tmp_path, 'rl', 3, (4,), 'wandb')
  assert _steps(wandb) == list(range(5))


def test_wandb_that_cannot_start_ends_the_run_with_a_sentence(tmp_path, wandb):
  wandb.broken = True
  with pytest.raises(config_lib.ConfigError, match='WANDB_MODE=offline') as e:
    _go_on(tmp_path, 'rl', None, (), 'csv,wandb')
  assert 'api_key not configured' in str(e.value) and '\n' not in str(e.value)
  wandb.broken = False
  (tmp_path / 'wandb.json').write_text('{"id": 3}')
  with pytest.raises(config_lib.ConfigError, match='wandb.json cannot be read'):
    _go_on(tmp_path, 'rl', None, (), 'wandb')


def test_the_real_wandb_works_offline(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  _go_on(tmp_path, 'warmup', None, (20,), 'wandb').close()
  _go_on(tmp_path, 'rl', None, (0, 1, 2), 'wandb').close()
  _go_on(tmp_path, 'rl', 1, (2, 3), 'wandb').close()
  known = json.loads((tmp_path / 'wandb.json').read_text())
  assert known['last'] == {'warmup': 20, 'rl': 3}
  runs = [n for n in os.listdir(tmp_path / 'wandb') if n.startswith('offline-')]
  assert runs and all(n.endswith(known['id']) for n in runs)
