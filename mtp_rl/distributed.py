"""Runs of several processes: connecting, splitting work, agreeing on values.

Every process runs the same program: it draws the same prompts and holds the
whole batch as NumPy arrays, which are small beside the parameters. Each device
holds its own rows of the batch. Verifying answers takes host time, so it is
split over the processes. Process 0 alone writes files, except checkpoints:
every process writes its shards. With one process nothing is communicated.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import zlib

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its key-value store
from jax.experimental import multihost_utils

from mtp_rl import config as config_lib
from mtp_rl.run import endings, peers

CONNECT_S = 240  # seconds to wait until process 0 listens, and then for others
_NOTE_S = 10  # seconds of waiting after which a process says so
# Seconds without a heartbeat after which JAX's runtime aborts all, if `peers`
# has not ended them; seconds that a process waits for the others at the end.
HEARTBEAT_S = 100
SHUTDOWN_S = 30
PATIENCE_S = 3600.  # see `peers.Watch`, until the config is read
# In the errors of collectives that lost a process.
_GONE = ('Gloo', 'NCCL', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'Socket closed',
         'Connection closed', 'Connection reset')
_watch = None  # `peers.Watch` of a run of several processes
_MESSAGE = 1000  # bytes of an error message that processes exchange


def initialize(coordinator=None, processes=None, process=None):
  """Connect to the run's other processes; call it before using any device.

  Args:
    coordinator: HOST:PORT of process 0; None: the cluster's environment
      (SLURM, GKE, TPU pods, Open MPI) gives all three arguments.
    processes: number of processes.
    process: index of this process, from 0.

  Raises:
    config.ConfigError: the processes cannot connect. (If others never start,
      the waiting process ends with the exit code of the environment.)
  """
  if coordinator is not None:
    with _timer(_NOTE_S, lambda: _say(
        f'waiting for process 0 at {coordinator}, for {CONNECT_S} s at most')):
      _reach(coordinator, process)
  # JAX's preemption service takes SIGTERM for itself, outside the training
  # loop as well, which has its own handler and the same agreement.
  if not preemption_service():
    jax.config.update('jax_enable_preemption_service', False)
  try:
    with _timer(_NOTE_S, lambda: _say(
        'waiting for the other processes of the run, for '
        f'{CONNECT_S} s at most')), _timer(CONNECT_S, _alone):
      jax.distributed.initialize(
          coordinator, processes, process,
          heartbeat_timeout_seconds=HEARTBEAT_S,
          shutdown_timeout_seconds=SHUTDOWN_S)
  except (ValueError, TypeError, RuntimeError, OSError, KeyError) as e:
    first = str(e).strip().split('\n')[0][:200]
    raise config_lib.ConfigError(
        f'the processes of the run do not find each other ({first}); if the '
        'cluster does not set them, give --coordinator=HOST:PORT, --processes '
        'and --process') from e
  if count() > 1:
    global _watch
    _watch = peers.Watch(jax_distributed.global_state.client, index(), count(),
                         PATIENCE_S)
    atexit.register(_watch.stop)


@contextlib.contextmanager
def _timer(seconds, action):
  """Call action() from a thread if the block takes longer."""
  timer = threading.Timer(seconds, action)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _say(text):
  print(text, file=sys.stderr, flush=True)


def _alone():
  """End a process that the others do not join; JAX would abort it later."""
  _say(f'error: not all processes of the run have come within {CONNECT_S} s; '
       'start all of them with the same command, and see what the others say')
  os._exit(endings.ENVIRONMENT)


def _reach(coordinator, process):
  """Wait until process 0 listens; JAX's own client would abort instead.

  Raises:
    config.ConfigError: it does not listen in time, or the coordinator is not
      HOST:PORT.
  """
  host, _, port = coordinator.rpartition(':')
  if not host or not (port.isdecimal() and 0 < int(port) < 2 ** 16):
    raise config_lib.ConfigError(
        f'--coordinator={coordinator} is no address; set HOST:PORT of process '
        '0')
  deadline = time.monotonic() + CONNECT_S
  if not process:
    return  # process 0 is the one that listens
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
      return
    except OSError as e:
      if time.monotonic() > deadline:
        raise config_lib.ConfigError(
            f'nobody listens at --coordinator={coordinator} ({e}); start '
            'process 0 there, and name a host that this one can reach') from e
    time.sleep(.5)


def count():
  """Return the number of processes; starts no backend if there is one."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index():
  """Return the index of this process."""
  return jax.process_index() if count() > 1 else 0


def is_writer():
  """Return whether this process writes files and shows progress."""
  return index() == 0


def preemption_service():
  """Return whether the environment asks for JAX's preemption service."""
  asked = os.environ.get('JAX_ENABLE_PREEMPTION_SERVICE', '')
  return asked.lower() in ('1', 'true', 'yes', 'on', 'y', 't')


