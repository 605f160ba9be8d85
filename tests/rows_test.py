"""Files of rows, damaged on purpose; TensorBoard after kills; full disks."""

import csv
import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

from mtp_rl import config as config_lib
from mtp_rl import config_io, trainer
from mtp_rl.run import loggers, metrics
from mtp_rl.run import workdir as workdir_lib
from tests import conftest, distributed_test


def _config(**sections):
  return conftest.tiny_config(
      mtp=dict(modules=0, regime='rl_only'), model=dict(n_layers=1),
      warmup=dict(steps=60), **sections)


def _points(workdir):
  """{phase: {tag: [(step, value)]}}, as TensorBoard reads the events."""
  out = {}
  for phase in ('warmup', 'rl'):
    seen = event_accumulator.EventAccumulator(
        str(pathlib.Path(workdir, 'events', phase)), {'scalars': 0}).Reload()
    out[phase] = {
        tag: [(e.step, e.value) for e in seen.Scalars(tag)]
        for tag in seen.Tags()['scalars'] if not tag.startswith(
            metrics.VOLATILE)}
  return out


def _table(path):
  """The rows of a CSV file, without what differs between equal runs."""
  with open(path, encoding='utf-8', newline='') as f:
    return [{k: v for k, v in row.items()
             if not k.startswith(metrics.VOLATILE)}
            for row in csv.DictReader(f)]


def _write(path, steps):
  path.write_text(''.join(
      json.dumps({'step': s, 'x': s / 10, 'val/a/greedy': s / 100}) + '\n'
      for s in steps))


def test_the_events_of_a_phase_survive_kills(tmp_path):
  """Written by the real writer, which is never closed."""
  def go_on(phase, saved, steps):
    writer = metrics.Writer(str(tmp_path / f'{phase}.jsonl'),
                            str(tmp_path / 'events' / phase), saved)
    for step in steps:
      writer.write(step, {'lr': step / 8})
    writer.flush()
    return writer
  first = go_on('warmup', 0, (20, 40))
  go_on('warmup', 20, (40, 60))
  go_on('rl', None, (0,))  # killed before its checkpoint
  go_on('rl', None, (0, 1, 2, 3, 4))
  go_on('rl', 2, ())
  go_on('rl', 2, (3, 4, 5))
  first.close()
  newest = max((tmp_path / 'events' / 'rl').iterdir())
  with open(newest, 'rb+') as f:  # the kill also cut an event short
    f.truncate(newest.stat().st_size - 3)
  go_on('rl', 4, (5, 6))
  assert _points(tmp_path) == {
      'warmup': {'lr': [(s, s / 8) for s in (20, 40, 60)]},
      'rl': {'lr': [(s, s / 8) for s in range(7)]}}


def _refused(workdir, said):
  """A sentence, and no row has changed."""
  state = lambda: {p: p.read_bytes() for p in workdir.glob('*.jsonl')}
  before = state()
  with pytest.raises(config_lib.ConfigError, match=said) as e:
    trainer.train(_config(), str(workdir))
  assert '\n' not in str(e.value) and state() == before


@pytest.mark.parametrize('name, number', [
    ('metrics.jsonl', 2), ('samples.jsonl', 1), ('warmup.jsonl', 1)])
@pytest.mark.parametrize('line', [
    b'123', b'\xff\x00\x80', b'{"step": 1', b'{"Step": 1}', b'[' * 9999, b'',
    b'{"step": "1"}'])
def test_a_garbled_line_is_refused_by_its_number(name, number, line, tmp_path):
  _write(tmp_path / name, range(3))
  lines = (tmp_path / name).read_bytes().split(b'\n')
  lines[number - 1] = line
  (tmp_path / name).write_bytes(b'\n'.join(lines))
  _refused(tmp_path, f'{name} is damaged: its line {number} is no row')


def test_rows_without_their_checkpoint_are_not_dropped(tmp_path):
  _write(tmp_path / 'metrics.jsonl', range(5))
  _refused(tmp_path, 'metrics.jsonl has rows up to step 4, but .* no check')


@pytest.mark.parametrize('end', [b'{"step": 5, "lr', b'\0\0\0', b'\xff'])
def test_a_last_line_cut_short_is_left_out(end, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"step": 1,  "x": 1e0}\n' + end)
  assert metrics.read(str(path)) == [{'step': 1, 'x': 1.}]
  metrics.keep_until(str(path), 7)
  assert path.read_bytes() == b'{"step": 1,  "x": 1e0}\n'
  path.write_bytes(b'{"step": 1}\n{"step": 2}')  # only the newline is missing
  metrics.keep_until(str(path), 7)
  assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize('kept, said, first, last', [
    ((), '5 steps that were made, 0 to 4', {}, {}),
    ((0, 1), '3 steps that were made, 2 to 4', 0., {}),
    ((3, 4), '3 steps that were made, 0 to 2', {}, .04)])
