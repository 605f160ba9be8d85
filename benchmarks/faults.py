r"""Faults injected into short runs: kills, signals, full disks, flipped bits.

    python -m benchmarks.faults --kills=50 --out=FILE.json

Each trial hits a run of its own with one kind of fault, lets the same command
resume until the run is complete, and compares what it leaves with a run that
nothing has hit. A trial that ends is written to FILE.json at once; the same
command goes on after the last one. The exit code is 1 where something was lost.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from tensorboardX.proto import event_pb2

from mtp_rl import config as config_lib
from mtp_rl.report import tables
from mtp_rl.run import checkpoint, endings, metrics

ROOT = pathlib.Path(__file__).parent.parent
SHORT = {
    'warmup.steps': 60, 'rl.steps': 20, 'run.checkpoint_every': 3,
    'run.progress': False, 'model.n_layers': 1, 'model.d_model': 32,
    'task.held_out': 64, 'eval.every': 10, 'eval.samples': 2}
# A task whose answers are verified in processes of their own.
VERIFIED = SHORT | {'warmup.steps': 3, 'rl.steps': 8, 'rl.prompts': 8,
                    'rl.group': 4, 'task.processes': 2}
KINDS = {
    'kill': 'kill -9 (start-up, warm-up, RL, during a save)',
    'term': 'SIGTERM, then the same command',
    'stop': 'SIGSTOP for .5 to 2 s, then SIGCONT',
    'disk': 'disk full during RL, then room again',
    'flip': '1 to 3 bits flipped in a file of a checkpoint',
    'resume': 'the same, and the run resumed to its end',
    'verifier': 'a process of the verifiers killed'}
A_RUN = {'kill': 5, 'stop': 3, 'verifier': 3}  # faults in one trial
SMALL_MIB = 160


class Campaign:
  """What the trials share.

  Attributes:
    folder: pathlib.Path, of their workdirs.
    clock: seconds that a process may take until it counts as hanging.
  """

  def __init__(self, folder, clock):
    """Make the folder."""
    self.folder, self.clock = folder, clock
    folder.mkdir(parents=True, exist_ok=True)

  def start(self, workdir, config='quickstart', settings=None):
    """Start a run, and return its process."""
    flags = [f'--config.{k}={v}' for k, v in (settings or SHORT).items()]
    # Compiled programs are shared: a resumed run takes seconds.
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
        [sys.executable, '-m', 'experiments.train',
         f'--config=configs/{config}.py', f'--workdir={workdir}', *flags],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE)

  def end(self, process):
    """Return (exit code or 'hang', stderr) of a process."""
    try:
      _, said = process.communicate(timeout=self.clock)
      return process.returncode, said
    except subprocess.TimeoutExpired:
      process.kill()
      return 'hang', process.communicate()[1]

  def whole(self):
    """Return the workdir of a run that nothing hits."""
    workdir = self.folder / 'whole'
    if not (workdir / 'summary.json').exists():
      shutil.rmtree(workdir, ignore_errors=True)
      code, said = self.end(self.start(workdir))
      assert code == endings.COMPLETE, said
    return workdir


def _rows(path):
  return [{k: v for k, v in row.items() if not k.startswith(metrics.VOLATILE)}
          for row in metrics.read(path)]


def points(folder):
  """Return {(sub-folder, tag, step): value} of events, as TensorBoard shows.

  A START drops what came before it from its step on.
  """
  out = {}
  for path in sorted(folder.rglob('*tfevents*')):
    where, data = str(path.parent.relative_to(folder)), path.read_bytes()
    while len(data) >= 12:
      size = int.from_bytes(data[:8], 'little')
      if len(data) < size + 16:
        break  # cut off by a kill
      event = event_pb2.Event.FromString(data[12:12 + size])
      data = data[size + 16:]
      if event.session_log.status == event_pb2.SessionLog.START:
        out = {k: v for k, v in out.items()
               if k[0] != where or k[2] < event.step}
      for value in event.summary.value:
        out[where, value.tag, event.step] = value.simple_value
  return {k: None if k[1].startswith(metrics.VOLATILE) else v
          for k, v in out.items()}


def _arrays(where):
  """Return the arrays of a checkpoint: path -> bytes."""
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes()
          for path, x in jax.tree.leaves_with_path(ocp.load(where))}


def _states(workdir):
  """Return the newest states of both phases."""
  newest = {p: _latest(workdir, p) for p in ('warmup', 'rl')}
  return newest, [_arrays(workdir / 'checkpoints' / p / str(step))
                  for p, step in newest.items()]


def differing(workdir, other):
  """Return the names of what differs between two complete runs, bit by bit."""
  out = [name for name in ('warmup', 'metrics', 'samples')
         if _rows(workdir / f'{name}.jsonl') != _rows(other / f'{name}.jsonl')]
  if _states(workdir) != _states(other):
    out.append('state')
  a, b = points(workdir / 'events'), points(other / 'events')
  return out + (['events'] if a != b else [])


def _finish(campaign, workdir, trial):
  """Run to the end; note whether it survived and what differs."""
  code, said = campaign.end(campaign.start(workdir))
  trial['codes'].append(code)
  trial['survived'] = trial['survived'] and code == endings.COMPLETE
  if not trial['survived']:
    trial['said'] = said[-2000:]
    return trial
  trial['differs'] = differing(workdir, campaign.whole())
  return trial


def _trial(faults=0):
  return {'faults': faults, 'survived': True, 'codes': []}


def _wait(process, clock, condition):
  """Return whether a condition came true before a process ended."""
  deadline = time.monotonic() + clock
  while not condition():
    if process.poll() is not None or time.monotonic() > deadline:
      return False
    time.sleep(.002)
  return True


def _names(workdir, phase):
  with contextlib.suppress(FileNotFoundError):
    return os.listdir(workdir / 'checkpoints' / phase)
  return []


def _latest(workdir, phase):
  return max((int(n) for n in _names(workdir, phase) if n.isdecimal()),
             default=-1)


def _moment(rng, workdir, target):
  """Return () -> bool that says when to strike, and the seconds after that."""
  if target == 'start-up':
    return lambda: True, rng.uniform(0., 4.)
  there = {p: _latest(workdir, p) for p in ('warmup', 'rl')}
  phase = 'rl' if there['warmup'] >= SHORT['warmup.steps'] or (
      target == 'rl') else 'warmup'
  most = SHORT[f'{phase}.steps'] - 3
  reach = min(most, there[phase] + rng.randint(1, 6 if phase == 'rl' else 20))
  reached = lambda: _latest(workdir, phase) >= reach
  if target != 'save':
    return reached, rng.uniform(0., .3)
  def writing():
    return reached() and any('.part' in n for n in _names(workdir, phase))
  return writing, rng.uniform(0., .04)


def _strike(campaign, rng, workdir, process, target):
  """Wait for the moment; return whether the process still lives then."""
  condition, delay = _moment(rng, workdir, target)
  if not _wait(process, campaign.clock, condition):
    return False
  time.sleep(delay)
  return process.poll() is None


def _where(workdir, target):
  """Return what a kill has hit, in words: phase and newest checkpoint."""
  for phase in ('rl', 'warmup'):
    if any('.part' in name for name in _names(workdir, phase)):
      return f'save after {phase} {_latest(workdir, phase)}'
    if (step := _latest(workdir, phase)) >= 0 and target != 'start-up':
      return f'{phase} {step}'
  return 'start-up'


def kill(campaign, rng, workdir, count):
  """Kill a run `count` times, at once resumed each time."""
  trial = _trial() | {'at': []}
  targets = rng.sample(['start-up', 'warmup', 'rl', 'save', 'save'], count)
  for target in targets:
    process = campaign.start(workdir)
    struck = _strike(campaign, rng, workdir, process, target)
    if struck:
      process.kill()
      trial['faults'] += 1
    code, said = campaign.end(process)
    trial['codes'].append(code)
    if struck:
      trial['at'].append(_where(workdir, target))
    if code not in (-signal.SIGKILL, endings.COMPLETE):
      return trial | {'survived': False, 'said': said[-2000:]}
  return _finish(campaign, workdir, trial)


def term(campaign, rng, workdir, count):
  """Ask a run to stop, which it does with its code and a checkpoint."""
  trial = _trial()
  target = rng.choice(['start-up', 'warmup', 'rl', 'save'])
  process = campaign.start(workdir)
  if _strike(campaign, rng, workdir, process, target):
    process.terminate()
    trial['faults'] = count
  code, said = campaign.end(process)
  trial['codes'].append(code)
  # Before the run has begun, the signal simply ends the process.
  allowed = {endings.STOPPED, endings.COMPLETE} | (
      {-signal.SIGTERM} if target == 'start-up' else set())
  if code not in allowed:
    return trial | {'survived': False, 'said': said[-2000:]}
  return _finish(campaign, workdir, trial)


def stop(campaign, rng, workdir, count):
  """Suspend a run for a while, several times."""
  trial, process = _trial(), campaign.start(workdir)
  for target in ['warmup', 'save', 'rl'][:count]:
    if not _strike(campaign, rng, workdir, process, target):
      break
    process.send_signal(signal.SIGSTOP)
    time.sleep(rng.uniform(.5, 2.))
    process.send_signal(signal.SIGCONT)
    trial['faults'] += 1
  code, said = campaign.end(process)
  trial['codes'].append(code)
  if code != endings.COMPLETE:
    return trial | {'survived': False, 'said': said[-2000:]}
  return trial | {'differs': differing(workdir, campaign.whole())}


@contextlib.contextmanager
def small_disk(where):
  """Mount a disk of SMALL_MIB; yield whether that was possible."""
  where.mkdir(parents=True, exist_ok=True)
  mounted = os.geteuid() == 0 and subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', f'size={SMALL_MIB}m', 'none', where],
      capture_output=True).returncode == 0
  try:
    yield mounted
  finally:
    if mounted:
      subprocess.run(['umount', '-l', where], check=True)


def disk(campaign, rng, workdir, count):
  """Fill the disk of a run; it ends with its code, and resumes with room."""
  with small_disk(workdir) as mounted:
    if not mounted:
      return {'skipped': 'only root may mount a small disk'}
    trial, run = _trial(), workdir / 'run'
    process = campaign.start(run)
    if _strike(campaign, rng, run, process, rng.choice(['warmup', 'rl'])):
      with contextlib.suppress(OSError), open(
          workdir / 'filler', 'wb', buffering=0) as f:
        while True:
          f.write(b'0' * 4096)
      trial['faults'] = count
    code, said = campaign.end(process)
    trial['codes'].append(code)
    (workdir / 'filler').unlink(missing_ok=True)
    # A run may have ended just before.
    if code not in (endings.ENVIRONMENT, endings.COMPLETE) or (
        'Traceback' in said):
      return trial | {'survived': False, 'said': said[-2000:]}
    return _finish(campaign, run, trial)


def _flip(rng, folder):
  """Flip bits in a file of a checkpoint; return its name."""
  files = [p for p in sorted(folder.rglob('*')) if p.is_file()
           and p.stat().st_size]
  arrays = [p for p in files if p.parent.name == 'd']
  path = rng.choice(arrays if rng.random() < .5
                    else [p for p in files if p not in arrays])
  data = bytearray(path.read_bytes())
  for bit in rng.sample(range(8 * len(data)), rng.randint(1, 3)):
    data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
  return str(path.relative_to(folder))


def flip(campaign, rng, workdir, count):
  """Flip bits in the newest checkpoint; the one before it must be taken."""
  shutil.copytree(campaign.whole() / 'checkpoints' / 'rl', workdir)
  saved = checkpoint.Checkpoints(workdir, keep=2)
  *_, before, newest = saved.steps()
  trial = _trial(count) | {'file': _flip(rng, workdir / str(newest))}
  try:
    found = saved.recover()
  except config_lib.ConfigError as e:
    return trial | {'survived': False, 'said': str(e)}
  good = found == before and os.path.isdir(saved.path(f'{newest}.damaged'))
  whole = campaign.whole() / 'checkpoints' / 'rl'
  same = good and _arrays(workdir / str(found)) == _arrays(whole / str(found))
  return trial | {'survived': good, 'differs': [] if same else ['state']}


def resume(campaign, rng, workdir, count):
  """Flip bits in the newest checkpoint of either phase; the run goes on."""
  process, reach = campaign.start(workdir), rng.randint(3, 15)
  _wait(process, campaign.clock, lambda: _latest(workdir, 'rl') >= reach)
  process.kill()
  campaign.end(process)
  trial = _trial(count)
  newest = workdir / 'checkpoints' / 'rl' / str(_latest(workdir, 'rl'))
  trial['file'] = _flip(rng, newest)
  trial = _finish(campaign, workdir, trial)
  trial['survived'] &= newest.with_name(f'{newest.name}.damaged').exists()
  return trial


def _descendants(pid):
  """Return the process ids below a process."""
  parents = {}
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      fields = path.read_text().rpartition(')')[2].split()
      parents[int(path.parent.name)] = int(fields[1])
  found, last = {pid}, set()
  while found != last:
    last, found = found, found | {p for p, q in parents.items() if q in found}
  return sorted(found - {pid})


def verifier(campaign, rng, workdir, count):
  """Kill processes of the verifiers, or the one that forks them."""
  trial = _trial()
  process = campaign.start(workdir, 'reasoning_gym', VERIFIED)
  for _ in range(count):
    if not _wait(process, campaign.clock, lambda: _descendants(process.pid)):
      break
    time.sleep(rng.uniform(0., 1.))
    for pid in rng.sample(found := _descendants(process.pid), len(found))[:1]:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        trial['faults'] += 1
  code, said = campaign.end(process)
  trial['codes'].append(code)
  if code != endings.COMPLETE:
    return trial | {'survived': False, 'said': said[-2000:]}
  return trial  # an answer whose verifier dies earns nothing: not compared


def table(trials):
  """Return the Markdown table of trials: kind, tried, survived, bit-equal."""
  lines = []
  for kind, what in KINDS.items():
    mine = [t for name, t in trials.items() if name.split('_')[0] == kind]
    done = [t for t in mine if 'skipped' not in t]
    count = lambda chosen: str(sum(t['faults'] for t in chosen))
    if mine and not done:
      lines.append([what, f'skipped: {mine[0]["skipped"]}', '', '', ''])
    if not done:
      continue
    compared = [t for t in done if 'differs' in t]
    but_events = [t for t in compared if not set(t['differs']) - {'events'}]
    equal = [t for t in compared if not t['differs']]
    show = lambda chosen: count(chosen) if compared or kind != 'verifier' else (
        'not compared')
    lines.append([what, count(done), count(t for t in done if t['survived']),
                  show(but_events), show(equal) if kind != 'flip' else ''])
  return tables.markdown(
      ['fault', 'tried', 'survived', 'rows and state bit-equal',
       'events too'], lines, aligned=True)


def main():
  """Run the trials that are missing; write the file; print the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, default in dict(kills=50, terms=10, stops=15, disks=5, flips=200,
                            resumes=10, verifiers=15, seed=0).items():
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--out', required=True)
  parser.add_argument('--folder', help='of the workdirs; default: temporary')
  parser.add_argument('--clock', type=float, default=180.,
                      help='seconds until a process counts as hanging')
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  trials = json.loads(out.read_text())['trials'] if out.exists() else {}
  with contextlib.ExitStack() as stack:
    folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
    campaign = Campaign(pathlib.Path(folder).resolve(), args.clock)
    for kind in KINDS:
      wanted, index = getattr(args, f'{kind}s'), 0
      while wanted > 0:
        count = min(wanted, A_RUN.get(kind, 1))
        wanted, index = wanted - count, index + 1
        name = f'{kind}_{index}'
        if name not in trials:
          _one(campaign, kind, name, count, args.seed, trials)
          _write(out, trials)
  print(table(trials), end='')
  lost = [n for n, t in trials.items() if 'skipped' not in t
          and (not t['survived'] or t.get('differs'))]
  if lost:
    print(f'lost: {", ".join(lost)}; {out} says what')
  sys.exit(bool(lost))


def _one(campaign, kind, name, count, seed, trials):
  workdir = campaign.folder / name
  shutil.rmtree(workdir, ignore_errors=True)
  began = time.monotonic()
  trial = globals()[kind](campaign, random.Random(f'{seed} {name}'), workdir,
                          count)
  trials[name] = trial | {'seconds': round(time.monotonic() - began, 1)}
  print(f'{name}: {trials[name]}', file=sys.stderr, flush=True)
  if trial.get('survived', True):
    shutil.rmtree(workdir, ignore_errors=True)  # else kept, to look at


def _write(out, trials):
  flags = [a for a in sys.argv[1:] if '/' not in a]  # no path of a machine
  values = {'command': ' '.join(flags),
            'jax': jax.__version__, 'trials': trials}
  part = out.with_name(out.name + '.part')
  part.write_text(json.dumps(values, indent=1) + '\n')
  os.replace(part, out)


if __name__ == '__main__':
  main()
