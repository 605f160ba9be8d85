"""Two processes of four devices are one process of eight, and one device.

Each process is a launcher of its own on this machine, joined over gloo.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, distributed, sharding, train_step, trainer
from mtp_rl.evaluation import scoring
from mtp_rl.run import checkpoint, metrics
from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent
V = 14  # tokens of the task's tokenizer
KINDS = {  # model, mesh, updates of the warm-up, other settings
    'dense': (dict(remat='none'), dict(data=2, fsdp=2, tensor=2), 0,
              dict(rollout=dict(tensor=4, slots=8, draft=1))),
    'moe': (dict(remat='none', n_layers=1, experts=4, experts_per_token=2,
                 expert_ff=16), dict(data=2, fsdp=2, expert=2), 2,
            dict(rl=dict(pack=True)))}
# Rounding errors themselves: before the first update of a step the policy has
# not moved, so that delta_RL, whose direction the cosines are of, is 0. Packed
# rows are rounded up to a multiple of the devices.
NOISE = ('rollout/logprob_gap_max', 'occ/cos', 'occ/logprob/cos',
         'rollout/packed_rows')


def _config(kind, mesh=None):
  model, many, warmup, more = KINDS[kind]
  sampling = dict(more.get('rollout', {}))
  if mesh == {}:
    sampling.pop('tensor', None)
  return conftest.tiny_config(
      model=model, mesh=many if mesh is None else mesh,
      rl=dict(steps=3, kl_coef=.01, tis_cap=2., dynamic_sampling=1,
              overlong_buffer=3) | more.get('rl', {}),
      rollout=sampling,
      warmup=dict(steps=warmup), eval=dict(every=3),
      run=dict(checkpoint_every=1, keep=9))


def _start(command, processes=2, extra=None, slurm=False):
  """Start the processes of a command.

  Args:
    command: what follows `python`.
    processes: how many.
    extra: {i: flags of process i}.
    slurm: they learn of each other as from srun, not by flags.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  cache = str(ROOT / '.pytest_cache' / 'jax')
  env = os.environ | {
      'JAX_NUM_CPU_DEVICES': str(8 // processes), 'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  def one(i):
    flags = [f'--coordinator=localhost:{port}', f'--processes={processes}',
             f'--process={i}']
    more = {}
    if slurm:
      flags, more = ['--distributed'], {
          'SLURM_JOB_ID': str(port), 'SLURM_STEP_NODELIST': 'localhost',
          'SLURM_NTASKS': str(processes), 'SLURM_PROCID': str(i),
          'SLURM_LOCALID': str(i), 'SLURM_STEP_NUM_NODES': '1'}
    return subprocess.Popen(
        [sys.executable, *command, *flags, *(extra or {}).get(i, ())],
        cwd=ROOT, env=env | more, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)

  return [one(i) for i in range(processes)]


def _end(children, seconds=240):
  """Wait for all; return [(exit code, stdout, stderr)]."""
  def one(child):
    # What gloo and the partitioner say of themselves is left out.
    said = [''.join(x for x in text.splitlines(keepends=True)
                    if 'Gloo] ' not in x and 'spmd_' not in x)
            for text in child.communicate(timeout=seconds)]
    return child.returncode, *said
  try:
    with concurrent.futures.ThreadPoolExecutor(len(children)) as pool:
      return list(pool.map(one, children))
  finally:
    for child in children:
      child.kill()


def _train(config, workdir):
  path = f'{workdir}.json'
  metrics.write_json(path, config_io.to_dict(config))
  return ['-m', 'experiments.train', f'--config=configs/from_json.py:{path}',
          f'--workdir={workdir}']


@pytest.fixture(scope='module', name='run')
def _run(tmp_path_factory):
  """(kind, layout) -> the workdir of a complete run, made once."""
  @functools.cache
  def run(kind, layout):
    workdir = str(tmp_path_factory.mktemp(kind) / layout)
    config = _config(kind, dict() if layout == '1x1' else None)
    if layout != '2x4':
      assert trainer.train(config, workdir)['status'] == 'complete'
      return workdir
    for code, out, err in _end(_start(_train(config, workdir))):
      assert code == 0, out + err
    return workdir
  return run


def _rows(workdir):
  keep = lambda r: {k: v for k, v in r.items()
                    if not k.startswith(metrics.VOLATILE)}
  return [keep(r) for r in metrics.read(os.path.join(workdir, 'metrics.jsonl'))]


def _state(workdir):
  """The last state of a run, and the steps that were saved."""
  config = config_io.load(os.path.join(workdir, 'config.json'))
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    saved = checkpoint.Checkpoints(
        os.path.join(workdir, 'checkpoints', 'rl'), 9)
    abstract = train_step.make(config_lib.with_vocabulary(config, V),
                               mesh).abstract
    return jax.device_get(saved.restore(abstract)), saved.steps()


@pytest.mark.long
@pytest.mark.parametrize('kind, other', [
    ('moe', '1x8'), conftest.long('moe', '1x1'), conftest.long('dense', '1x8'),
    conftest.long('dense', '1x1')])
def test_two_processes_are_one(kind, other, run):
  two, one = run(kind, '2x4'), run(kind, other)
  ours, theirs = _rows(two), _rows(one)
  for rows in (ours, theirs):
    assert [r['step'] for r in rows] == [0, 1, 2, 3]
  for a, b in zip(ours, theirs):
    assert a.keys() == b.keys()
    for name in a:
      if name.startswith(('reward/', 'response_length/', 'val/')):
        assert a[name] == b[name], name
      elif name not in NOISE:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-6,
                                   err_msg=name)
  samples = [metrics.read(os.path.join(w, 'samples.jsonl')) for w in (two, one)]
  assert samples[0] == samples[1] and len(samples[0]) == 8
  (state, steps), (wanted, _) = _state(two), _state(one)
  assert steps == [0, 1, 2, 3] and state.step == 6
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5,
                                 atol=1e-6), state, wanted)


