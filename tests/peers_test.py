"""A process of several that stops, hangs, dies or fails ends all of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mtp_rl.run import metrics, peers
from tests import distributed_test

LOST_S, PATIENCE_S = 8, 6
_FAULTY = f'''
import errno, os, sys, time
from experiments import launch
from mtp_rl import config as config_lib
from mtp_rl import distributed as d
from mtp_rl.run import peers

launch.define_processes()
d.PATIENCE_S = {PATIENCE_S}
fault = sys.argv.pop(1)
if fault != 'kill':  # a lost connection tells of it, not silence
  peers.LOST_S = {LOST_S}

def main():
  if fault == 'hang':
    d.be_patient(d.PATIENCE_S)
  else:
    d.be_patient(3600.)
  d.barrier()
  print('met', flush=True)
  for i in range(10 ** 6):
    if i == 20 and d.index() == 1:
      if fault == 'hang':
        time.sleep(999)
      if fault == 'defect':
        raise AssertionError('a defect of process 1')
      if fault == 'setting':
        raise config_lib.ConfigError('process 1 alone found a fault')
    if i == 20 and d.index() == 0 and fault == 'full':
      raise OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl')
    d.any_of(False)
    time.sleep(.01)

sys.argv = [sys.argv[0], '--workdir=unused', *sys.argv[1:]]
launch.run(main)
'''


def _start(fault):
  children = distributed_test._start(['-c', _FAULTY, fault])
  for child in children:
    while 'met' not in child.stdout.readline():
      assert child.poll() is None, child.stderr.read()
  return children


def _errors(text):
  return [x for x in text.splitlines() if x.startswith('error: ')]


@pytest.mark.long
@pytest.mark.parametrize('victim', [0, 1])
def test_a_stopped_process_ends_the_others(victim):
  children = _start('none')
  start = time.monotonic()
  children[victim].send_signal(signal.SIGSTOP)
  other = children[1 - victim]
  _, err = other.communicate(timeout=60)
  assert time.monotonic() - start < LOST_S + 12
  assert other.returncode == 4, err
  assert _errors(err) == [
      f'error: process {victim} of the run has shown no sign of life for '
      f'{LOST_S} s; the same command goes on from the last checkpoint']
  assert 'Traceback' not in err
  children[victim].send_signal(signal.SIGCONT)  # it finds nobody
  assert children[victim].wait(60) != 0


@pytest.mark.long
@pytest.mark.parametrize('fault, codes, said', [
    ('hang', (4, 4), 'the last is process 1; the same command'),
    ('defect', (1, 1), 'process 1 ended the run: AssertionError: a defect of'),
    ('setting', (2, 2), 'process 1 alone found a fault'),
    ('full', (4, 4), 'No space left on device (metrics.jsonl); make room')])
def test_what_one_process_meets_ends_all_with_its_code(fault, codes, said):
  start = time.monotonic()
  done = distributed_test._end(_start(fault), seconds=60)
  assert time.monotonic() - start < 40
  assert tuple(code for code, *_ in done) == codes, done
  for i, (_, _, err) in enumerate(done):
    errors = _errors(err)
    if (fault, i) == ('defect', 1):
      assert 'Traceback' in err and not errors
      continue
    assert len(errors) == 1 and said in errors[0], err
    assert 'Traceback' not in err


@pytest.mark.long
def test_a_killed_process_ends_the_other_with_a_sentence():
  """Gloo may say nothing of the lost connection; then silence tells of it."""
  children = _start('kill')
  children[1].kill()
  _, err = children[0].communicate(timeout=peers.LOST_S + 30)
  assert children[0].returncode == 4, err
  (error,) = _errors(err)
  assert ('another process of the run has gone' in error or
          f'process 1 of the run has shown no sign of life for '
          f'{peers.LOST_S:.0f} s' in error), err
  assert 'Traceback' not in err


@pytest.mark.long
def test_a_run_with_a_stopped_process_ends_and_goes_on(tmp_path):
  """A real run: the checkpoint is whole, the same command completes it."""
  workdir = str(tmp_path / 'run')
  config = distributed_test._config('moe')
  flags = distributed_test._train(config, workdir)[2:]
  quick = ('from mtp_rl.run import peers; peers.LOST_S = 10; '
           'from experiments import train; train.launch.run(train.main)')
  children = distributed_test._start(['-c', quick, *flags])
  distributed_test._wait_for(workdir, 1, children)
  children[1].send_signal(signal.SIGSTOP)
  _, err = children[0].communicate(timeout=100)
  assert children[0].returncode == 4, err
  children[1].kill()
  children[1].communicate()
  for code, out, err in distributed_test._end(distributed_test._start(
      ['-m', 'experiments.train', *flags])):
    assert code == 0, out + err
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  assert [r['step'] for r in rows] == [0, 1, 2, 3]


_LONELY = '''
from experiments import launch
from mtp_rl import distributed
import sys
distributed.CONNECT_S, distributed._NOTE_S = 3, 1
launch.define_processes()
sys.argv = [sys.argv[0], '--workdir=unused', *sys.argv[1:]]
launch.run(lambda: None)
'''


@pytest.mark.parametrize('alone, code, said', [
    (0, 4, 'not all processes of the run have come within 3 s'),
    (1, 2, 'nobody listens at --coordinator=')])
def test_a_process_that_waits_in_vain_says_so_and_ends(alone, code, said):
  both = distributed_test._start(['-c', 'import time; time.sleep(30)'])
  flags = both[alone].args[3:]
  for child in both:
    child.kill()
    child.communicate()
  child = subprocess.run([sys.executable, '-c', _LONELY, *flags],
                         cwd=distributed_test.ROOT, capture_output=True,
                         text=True, timeout=60)
  assert child.returncode == code, child.stderr
  assert 'waiting for' in child.stderr and ' for 3 s at most' in child.stderr
  assert said in child.stderr and 'Traceback' not in child.stderr
