"""Verifiers in separate processes, timed from outside.

An answer that hangs or crashes its process gets no reward and is counted; the
process is replaced and the batch continues. Messages are JSON bytes, so nothing
that a process sends back is unpickled.

Processes are forked from a fresh one that has imported the verifier's packages,
never from the trainer with its threads, so a replacement takes milliseconds.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import time
import weakref
from multiprocessing import connection as connection_lib

from mtp_rl import config as config_lib

START_S = 120.  # limit for a fresh process, which imports the packages
_TRIES = 5  # to start a process
_END_S = 5.  # seconds to wait for a killed process to end
_STARTS = 3  # failed starts in a row after which the pool gives up
_MESSAGE = 4096  # most bytes of a reply
_OUT_OF_MEMORY = 3


def _context(preload):
  """Return the multiprocessing context, which imports `preload` first."""
  if 'forkserver' not in multiprocessing.get_all_start_methods():
    return multiprocessing.get_context('spawn')
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['__main__', __name__, *preload])
  return context


def _restrict(extra_mb):
  """Bound this process's memory; let it write nothing to files or terminals.

  Args:
    extra_mb: MiB that it may take beyond what it has; 0: no limit.
  """
  quiet = os.open(os.devnull, os.O_WRONLY)
  for stream in (1, 2):
    os.dup2(quiet, stream)
  if os.name != 'posix':
    return
  import resource  # not on every system
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  if not extra_mb or not os.path.exists('/proc/self/statm'):
    return
  with open('/proc/self/statm', encoding='ascii') as f:
    now = int(f.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
  limit = now + extra_mb * 2 ** 20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(connection, factory, args, memory_mb):
  """Run in the child: build the scorer, then answer requests until EOF."""
  # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer
  # alone decides when to stop, and ends this process by SIGKILL.
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
  scorer = factory(*args)
  _restrict(memory_mb)
  connection.send_bytes(b'ready')
  while True:
    try:
      request = json.loads(connection.recv_bytes())
    except EOFError:
      return
    try:
      answer = {'score': float(scorer(*request))}
    except MemoryError:  # the process may be in any state now
      os._exit(_OUT_OF_MEMORY)
    except Exception as e:  # the verifier's own errors on hostile text
      answer = {'error': type(e).__name__[:100]}
    connection.send_bytes(json.dumps(answer).encode())


class _Worker:
  """One process, and the request that it works on.

  Attributes:
    connection: to the child.
    process: the child.
    job: index of the request it works on; None: starting or idle.
    ready: whether it has started.
    deadline: of its start or its job, in time.monotonic; None: idle.
  """

  def __init__(self, context, target):
    for tries in range(1, _TRIES + 1):
      self.connection, theirs = context.Pipe()
      self.process = context.Process(target=_serve, args=(theirs, *target),
                                     daemon=True)
      try:
        self.process.start()
      except (EOFError, OSError):  # the server that forks died; a new one comes
        self.connection.close()
        if tries == _TRIES:
          raise
        time.sleep(.1)
      else:
        break
      finally:
        theirs.close()
    self.job, self.ready = None, False
    self.deadline = time.monotonic() + START_S

  def kill(self):
    """Kill the process; multiprocessing reaps it when the next one starts."""
    self.process.kill()
    self.connection.close()


def _close(pool):
  """Close a pool, if it still exists: nothing else ends its workers at exit."""
  if pool() is not None:
    pool().close()


class Pool:
  """Persistent scoring processes; they start when first needed.

  Attributes:
    counts: 'errors' (the scorer raised), 'timeouts' and 'crashes' (memory
      included) so far.
    longest_s: the longest time in seconds that an answer took or was awaited.
  """

  def __init__(self, factory, args, timeout_s, workers=1, memory_mb=0,
               preload=()):
    """Remember how to build the scorer.

    Args:
      factory: importable function, args -> scorer(*request) -> float.
      args: its arguments, picklable.
      timeout_s: seconds that one answer may take.
      workers: processes.
      memory_mb: MiB that a process may take beyond the scorer itself (Linux
        only); 0: no limit.
      preload: modules that the scorer imports.
    """
    self._context = _context(preload)
    self._target = factory, args, memory_mb
    self._timeout, self._size = timeout_s, workers
    self._workers, self._failed = [], 0
    self.counts = {'errors': 0, 'timeouts': 0, 'crashes': 0}
    self.longest_s = 0.
    atexit.register(_close, weakref.ref(self))

  def start(self):
    """Start the missing processes, and wait until they are ready.

    Raises:
      config.ConfigError: they do not start.
    """
    try:
      self._fill(self._size)
      while not all(w.ready for w in self._workers):
        self._step([])
        self._fill(self._size)
    except (OSError, EOFError, RuntimeError) as e:
      raise config_lib.ConfigError(
          f'the verifier processes do not start ({e}); their socket lies in '
          'TMPDIR, whose path must be short and writable') from e

  def score_all(self, requests):
    """Return the list of scores, 0.0 where the scorer raised, hung or crashed.

    Args:
      requests: lists of JSON-ready arguments of the scorer.

    Raises:
      RuntimeError: no process starts.
    """
    requests = list(requests)
    scores = [0.] * len(requests)
    waiting = list(range(len(requests)))[::-1]
    while waiting or self._busy():
      self._fill(min(self._size, len(waiting) + self._busy()))
      for worker in self._workers:
        if worker.ready and worker.job is None and waiting:
          self._ask(worker, waiting.pop(), requests)
      self._step(scores)
    return scores

  def close(self):
    """Kill the processes; the next `score_all` starts others."""
    for worker in self._workers:
      worker.kill()
    for worker in self._workers:
      worker.process.join(_END_S)
    self._workers = []

  def _busy(self):
    return sum(w.job is not None for w in self._workers)

  def _fill(self, count):
    for worker in [w for w in self._workers if w.ready and w.job is None]:
      if not worker.process.is_alive():  # it died between batches
        self._workers.remove(worker)
        worker.kill()
    while len(self._workers) < count:
      self._workers.append(_Worker(self._context, self._target))

  def _ask(self, worker, job, requests):
    worker.job = job
    worker.deadline = time.monotonic() + self._timeout
    # If the process is dead, the next read fails and reports it.
    with contextlib.suppress(OSError):
      worker.connection.send_bytes(json.dumps(requests[job]).encode())

  def _step(self, scores):
    """Wait until a process answers, starts, dies or exceeds its deadline."""
    pending = [w for w in self._workers if w.deadline is not None]
    soonest = min(w.deadline for w in pending)
    spoke = connection_lib.wait([w.connection for w in pending],
                                max(0., soonest - time.monotonic()))
    now = time.monotonic()
    for worker in pending:
      if worker.job is not None:
        self.longest_s = max(self.longest_s,
                             now - worker.deadline + self._timeout)
      if worker.connection in spoke:
        self._hear(worker, scores)
      elif now >= worker.deadline:
        self._lose(worker, scores, 'timeouts')

  def _hear(self, worker, scores):
    try:
      message = worker.connection.recv_bytes(_MESSAGE)
      answer = json.loads(message) if worker.ready else {}
    except (EOFError, OSError, ValueError):
      self._lose(worker, scores, 'crashes')
      return
    if worker.ready:
      self.counts['errors'] += 'error' in answer
      scores[worker.job] = answer.get('score', 0.)
    self._failed = 0
    worker.ready, worker.job, worker.deadline = True, None, None

  def _lose(self, worker, scores, name):
    """Drop a process; if it worked on an answer, that earns nothing."""
    self._workers.remove(worker)
    worker.kill()
    if worker.job is not None:
      self.counts[name] += 1
      scores[worker.job] = 0.
      return
    self._failed += 1
    if self._failed >= _STARTS:
      self.close()
      raise RuntimeError('the verifier process does not start; run the scorer '
                         'in a Python shell to see its error')