@pytest.mark.long
def test_one_process_writes(run):
  """Every row and every file once, as one process leaves them."""
  def names(workdir):
    return sorted(p.name for p in pathlib.Path(workdir).glob('*')) + sorted(
        p.name for p in pathlib.Path(workdir, 'figures').glob('*'))
  two, one = run('moe', '2x4'), run('moe', '1x8')
  assert names(two) == names(one)
  assert len(os.listdir(os.path.join(two, 'events'))) == len(
      os.listdir(os.path.join(one, 'events')))
  with open(os.path.join(two, 'summary.json'), encoding='utf-8') as f:
    assert json.load(f)['status'] == 'complete'


def _wait_for(workdir, step, children):
  """Wait until a step is noted."""
  deadline = time.monotonic() + 240
  while not any(r['step'] >= step for r in _rows(workdir)):
    assert all(c.poll() is None for c in children), _end(children)
    assert time.monotonic() < deadline
    time.sleep(.005)


@pytest.mark.long
def test_stopped_and_killed_it_resumes_to_the_same_result(run, tmp_path):
  """SIGTERM, then SIGKILL, to the process that does not write."""
  whole, workdir = run('dense', '2x4'), str(tmp_path / 'run')
  command = _train(_config('dense'), workdir)
  children = _start(command)
  _wait_for(workdir, 0, children)
  children[1].send_signal(signal.SIGTERM)
  for code, out, err in _end(children):
    assert code == 75, out + err
  stopped = _rows(workdir)[-1]['step']
  assert _state(workdir)[1] == list(range(stopped + 1)) and stopped < 3

  children = _start(command)
  _wait_for(workdir, stopped + 1, children)
  children[1].kill()
  (code, out, err), (killed, *_) = _end(children, seconds=120)
  assert killed == -signal.SIGKILL and code != 0, out + err
  with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
    assert json.load(f)['status'] == 'interrupted'

  for code, out, err in _end(_start(command)):
    assert code == 0, out + err
  jax.tree.map(np.testing.assert_array_equal, _state(workdir), _state(whole))
  assert _rows(workdir) == _rows(whole)
  assert metrics.read(os.path.join(workdir, 'samples.jsonl')) == metrics.read(
      os.path.join(whole, 'samples.jsonl'))


@pytest.mark.long
def test_all_agree_on_a_damaged_checkpoint_and_on_the_owner(run, tmp_path):
  """One process finds the damage in its share; a second run is refused."""
  whole, workdir = run('moe', '2x4'), str(tmp_path / 'run')
  shutil.copytree(whole, workdir)
  newest = pathlib.Path(workdir, 'checkpoints', 'rl', '3')
  assert len(list(newest.glob('state/ocdbt.process_*'))) == 2
  path = max(newest.glob('state/ocdbt.process_1/d/*'))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  command = _train(_config('moe'), workdir)
  first = _start(command)
  lock = pathlib.Path(workdir, 'lock.json')
  while not lock.exists():
    assert all(c.poll() is None for c in first), _end(first)
    time.sleep(.01)
  for code, out, err in _end(_start(command)):
    assert code == 2 and 'still running' in err, out + err
  done = _end(first)
  assert [code for code, *_ in done] == [0, 0], done
  assert 'goes on from step 2' in done[0][2] and not lock.exists()
  assert newest.with_name('3.damaged').exists()
  jax.tree.map(np.testing.assert_array_equal, _state(workdir), _state(whole))
  assert _rows(workdir) == _rows(whole)


