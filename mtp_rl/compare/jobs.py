"""Runs processes, several at a time, each with its own cores and log."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

# For GLIBC_TUNABLES: keeps large buffers mapped between updates instead of
# faulting them in again (what it is worth: benchmarks/README.md). Linux only.
# No top_pad: it would blur the bound on a verifier's memory (tasks/workers.py).
MALLOC = ('glibc.malloc.mmap_threshold=8589934592:'
          'glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1')
_POLL = .1  # seconds
_alive = []  # processes that were started and have not been seen to end


class Job(NamedTuple):
  """One process.

  Attributes:
    name: unique.
    command: list of strings.
    log: path of the file that its output is appended to.
    complete: function () -> bool, whether its work is done; called before the
      start (a complete job is not started) and after the end.
    after: name of the job that must be complete first, '' for none.
  """
  name: str
  command: list
  log: str
  complete: Callable
  after: str = ''


def available_cores():
  """Return the sorted cores that this process may use; [] where unknown."""
  if not hasattr(os, 'sched_getaffinity'):
    return []
  return sorted(os.sched_getaffinity(0))


def share(cores, slots):
  """Split cores evenly over slots; with fewer cores than slots they repeat."""
  if not cores:
    return [()] * slots
  return [tuple(cores[i::slots]) or (cores[i % len(cores)],)
          for i in range(slots)]


@contextlib.contextmanager
def _pinned(cores):
  """Pin this thread to cores; processes started in the block inherit that."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def last_line(path):
  """Return the last line of a log that is not blank."""
  try:
    with open(path, encoding='utf-8', errors='replace') as f:
      text = f.read()[-4000:]
  except FileNotFoundError:
    text = ''
  lines = [s.strip() for s in text.replace('\r', '\n').split('\n')]
  return next((s for s in reversed(lines) if s), 'it printed nothing')


def _start(job, cores, environment, keep_open):
  os.makedirs(os.path.dirname(job.log), exist_ok=True)
  with open(job.log, 'ab') as log, _pinned(cores):
    # In a new session, Ctrl-C reaches only this process, which passes it on.
    process = subprocess.Popen(
        job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env=environment, start_new_session=True, pass_fds=keep_open)
  _alive[:] = [p for p in _alive if p.returncode is None] + [process]
  return process


def kill():
  """Kill all processes that `run` has started, and those that they started."""
  for process in _alive:
    if process.returncode is None:
      with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _stop(running):
  """Ask every process for a clean end and wait; if interrupted, kill them."""
  for process in running:
    process.terminate()
  try:
    for process in running:
      process.wait()
  except BaseException:
    kill()
    for process in running:
      process.wait()
    raise


def run(jobs, slots, stopped, note, environment=None, keep_open=()):
  """Run jobs in order, several at a time, each once its dependency is complete.

  Args:
    jobs: list of `Job`.
    slots: how many run at a time.
    stopped: function () -> bool; once it is true, running jobs get SIGTERM.
    note: function (job, problem), called as each job ends; problem is '' where
      it is complete, else one line.
    environment: of the processes; None: ours.
    keep_open: file descriptors that the processes inherit.

  Returns:
    dict name -> problem of the jobs that failed, without those that a stop
    left unfinished.
  """
  failed, complete, running = {}, set(), {}
  free = share(available_cores(), slots)

  def end(job, problem):
    if problem:
      failed[job.name] = problem
    else:
      complete.add(job.name)
    note(job, problem)

  for job in jobs:
    if job.complete():
      end(job, '')
  waiting = [job for job in jobs if job.name not in complete]
  try:
    while (waiting or running) and not stopped():
      for job in list(waiting):
        if job.after in failed:
          waiting.remove(job)
          end(job, f'not started, because {job.after} failed')
        elif free and (not job.after or job.after in complete):
          waiting.remove(job)
          cores = free.pop(0)
          running[job.name] = job, cores, _start(job, cores, environment,
                                                 keep_open)
      for job, cores, process in list(running.values()):
        if process.poll() is None:
          continue
        del running[job.name]
        free.append(cores)
        end(job, '' if job.complete() else
            f'exit status {process.returncode}: {last_line(job.log)}')
      time.sleep(_POLL)
  finally:
    _stop([process for _, _, process in running.values()])
    for job, _, _ in running.values():
      if job.complete():
        end(job, '')
  return failed
