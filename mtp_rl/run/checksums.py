"""Checksums of a checkpoint: a hash and a size for each of its files.

Orbax's files carry checksums of their index alone: a changed byte of an array
loads. 52 bits of XXH3 miss damage once in 2^52; they guard against faults, not
against forgery. All processes take part: each reads its share of the files,
several at a time.
"""

import concurrent.futures
import contextlib
import glob
import math
import os
import threading

import xxhash

from mtp_rl import distributed

NAME = 'CHECKSUMS'
_BLOCK = 2 ** 20
_THREADS = 8


def _files(folder):
  """Return the paths of all files but the checksums, inside a folder."""
  found = [os.path.relpath(os.path.join(where, name), folder)
           for where, _, names in os.walk(folder) for name in names]
  return sorted(name for name in found if name != NAME)


def _short(hashed):
  """Return 52 bits of a hash, which a float64 holds."""
  return hashed.intdigest() >> 12


def _hash(path):
  """Return the hash of a file; NaN where it cannot be read."""
  block, value = bytearray(_BLOCK), xxhash.xxh3_64()
  view = memoryview(block)
  try:
    with open(path, 'rb', buffering=0) as f:
      while size := f.readinto(block):
        value.update(view[:size])
  except OSError:
    return math.nan
  return _short(value)


def _size(path):
  """Return the bytes of a file; -1 where there is none (any more)."""
  try:
    return os.path.getsize(path)
  except OSError:
    return -1


def _identity(path):
  """Return what changes where a file is written to, but not its name."""
  s = os.stat(path)
  return s.st_ino, s.st_size, s.st_mtime_ns


class Early:
  """Hashes data files while others are still being written.

  Tensorstore gives a data file its name once it is whole.
  """

  def __init__(self, folder):
    """Watch a folder, and those that orbax will rename to it."""
    self._folder, self._sums = folder, {}
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self):
    own = (glob.escape(self._folder)
           + f'*/*/ocdbt.process_{distributed.index()}*/d/*')
    while not self._ended.wait(.02):
      for path in glob.glob(own):
        name = os.path.basename(path)
        if '.' in name or name in self._sums:
          continue
        with contextlib.suppress(OSError):
          identity, value = _identity(path), _hash(path)
          # Orbax renames the folder: the file may be gone from here by now.
          if not math.isnan(value):
            self._sums[name] = identity, value

  def close(self):
    """Stop watching."""
    self._ended.set()
    self._thread.join()

  def hash(self, path):
    """Return the hash of a file, as known or taken now."""
    identity, value = self._sums.get(os.path.basename(path), (None, None))
    with contextlib.suppress(OSError):  # `_hash` says so of a file that is gone
      if identity is not None and identity == _identity(path):
        return value
    return _hash(path)


def _lines(folder, names, take=_hash):
  """Return the lines of files: hash, bytes and name; '' for one unreadable.

  No file is touched once the processes have met: process 0 may then rename the
  folder while another one is still here.
  """
  paths = [os.path.join(folder, name) for name in names]
  sizes = [_size(p) for p in paths]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = distributed.split(lambda part: list(pool.map(take, paths[part])),
                             len(paths))
  return ['' if math.isnan(value) else f'{int(value):013x} {size} {name}\n'
          for name, value, size in zip(names, sums, sizes)]


def _last(lines):
  """Return the line of the checksums themselves."""
  text = ''.join(lines).encode()
  return f'{_short(xxhash.xxh3_64(text)):013x} {len(text)} {NAME}\n'


def write(folder, early):
  """Write the checksums of a folder that all processes have filled.

  Args:
    folder: path.
    early: `Early` that has watched it.

  Raises:
    OSError: a file cannot be read back, in all processes.
  """
  names = _files(folder)
  alike = not distributed.differing({'files': names})
  lines = _lines(folder, names, early.hash) if alike else ['']
  if '' in lines:
    raise OSError(f'{folder} cannot be read back')
  if distributed.is_writer():
    with open(os.path.join(folder, NAME), 'w', encoding='utf-8') as f:
      f.writelines(lines + [_last(lines)])


def sync(path):
  """Put a file, or the names in a folder, on disk: a power cut may follow."""
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


def sync_all(folder):
  """Put all files of a folder on disk; tensorstore does so for its own."""
  for where, _, names in os.walk(folder):
    for path in (*(os.path.join(where, name) for name in names), where):
      sync(path)


def damage(folder):
  """Return what is wrong with a folder, in words, or None.

  All processes call it. Files that were added do no harm.
  """
  try:
    with open(os.path.join(folder, NAME), 'rb') as f:
      *written, last = f.read().decode().splitlines(keepends=True)
    names = [line.rstrip('\n').split(' ', 2)[2] for line in written]
    whole = last == _last(written)
  except (OSError, ValueError, IndexError):
    names, whole = [], False
  if distributed.any_of(not whole):
    return f'its file {NAME} is missing or not whole'
  found = None
  for name, line, now in zip(names, written, _lines(folder, names)):
    if found is None and line != now:
      found = f'{name} ' + ('is not as its checksum says' if now
                            else 'is missing or cannot be read')
  if distributed.any_of(found):
    return found or 'as another process of the run finds'
  return None


def has(folder):
  """Return whether a folder was written with checksums."""
  return os.path.exists(os.path.join(folder, NAME))