@pytest.mark.long
def test_two_processes_evaluate_as_one(run):
  workdir = run('moe', '2x4')
  log = os.path.join(workdir, 'evaluation', 'rl_3_k2.jsonl')
  done = _end(_start(['-m', 'experiments.evaluate', f'--workdir={workdir}',
                      '--k=2']))
  assert [code for code, *_ in done] == [0, 0], done
  assert 'avg@2' in done[0][1] and 'avg@2' not in done[1][1]
  rows = metrics.read(log)
  assert len(rows) == 1 + 16 * 3
  os.remove(log)
  scoring.score_checkpoint(workdir, 'rl', None, 2)
  assert metrics.read(log) == rows


_HELPERS = '''
import sys
from absl import app, flags
from experiments import launch
import jax, numpy as np
from mtp_rl import config as config_lib
from mtp_rl import distributed as d
from mtp_rl import sharding

launch.define_processes()

def main():
  i = d.index()
  assert d.count() == 2 and d.is_writer() == (i == 0)
  seen = []
  def work(mine):
    seen.append(mine)
    return np.arange(5.)[mine] / 10
  np.testing.assert_array_equal(d.split(work, 5), np.arange(5.) / 10)
  assert seen == [slice(0, 3) if i == 0 else slice(3, 5)]
  np.testing.assert_array_equal(d.split(lambda m: np.ones(1)[m], 1), [1])
  assert d.total({'a': 1 + i, 'b': 5 * i}) == {'a': 3, 'b': 5}
  assert d.total({}) == {}
  assert d.any_of(i == 1) and not d.any_of(False)
  assert d.all_of(True) and not d.all_of(i == 0)
  assert d.first(7 if i == 0 else 9) == 7
  assert d.first(None if i == 0 else 9) is None
  assert d.differing({'same': [1, 'x'], 'other': i}) == ['other']
  mesh = jax.make_mesh((8,), ('x',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  x = np.arange(32.).reshape(16, 2).astype(np.float32)
  placed = d.put({'x': x}, rows)['x']
  assert not placed.is_fully_addressable
  assert len(placed.addressable_shards) == 4
  np.testing.assert_array_equal(d.fetch(placed), x)
  assert d.in_turn(lambda: i) == i
  try:
    sharding.make_mesh(config_lib.Mesh(data=4))
    raise AssertionError('a process without a device in the mesh')
  except config_lib.ConfigError as e:
    assert 'takes 4 of the 8 devices' in str(e)
  try:
    with d.together():
      if i == 1:
        raise config_lib.ConfigError('the second found a fault')
  except config_lib.ConfigError as e:
    launch.say('agreed')
    raise

if __name__ == '__main__':
  sys.argv = [sys.argv[0], '--workdir=unused', *sys.argv[1:]]
  launch.run(main)
'''


@pytest.mark.parametrize('slurm', [False, True])
def test_what_processes_tell_each_other(slurm):
  """Also: what one of them finds wrong, all say, and end at once."""
  start = time.monotonic()
  done = _end(_start(['-c', _HELPERS], slurm=slurm))
  for code, _, err in done:
    assert code == 2, err
    assert err.strip() == 'error: the second found a fault'
  assert 'agreed' in done[0][1] and 'agreed' not in done[1][1]
  assert time.monotonic() - start < 60


def test_a_coordinator_that_is_not_there_is_one_sentence(monkeypatch):
  with pytest.raises(config_lib.ConfigError, match='no address; set HOST:PORT'):
    distributed.initialize('nonsense', 2, 1)
  monkeypatch.setattr(distributed, 'CONNECT_S', 0)
  with socket.socket() as s:
    s.bind(('localhost', 0))  # bound, but nobody listens
    with pytest.raises(config_lib.ConfigError, match='nobody listens at'):
      distributed.initialize(f'localhost:{s.getsockname()[1]}', 2, 1)


def test_processes_of_another_command_are_refused(tmp_path):
  command = _train(_config('dense'), str(tmp_path / 'run'))
  for code, _, err in _end(_start(command, extra={1: ['--config.seed=1']})):
    assert code == 2
    assert err.strip().startswith('error: the processes differ in config')
    assert len(err.strip().splitlines()) == 1
  assert not (tmp_path / 'run' / 'config.json').exists()