def test_lost_rows_are_said_and_not_made_up(kept, said, first, last, tmp_path,
                                            capsys):
  path, _ = tmp_path / 'metrics.jsonl', (tmp_path / 'figures').mkdir()
  _write(path, kept)
  metrics.keep_until(str(path), 4, range(9))
  assert f'metrics.jsonl has no rows of {said}' in capsys.readouterr().err
  config = _config()
  metrics.write_json(str(tmp_path / 'config.json'), config_io.to_dict(config))
  run = workdir_lib.Run(config, str(tmp_path), None, None, None)
  summary = trainer.finish(run, 'complete')
  value = lambda x: x if x == {} else {'val/a/greedy': x}
  assert summary['after_warmup'] == value(first)
  assert summary['last'] == value(last) and summary['step'] == 4
  metrics.keep_until(str(path), None, range(9))
  assert not capsys.readouterr().err and not metrics.read(str(path))


def _full(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('owner, name', [
    (loggers.event_file_writer.EventsWriter, 'write_event'),
    (loggers.event_file_writer.EventsWriter, 'flush'),
    (metrics.os, 'fsync')])
def test_a_full_disk_is_met_by_the_thread_that_trains(owner, name, tmp_path,
                                                      monkeypatch):
  writer = metrics.Writer(str(tmp_path / 'x.jsonl'), str(tmp_path / 'e'), None)
  monkeypatch.setattr(owner, name, _full)
  with pytest.raises(OSError) as e:
    for step in range(99):  # more than any queue holds
      writer.write(step, {'lr': 1.})
    writer.flush()
  assert e.value.errno == errno.ENOSPC


@pytest.mark.long
def test_tensorboard_shows_the_same_points_after_kills(
    tmp_path, monkeypatch):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  names = 'csv,tensorboard'
  trainer.train(_config(run=dict(loggers=names)), str(whole))
  wanted = _points(whole)
  assert [s for s, _ in wanted['warmup']['lr']] == [20, 40, 60]
  assert [s for s, _ in wanted['rl']['reward/mean']] == [1, 2, 3, 4]
  assert [s for s, _ in wanted['rl']['val/arithmetic/greedy']] == [0, 2, 4]
  rows = metrics.read(str(whole / 'metrics.jsonl'))
  assert [v for _, v in wanted['rl']['actor/entropy']] == pytest.approx(
      [r['actor/entropy'] for r in rows[1:]])

  write, kills = metrics.Writer.write, [('warmup', 40), ('rl', 0), ('rl', 3),
                                        ('rl', 4)]
  def kill(self, step, values):
    row = write(self, step, values)
    phase = 'warmup' if 'warmup/loss' in values else 'rl'
    if kills and kills[0] == (phase, step):
      self.flush()  # as if the last rows had just reached the disk
      del kills[0]
      raise KeyboardInterrupt
    return row
  monkeypatch.setattr(metrics.Writer, 'write', kill)
  config = _config(run=dict(checkpoint_every=1, loggers=names))
  for _ in range(len(kills)):
    with pytest.raises(KeyboardInterrupt):
      trainer.train(config, str(killed))
  newest = max((killed / 'events' / 'rl').iterdir())
  with open(newest, 'rb+') as f:  # the kill also cut an event short
    f.truncate(newest.stat().st_size - 3)
  trainer.train(config, str(killed))
  assert not kills and _points(killed) == wanted
  for name in 'warmup.csv', 'metrics.csv':
    assert _table(killed / name) == _table(whole / name)


@pytest.fixture(name='small_disk')
def _small_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=140m', 'none', disk],
                    capture_output=True).returncode:
    pytest.skip('no right to mount a disk')
  yield disk
  subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.long
def test_a_disk_that_fills_during_rl_ends_the_run(small_disk, tmp_path):
  """In time and with a sentence; with room again the same command goes on."""
  workdir, path = small_disk / 'run', tmp_path / 'config.json'
  metrics.write_json(str(path), config_io.to_dict(_config(
      rl=dict(steps=20), run=dict(checkpoint_every=1), eval=dict(every=1))))
  command = [sys.executable, '-m', 'experiments.train',
             f'--config=configs/from_json.py:{path}', f'--workdir={workdir}']
  start = lambda: subprocess.Popen(
      command, cwd=distributed_test.ROOT, text=True, stderr=subprocess.PIPE,
      env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  child = start()
  distributed_test._wait_for(str(workdir), 2, [child])
  with pytest.raises(OSError), open(small_disk / 'filler', 'wb') as f:
    while True:
      f.write(bytes(2 ** 20))
      f.flush()
  _, err = child.communicate(timeout=60)
  # Threads of tensorstore may print beside it that their loop is closed.
  said = re.findall('error: .*the same command goes on from the last', err)
  assert child.returncode == 4 and len(said) == 1, err
  (small_disk / 'filler').unlink()
  child = start()
  _, err = child.communicate(timeout=200)
  assert child.returncode == 0, err
  steps = [r['step'] for r in metrics.read(str(workdir / 'metrics.jsonl'))]
  assert steps == list(range(21))
  assert [s for s, _ in _points(workdir)['rl']['reward/mean']] == steps[1:]
