"""One owner per workdir: refused, taken over, released."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from mtp_rl import config as config_lib
from mtp_rl.run import endings, owner

ROOT = pathlib.Path(__file__).parent.parent
_CHILD = '''
import sys, time
from mtp_rl.run import owner
owner.TOUCH_S = .05
owner.take(sys.argv[1])
print('ready', flush=True)
time.sleep(float(sys.argv[2]))
'''


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(owner, 'TOUCH_S', .05)
  monkeypatch.setattr(owner, 'STALE_S', 1.)
  yield
  owner.release()


def _child(where, seconds=60):
  child = subprocess.Popen(
      [sys.executable, '-c', _CHILD, str(where), str(seconds)], cwd=ROOT,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert child.stdout.readline() == 'ready\n', child.communicate()
  return child


def _refused(where):
  with pytest.raises(config_lib.ConfigError, match='still running') as e:
    owner.take(where)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, capsys):
  child = _child(tmp_path)
  said = _refused(tmp_path)
  assert f'process id {child.pid} on {os.uname().nodename}, started 20' in said
  child.kill()  # not yet waited for: a zombie is gone
  while owner.describe(tmp_path).alive:
    time.sleep(.01)
  owner.take(tmp_path)
  assert 'which is gone; this run takes over' in capsys.readouterr().err
  owner.take(tmp_path)  # what it has already
  owner.release()
  assert os.listdir(tmp_path) == [] and owner.describe(tmp_path) is None
  child.communicate()


def test_an_ended_run_leaves_no_lock(tmp_path):
  child = _child(tmp_path, seconds=0)
  assert child.communicate() == ('', '') and os.listdir(tmp_path) == []
  @owner.releasing
  def run():
    owner.take(tmp_path)
    raise ValueError
  with pytest.raises(ValueError):
    run()
  assert os.listdir(tmp_path) == []


def _elsewhere(where, **changes):
  values = {'host': 'far', 'pid': os.getpid(), 'started': 'before',
            'machine': 'another', 'process': '1', 'token': 'x'} | changes
  (where / owner.NAME).write_text(json.dumps(values))


def test_an_owner_elsewhere_is_gone_where_it_gives_no_sign(tmp_path, capsys):
  _elsewhere(tmp_path)
  owner.take(tmp_path)
  said = capsys.readouterr().err
  assert 'on far, started before: waiting for its next sign' in said
  assert 'takes over' in said


def test_an_owner_elsewhere_lives_where_it_gives_a_sign(tmp_path):
  _elsewhere(tmp_path)
  later = threading.Timer(.2, os.utime, [tmp_path / owner.NAME])
  later.start()
  assert 'on far' in _refused(tmp_path)
  later.join()


@pytest.mark.parametrize('text', ['', '{', '[1]', '{"pid": "x"}'])
def test_a_damaged_lock_holds_until_it_is_old(text, tmp_path, capsys):
  (tmp_path / owner.NAME).write_text(text)
  assert owner.describe(tmp_path).alive
  os.utime(tmp_path / owner.NAME, (0, 0))
  owner.take(tmp_path)
  assert 'lock file is damaged' in capsys.readouterr().err


def test_a_reused_process_id_is_not_the_owner(tmp_path):
  owner.take(tmp_path)
  text = (tmp_path / owner.NAME).read_text()
  owner.release()
  (tmp_path / owner.NAME).write_text(json.dumps(
      json.loads(text) | {'process': '1'}))
  assert not owner.describe(tmp_path).alive
  owner.take(tmp_path)


def test_of_many_at_once_one_gets_a_stale_lock(tmp_path):
  _elsewhere(tmp_path)
  os.utime(tmp_path / owner.NAME, (0, 0))
  children = [subprocess.Popen(
      [sys.executable, '-c', _CHILD, str(tmp_path), '3'], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
  said = [child.communicate(timeout=60) for child in children]
  assert sum(out == 'ready\n' for out, _ in said) == 1, said
  assert sum('still running' in err for _, err in said) == 3, said


def test_a_run_whose_workdir_was_taken_over_ends(tmp_path):
  child = _child(tmp_path)
  (tmp_path / owner.NAME).unlink()
  while not (tmp_path / owner.NAME).exists():
    time.sleep(.01)  # it puts back what was cleaned up
  assert child.poll() is None
  _elsewhere(tmp_path)
  _, err = child.communicate(timeout=20)
  assert child.returncode == endings.ENVIRONMENT
  assert 'another one has taken over' in err and 'Traceback' not in err
