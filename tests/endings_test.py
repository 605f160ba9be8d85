"""How runs end: signals, exit codes, dead terminals, paths, --help."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from mtp_rl import config_io
from mtp_rl.run import metrics
from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent
QUICK = '--config=configs/quickstart.py'

_WAITING = '''
import hashlib, sys
from mtp_rl.run import signals
with signals.interruptible() as stopped:
  print('ready', flush=True)
  # Compiled code: no Python handler runs before it ends.
  hashlib.pbkdf2_hmac('sha256', b'', b'', int(sys.argv[1]))
  print('stopped' if stopped() else 'nothing came', flush=True)
'''


def _hear():
  """Hear what a shell's background job (SIGINT) or nohup (SIGHUP) ignores."""
  for name in (signal.SIGINT, signal.SIGHUP):
    signal.signal(name, signal.SIG_DFL)


def _child(code, *args, **kw):
  return subprocess.Popen([sys.executable, '-c', code, *args], cwd=ROOT,
                          text=True, **dict(
                              preexec_fn=_hear, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) | kw)


@pytest.mark.parametrize('first, second, code', [
    (signal.SIGINT, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 130),
    (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGHUP, 129)])
def test_a_second_signal_of_any_kind_ends_at_once(first, second, code):
  child = _child(_WAITING, str(10 ** 9))
  try:
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(first)
    while 'once more' not in (line := child.stderr.readline()):
      assert child.poll() is None, line
    child.send_signal(second)
    out, err = child.communicate(timeout=20)
  finally:
    child.kill()
  assert child.returncode == code and not out and 'Traceback' not in err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM,
                                    signal.SIGHUP])
def test_one_signal_asks_for_a_stop(number):
  child = _child(_WAITING, '1000000')
  assert child.stdout.readline() == 'ready\n'
  child.send_signal(number)
  if number == signal.SIGHUP:
    child.send_signal(number)  # a terminal that goes says so more than once
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out) == (0, 'stopped\n'), err


def test_under_nohup_a_lost_terminal_stops_nothing():
  child = _child(_WAITING, '1000000',
                 preexec_fn=lambda: signal.signal(signal.SIGHUP,
                                                  signal.SIG_IGN))
  assert child.stdout.readline() == 'ready\n'
  child.send_signal(signal.SIGHUP)
  assert child.communicate(timeout=60)[0] == 'nothing came\n'


_LAUNCHER = '''
import errno, sys
from experiments import launch
from mtp_rl.run import endings
def main():
  for i in range(3):
    print('a line', file=sys.stderr, flush=True)
    launch.say('a line')
  what = sys.argv[2]
  if what == 'full':
    raise OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl')
  if what == 'diverged':
    raise endings.DivergedError('it diverged')
  if what == 'interrupt':
    raise KeyboardInterrupt
  if what == 'defect':
    raise OSError(errno.EBADF, 'a defect')
  sys.exit(5)
sys.argv = [sys.argv[0], '--workdir=' + sys.argv[1], *sys.argv[2:]]
from absl import app
launch._parse = lambda argv: launch.flags.FLAGS(argv[:2])
launch.run(main)
'''


@pytest.mark.parametrize('closed', [True, False])
def test_a_dead_terminal_does_not_matter(closed):
  read, write = os.pipe()
  os.close(read)
  kw = dict(stdout=write, stderr=write)
  if not closed:  # never opened at all
    kw = dict(preexec_fn=lambda: (os.close(1), os.close(2)), stdout=None,
              stderr=None)
  child = _child(_LAUNCHER, 'run', 'end', **kw)
  assert child.wait(60) == 5
  os.close(write)


@pytest.mark.parametrize('what, code, said', [
    ('full', 4, 'error: No space left on device (metrics.jsonl); make room'),
    ('diverged', 3, 'error: it diverged'), ('interrupt', 130, ''),
    ('defect', 1, 'Traceback')])