def preempted(check):
  """Return whether the cluster has announced to take a machine away.

  True in all processes at the same check. Without JAX's preemption service it
  is False, and SIGTERM is the notice.

  Args:
    check: number of this check, from 1; all processes make the same ones.
  """
  if not (preemption_service() and jax.distributed.is_initialized()):
    return False
  return multihost_utils.reached_preemption_sync_point(check)


def be_patient(seconds):
  """Set how long processes may wait for each other before all end."""
  if _watch is not None:
    _watch.patience = seconds


def depart(code, text):
  """End a process whose others may not know why, telling them.

  With one process it does nothing.

  Args:
    code: the exit code, for all of them.
    text: one sentence.
  """
  if _watch is not None:
    _watch.depart(code, text)


def is_of_a_peer(error):
  """Return whether an exception says that another process has gone.

  If that one told how it ended, this one ends here, in the same way.
  """
  if _watch is None or not any(word in str(error) for word in _GONE):
    return False
  _watch.follow()
  return True


def _gather(x, tiled=False):
  """Return the arrays of all processes, and note that they have met."""
  if _watch is not None:
    _watch.progress()
  out = multihost_utils.process_allgather(x, tiled=tiled)
  if _watch is not None:
    _watch.progress()
  return out


def put(rows, sharding):
  """Return NumPy arrays, the same in every process, as sharded device arrays.

  Args:
    rows: pytree of arrays.
    sharding: one sharding for all of them.
  """
  if count() == 1:
    return jax.device_put(rows, sharding)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape),
      rows)


def fetch(tree):
  """Return a pytree of arrays, however sharded, as whole NumPy arrays."""
  if count() == 1:
    return jax.device_get(tree)
  return _gather(tree, tiled=True)


def share(rows):
  """Return the range of `rows` rows that this process works on."""
  size = -(-rows // count())
  start = min(size * index(), rows)
  return range(start, min(start + size, rows))


def split(work, rows):
  """Split work over the processes; return the values of all rows.

  Args:
    work: function slice of rows -> list of floats, one per row.
    rows: number of rows.

  Returns:
    float64 [rows].
  """
  n, size, own = count(), -(-rows // count()), share(rows)
  done = np.asarray(work(slice(own.start, own.stop)), np.float64)
  if n == 1:
    return done
  padded = np.pad(done, (0, size - len(done)))
  # Sent as pairs of uint32: JAX would round a float64.
  words = _gather(padded.view(np.uint32), tiled=True)
  return words.view(np.float64)[:rows]


def total(counts):
  """Return a dict of ints, each summed over the processes."""
  if count() == 1 or not counts:
    return counts
  mine = np.asarray(list(counts.values()), np.int32)
  return dict(zip(counts, _gather(mine).sum(
      0).tolist()))


def any_of(flag):
  """Return whether a flag is set in any process."""
  if count() == 1:
    return bool(flag)
  return bool(_gather(np.bool_(flag)).any())


def all_of(flag):
  """Return whether a flag is set in every process."""
  return not any_of(not flag)


def first(number):
  """Return process 0's value of an int or None."""
  if count() == 1:
    return number
  sent = int(multihost_utils.broadcast_one_to_all(
      np.int32(-1 if number is None else number)))
  return None if sent < 0 else sent


def differing(values):
  """Return the names whose JSON-ready values differ between processes."""
  if count() == 1:
    return []
  sums = np.asarray([zlib.crc32(json.dumps(v, sort_keys=True).encode())
                     for v in values.values()], np.uint32)
  seen = _gather(sums)
  return [n for n, same in zip(values, (seen == seen[0]).all(0)) if not same]


def barrier():
  """Wait for all processes."""
  any_of(False)


@contextlib.contextmanager
def together():
  """Make a ConfigError in one process's block an error in all processes.

  The block must not communicate: if it fails in one process, the others still
  run it to the end and wait there.
  """
  error, said = None, b''
  try:
    yield
  except config_lib.ConfigError as e:
    error = e
    said = (bytes([endings.exit_code(e)]) + str(e).encode())[:_MESSAGE]
  if count() > 1:
    mine = np.zeros(_MESSAGE, np.uint8)
    mine[:len(said)] = np.frombuffer(said, np.uint8)
    for message in _gather(mine):
      if message.any() and error is None:
        code, *text = message.tobytes().rstrip(b'\0')
        error = endings.error(code, bytes(text).decode(errors='replace'))
  if error is not None:
    raise error


def in_turn(make):
  """Return make(). Process 0 calls it first, as it may fill a shared cache.

  Raises:
    config.ConfigError: in all processes, if make() raises it in any.
  """
  made = None
  for turn in (True, False):
    with together():
      if is_writer() == turn:
        made = make()
  return made
