"""Checksums of a checkpoint: a CRC-32 and a size for each of its files.

Orbax's files carry checksums of their index alone: a changed byte of an array
loads. CRC-32 (zlib's) notices every burst of up to 32 bits and misses other
damage once in 2^32; it guards against faults, not against forgery. All
processes take part: each reads its share of the files, several at a time.
"""

import concurrent.futures
import math
import os
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


def _lines(folder):
  """Return a dict file -> its line: CRC, bytes and name (None: unreadable)."""
  names = _files(folder)
  if distributed.differing({'files': names}):
    return {}
  paths = [os.path.join(folder, name) for name in names]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = distributed.split(lambda part: list(pool.map(_crc, paths[part])),
                             len(paths))
  sizes = [os.path.getsize(p) if os.path.exists(p) else -1 for p in paths]
  return {name: None if math.isnan(crc) else f'{int(crc):08x} {size} {name}'
          for name, crc, size in zip(names, sums, sizes)}


def write(folder):
  """Write the checksums of a folder that all processes have filled.

  Raises:
    OSError: a file cannot be read back, in all processes.
  """
  lines = _lines(folder)
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