def test_each_ending_has_its_code(what, code, said):
  child = _child(_LAUNCHER, 'run', what)
  _, err = child.communicate(timeout=60)
  assert child.returncode == code and said in err
  assert ('Traceback' in err) == (what == 'defect')


def test_a_home_is_expanded_and_a_name_beyond_the_locale_is_refused(tmp_path):
  run = lambda workdir, **env: subprocess.run(
      [sys.executable, '-m', 'experiments.evaluate', f'--workdir={workdir}'],
      cwd=ROOT, capture_output=True, text=True, timeout=60,
      env=os.environ | env)
  done = run('~/x', HOME=str(tmp_path))
  assert f'{tmp_path}/x/config.json does not exist' in done.stderr
  done = run(tmp_path / 'läuft', LC_ALL='C', PYTHONUTF8='0')
  assert done.returncode == 2 and 'set PYTHONUTF8=1' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_the_launchers_flags_and_where_the_others_stand():
  done = subprocess.run([sys.executable, '-m', 'experiments.compare', '--help'],
                        cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and not done.stderr
  for said in ('Regimes x estimators', '--workdir: Directory of the run.',
               '--config: Config file.', '--seeds: Number of seeds. [5]',
               '--[no]report_only', '--config.SECTION.FIELD', '--helpfull'):
    assert said in done.stdout, said
  assert 'xla' not in done.stdout and len(done.stdout.splitlines()) < 40


def _tiny_run(workdir, **sections):
  path = f'{workdir}.json'
  config = conftest.tiny_config(
      mtp=dict(modules=0, regime='rl_only'), model=dict(n_layers=1),
      rl=dict(steps=60) | sections.get('rl', {}), eval=dict(every=2000))
  metrics.write_json(path, config_io.to_dict(config))
  return ['-m', 'experiments.train', f'--config=configs/from_json.py:{path}',
          f'--workdir={workdir}']


def _wait_for(workdir, step, child):
  path = os.path.join(workdir, 'metrics.jsonl')
  deadline = time.monotonic() + 200
  while not os.path.exists(path) or open(path).read().count('\n') <= step:
    assert child.poll() is None and time.monotonic() < deadline
    time.sleep(.01)


@pytest.mark.long
def test_a_lost_connection_stops_with_a_checkpoint_and_a_code(tmp_path):
  """SIGHUP while stderr and stdout are dead, then the same command again."""
  workdir = str(tmp_path / 'run')
  command = [sys.executable, *_tiny_run(workdir)]
  read, write = os.pipe()
  child = subprocess.Popen(command, cwd=ROOT, stdout=write, stderr=write,
                           preexec_fn=_hear)
  os.close(write)
  _wait_for(workdir, 3, child)
  os.close(read)
  child.send_signal(signal.SIGHUP)
  assert child.wait(60) == 75
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  assert 3 <= rows[-1]['step'] < 60
  assert os.path.isdir(os.path.join(workdir, 'checkpoints', 'rl',
                                    str(rows[-1]['step'])))
  assert subprocess.run(command, cwd=ROOT, timeout=200).returncode == 0


@pytest.mark.long
def test_a_notice_of_preemption_saves(tmp_path):
  """By JAX's preemption service, whose notice on this platform is SIGTERM."""
  workdir = str(tmp_path / 'run')
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = [sys.executable, *_tiny_run(workdir, rl=dict(steps=2000)),
             f'--coordinator=localhost:{port}', '--processes=1', '--process=0']
  child = subprocess.Popen(
      command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
      env=os.environ | {'JAX_ENABLE_PREEMPTION_SERVICE': '1'})
  _wait_for(workdir, 3, child)
  child.send_signal(signal.SIGTERM)
  _, err = child.communicate(timeout=100)
  assert child.returncode == 75, err
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  assert os.path.isdir(os.path.join(workdir, 'checkpoints', 'rl',
                                    str(rows[-1]['step'])))
