"""Many processes as one: joining, rows, agreement.

Every process runs the same program: it draws the same prompts and holds the
whole batch as NumPy arrays, which are small beside the parameters. Devices
hold their own rows of it; verifying, which takes a host's time, is split over
the processes. Process 0 alone writes files, but for checkpoints, whose shards
all write. With one process nothing is sent and nothing changes.
"""

import contextlib
import json
import socket
import time
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtp_rl import config as config_lib

CONNECT_S = 240  # that process 0 may take to listen
# After these seconds without a sign of life a process is taken for dead, and
# the others end; so do they where one waits in vain for them at the end.
HEARTBEAT_S = 60
SHUTDOWN_S = 30
_MESSAGE = 1000  # bytes of an error that the processes tell each other


def initialize(coordinator=None, processes=None, process=None):
  """Join the run's other processes; before any use of a device.

  Args:
    coordinator: HOST:PORT of process 0; None: the cluster's environment
      (SLURM, GKE, TPU pods, Open MPI) says this and the other two.
    processes: how many there are.
    process: index of this one, from 0.

  Raises:
    config.ConfigError: they do not find each other. (Where others never come,
      JAX's runtime aborts the process that waits, after five minutes.)
  """
  if coordinator is not None:
    _reach(coordinator, process)
  # Its handler would swallow SIGTERM outside the loop, which has its own.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S)
  except (ValueError, TypeError, RuntimeError, OSError, KeyError) as e:
    first = str(e).strip().split('\n')[0][:200]
    raise config_lib.ConfigError(
        f'the processes of the run do not find each other ({first}); where the '
        'cluster does not say, set --coordinator=HOST:PORT, --processes and '
        '--process') from e


def _reach(coordinator, process):
  """Wait until process 0 listens: JAX's own client would abort in the end.

  Raises:
    config.ConfigError: it does not, or its address is none.
  """
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise config_lib.ConfigError(
        f'--coordinator={coordinator} is no address; set HOST:PORT of process '
        '0')
  deadline = time.monotonic() + CONNECT_S
  while process:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
      return
    except (OSError, OverflowError) as e:
      if time.monotonic() > deadline:
        raise config_lib.ConfigError(
            f'nobody listens at --coordinator={coordinator} ({e}); start '
            'process 0 there, and name a host that this one reaches') from e
    time.sleep(.5)


def count():
  """Return the number of processes, without starting a backend for one."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index():
  """Return the index of this process."""
  return jax.process_index() if count() > 1 else 0


def is_writer():
  """Return whether this process writes files and shows progress."""
  return index() == 0


def put(rows, sharding):
  """Return NumPy arrays, the same in every process, as arrays on devices.

  With one process they are returned as they are: jit places them.

  Args:
    rows: pytree of arrays.
    sharding: of all of them.
  """
  if count() == 1:
    return rows
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape),
      rows)


def fetch(tree):
  """Return a pytree of arrays, however sharded, as whole NumPy arrays."""
  if count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def split(work, rows):
  """Return the values of all rows, each process having worked on its part.

  Args:
    work: slice -> one float a row of it.
    rows: how many there are.

  Returns:
    float64 [rows].
  """
  n = count()
  size = -(-rows // n)
  start = min(size * index(), rows)
  mine = slice(start, min(start + size, rows))
  done = np.asarray(work(mine), np.float64)
  if n == 1:
    return done
  padded = np.pad(done, (0, size - len(done)))
  # As pairs of words: on a device a float64 would be rounded.
  words = multihost_utils.process_allgather(padded.view(np.uint32), tiled=True)
  return words.view(np.float64)[:rows]


def total(counts):
  """Return a dict of ints, each summed over the processes."""
  if count() == 1 or not counts:
    return counts
  mine = np.asarray(list(counts.values()), np.int32)
  return dict(zip(counts, multihost_utils.process_allgather(mine).sum(
      0).tolist()))


def any_of(flag):
  """Return whether a flag is set in any process."""
  if count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


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
  """Return the names whose JSON-ready values are not the same everywhere."""
  if count() == 1:
    return []
  sums = np.asarray([zlib.crc32(json.dumps(v, sort_keys=True).encode())
                     for v in values.values()], np.uint32)
  seen = multihost_utils.process_allgather(sums)
  return [n for n, same in zip(values, (seen == seen[0]).all(0)) if not same]


def barrier():
  """Wait for all processes."""
  any_of(False)


@contextlib.contextmanager
def together():
  """Raise in every process the ConfigError that the block raises in any.

  The block must not communicate: where it fails in one process, the others
  come to its end and wait there.
  """
  error, said = None, b''
  try:
    yield
  except config_lib.ConfigError as e:
    error, said = e, str(e).encode()[:_MESSAGE]
  if count() > 1:
    mine = np.zeros(_MESSAGE, np.uint8)
    mine[:len(said)] = np.frombuffer(said, np.uint8)
    for message in multihost_utils.process_allgather(mine):
      if message.any() and error is None:
        error = config_lib.ConfigError(
            message.tobytes().rstrip(b'\0').decode(errors='replace'))
  if error is not None:
    raise error


def in_turn(make):
  """Return make(), which process 0 calls first: it may fill a shared cache.

  Raises:
    config.ConfigError: of any process, in all of them.
  """
  made = None
  for turn in (True, False):
    with together():
      if is_writer() == turn:
        made = make()
  return made
