"""One run owns a workdir: a lock file that says who, and still alive.

The file is made by process 0 of a run, is touched by a thread while the run
lives and is removed when it ends. What a kill leaves is known by the owner's
process being gone (on the same machine) or by the file not being touched any
more (on another one; time is the file system's own).
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import NamedTuple

from mtp_rl import config as config_lib
from mtp_rl import distributed
from mtp_rl.run import endings

NAME = 'lock.json'
TOUCH_S = 20.
STALE_S = 300.  # without a touch, from another machine
_held = {}  # workdir -> _Lock


def _read(path):
  """Return the text of a small file, or ''."""
  try:
    with open(path, encoding='utf-8', errors='replace') as f:
      return f.read()
  except OSError:
    return ''


def _machine():
  """Return what is common to all processes that see the same process ids."""
  try:
    space = os.readlink('/proc/self/ns/pid')
  except OSError:
    space = ''
  boot = _read('/proc/sys/kernel/random/boot_id').strip()
  return f'{boot or socket.gethostname()} {space}'.strip()


def _process(pid):
  """Return when a process started, in words of the kernel; None: it is gone."""
  stat = _read(f'/proc/{pid}/stat')
  if stat:
    fields = stat.rpartition(')')[2].split()
    return None if fields[0] in 'ZX' else fields[19]
  if os.path.isdir('/proc/self'):
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return ''


class _Lock:
  """The lock of a workdir that this process holds."""

  def __init__(self, path, text):
    self._path, self._text = path, text
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def _keep(self):
    while not self._ended.wait(TOUCH_S):
      try:
        if not os.path.exists(self._path):
          _create(self._path, self._text)  # somebody has cleaned up
        with open(self._path, encoding='utf-8', errors='replace') as f:
          ours = f.read() == self._text
        if ours:
          os.utime(self._path)
      except OSError:
        continue  # the file system does not answer now
      if not ours:
        print(f'error: {self._path} is no longer that of this run, which ends '
              'here; another one has taken over the workdir', file=sys.stderr,
              flush=True)
        os._exit(endings.ENVIRONMENT)

  def release(self):
    self._ended.set()
    self._thread.join()
    if _read(self._path) == self._text:
      with contextlib.suppress(OSError):
        os.remove(self._path)


def take(workdir):
  """Make this run the owner of a workdir, until `release`.

  Process 0 of a run takes it; the others may call it too.

  Raises:
    config.ConfigError: another run owns it, or the lock cannot be written.
  """
  workdir = os.path.abspath(workdir)
  if not distributed.is_writer() or workdir in _held:
    return
  path = os.path.join(workdir, NAME)
  text = json.dumps({
      'host': socket.gethostname(), 'pid': os.getpid(),
      'started': time.strftime('%Y-%m-%d %H:%M:%S'), 'machine': _machine(),
      'process': _process(os.getpid()), 'token': secrets.token_hex(8)}) + '\n'
  try:
    while not _create(path, text):
      _clear_stale(workdir, path)  # or it was released in between
  except OSError as e:
    raise config_lib.ConfigError(
        f'{path} cannot be written ({e.strerror}); choose another --workdir'
    ) from e
  if not _held:
    atexit.register(release)
  _held[workdir] = _Lock(path, text)


def _create(path, text):
  """Write the lock; return False where there is one."""
  own = f'{path}.{secrets.token_hex(8)}.part'
  with open(own, 'w', encoding='utf-8') as f:
    f.write(text)
  try:
    os.link(own, path)  # whole at once, and only where there is none
  except FileExistsError:
    return False
  except OSError:  # a file system without links
    try:
      with open(path, 'x', encoding='utf-8') as f:
        f.write(text)
    except FileExistsError:
      return False
  finally:
    os.remove(own)
  return True


def _clear_stale(workdir, path):
  """Move a lock away whose owner is gone.

  Raises:
    config.ConfigError: the owner lives.
  """
  text, found = _read(path), describe(workdir)
  if found is None:
    return
  if found.alive and not found.here:
    found = _watch(workdir, path, found)
  if found is None:
    return
  if found.alive:
    raise config_lib.ConfigError(
        f'workdir {workdir} belongs to {found.who}, which is still running; '
        'stop that one, or choose another --workdir')
  aside = f'{path}.{secrets.token_hex(8)}.part'
  try:
    os.rename(path, aside)
  except FileNotFoundError:
    return  # somebody else was faster
  if _read(aside) != text:  # and has taken it: give it back
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)
  else:
    print(f'workdir {workdir} belonged to {found.who}, which is gone; this run '
          'takes over', file=sys.stderr, flush=True)
  os.remove(aside)


def _watch(workdir, path, found):
  """Return the `Owner` on another machine once it is known to live or not."""
  touched = os.stat(path).st_mtime_ns
  print(f'workdir {workdir} belongs to {found.who}: waiting for its next sign, '
        f'which it gives every {TOUCH_S:.0f} s, or for none in {STALE_S:.0f} s',
        file=sys.stderr, flush=True)
  while found is not None and found.alive:
    time.sleep(min(1., TOUCH_S))
    found = describe(workdir)
    with contextlib.suppress(FileNotFoundError):
      if os.stat(path).st_mtime_ns != touched:
        break
  return found


class Owner(NamedTuple):
  """Who owns a workdir.

  Attributes:
    who: in words.
    alive: whether it is known to live, or may do.
    here: whether it is on this machine, and `alive` certain.
  """
  who: str
  alive: bool
  here: bool


def describe(workdir):
  """Return the `Owner` of a workdir, or None."""
  path = os.path.join(workdir, NAME)
  text = _read(path)
  try:
    silent = _now(workdir) - os.path.getmtime(path)
  except OSError:
    return None
  try:
    values = json.loads(text)
    who = (f'a run with process id {int(values["pid"])} on '
           f'{values["host"]}, started {values["started"]}')
    if values['machine'] == _machine():
      same = _process(int(values['pid'])) == values['process']
      return Owner(who, same, True)
  except (ValueError, KeyError, TypeError):
    who = 'a run whose lock file is damaged'
  return Owner(who, silent < STALE_S, False)


def _now(workdir):
  """Return the time of the workdir's file system."""
  probe = os.path.join(workdir, f'.time_{os.getpid()}_{secrets.token_hex(4)}')
  try:
    with open(probe, 'w', encoding='utf-8'):
      pass
    return os.path.getmtime(probe)
  except OSError:
    return time.time()
  finally:
    with contextlib.suppress(OSError):
      os.remove(probe)


def release():
  """Give up all workdirs that this process owns."""
  while _held:
    _held.popitem()[1].release()


def releasing(action):
  """Decorate a function that takes workdirs: it gives them up as it ends."""
  @functools.wraps(action)
  def wrapped(*args, **kw):
    try:
      return action(*args, **kw)
    finally:
      release()
  return wrapped
