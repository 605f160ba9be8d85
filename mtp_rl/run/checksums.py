"""Checksums of a checkpoint: a CRC-32 and a size for each of its files.

Orbax's files carry checksums of their index alone: a changed byte of an array
loads. CRC-32 (zlib's) notices every burst of up to 32 bits and misses other
damage once in 2^32; it guards against faults, not against forgery. All
processes take part: each reads its share of the files, several at a time.
"""

import concurrent.futures
import contextlib
import glob
import math
import os
import threading
import zlib

from mtp_rl import distributed

NAME = 'CHECKSUMS'
_BLOCK = 2 ** 20
_THREADS = 8


def _files(folder):
  """Return the paths of all files but the checksums, inside a folder."""
  found = [os.path.relpath(os.path.join(where, name), folder)
           for where, _, names in os.walk(folder) for name in names]
  return sorted(name for name in found if name != NAME)


def _crc(path):
  """Return the CRC-32 of a file; NaN where it cannot be read."""
  block, value = bytearray(_BLOCK), 0
  view = memoryview(block)
  try:
    with open(path, 'rb', buffering=0) as f:
      while size := f.readinto(block):
        value = zlib.crc32(view[:size], value)
  except OSError:
    return math.nan
  return value


def _identity(path):
  """Return what changes where a file is written to, but not its name."""
  s = os.stat(path)
  return s.st_ino, s.st_size, s.st_mtime_ns


class Early:
  """Takes the CRC of data files while others are still being written.

  Tensorstore gives a data file its name once it is whole.
  """

  def __init__(self, folder):
    """Watch a folder, and those that orbax will rename to it."""
    self._folder, self._sums = folder, {}
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self):
    own = f'{self._folder}*/*/ocdbt.process_{distributed.index()}*/d/*'
    while not self._ended.wait(.02):
      for path in glob.glob(own):
        name = os.path.basename(path)
        if '.' in name or name in self._sums:
          continue
        with contextlib.suppress(OSError):
          self._sums[name] = _identity(path), _crc(path)

  def close(self):
    """Stop watching."""
    self._ended.set()
    self._thread.join()

  def crc(self, path):
    """Return the CRC-32 of a file, as known or taken now."""
    identity, value = self._sums.get(os.path.basename(path), (None, None))
    known = identity is not None and identity == _identity(path)
    return value if known else _crc(path)


def _lines(folder, crc=_crc):
  """Return a dict file -> its line: CRC, bytes and name (None: unreadable)."""
  names = _files(folder)
  if distributed.differing({'files': names}):
    return {}
  paths = [os.path.join(folder, name) for name in names]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = distributed.split(lambda part: list(pool.map(crc, paths[part])),
                             len(paths))
  sizes = [os.path.getsize(p) if os.path.exists(p) else -1 for p in paths]
  return {name: None if math.isnan(crc) else f'{int(crc):08x} {size} {name}'
          for name, crc, size in zip(names, sums, sizes)}


def write(folder, early):
  """Write the checksums of a folder that all processes have filled.

  Args:
    folder: path.
    early: `Early` that has watched it.

  Raises:
    OSError: a file cannot be read back, in all processes.
  """
  lines = _lines(folder, early.crc)
  if not lines or None in lines.values():
    raise OSError(f'{folder} cannot be read back')
  if distributed.is_writer():
    path = os.path.join(folder, NAME)
    with open(path + '.part', 'w', encoding='utf-8') as f:
      f.writelines(line + '\n' for line in lines.values())
    os.replace(path + '.part', path)


def damage(folder):
  """Return what is wrong with a folder, in words, or None.

  All processes call it, and get the same answer.
  """
  lines = _lines(folder)
  try:
    with open(os.path.join(folder, NAME), 'rb') as f:
      text = f.read()
  except OSError:
    return f'its file {NAME} is missing'
  written = set(text.split(b'\n'))
  for name, line in lines.items():
    if line is None:
      return f'{name} cannot be read'
    if line.encode() not in written:
      return f'{name} is not as its checksum says'
  missing = written - {line.encode() for line in lines.values()} - {b''}
  if missing:
    return f'{missing.pop().decode(errors="replace").split(" ")[-1]} is missing'
  whole = ''.join(line + '\n' for line in lines.values()).encode()
  return None if text == whole else f'its file {NAME} is not whole'


def has(folder):
  """Return whether a folder was written with checksums."""
  return os.path.exists(os.path.join(folder, NAME))
