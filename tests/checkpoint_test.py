"""Checkpoints: checksums, damage of every file, falling back, full disks."""

import os
import pathlib
import random
import shutil
import subprocess
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from mtp_rl import config as config_lib
from mtp_rl.run import checkpoint, checksums, endings


class State(NamedTuple):
  """Named as `types.TrainState`: params and the rest."""
  params: dict
  step: jax.Array


def _state(seed):
  rng = np.random.default_rng(seed)
  return State({'a': jnp.asarray(rng.standard_normal((64, 32), np.float32)),
                'b': jnp.asarray(rng.standard_normal(8, np.float32))},
               jnp.int32(seed))


_ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0))


def _hash(text):
  return xxhash.xxh3_64_intdigest(text) >> 12


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(name='saved')
def _saved(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path / 'rl', keep=2)
  for step in (3, 6, 9):
    saved.save(step, _state(step))
  return tmp_path / 'rl'


def _open(where):
  return checkpoint.Checkpoints(where, keep=2)


def _files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def _flip(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8 % len(data)] ^= 1 << bit % 8
  path.write_bytes(data)


def test_the_latest_are_kept_and_read_back(saved):
  assert sorted(os.listdir(saved)) == ['6', '9']
  opened = _open(saved)
  assert opened.recover() == 9
  _same(opened.restore(_ABSTRACT), _state(9))
  _same(opened.restore(_ABSTRACT, 6, params_only=True), _state(6).params)


def test_an_unfinished_one_does_not_count_and_is_cleared(saved):
  for name in ('12.part', '12.part.orbax-checkpoint-tmp',
               '15.orbax-checkpoint-tmp'):
    shutil.copytree(saved / '9', saved / name)
  opened = _open(saved)
  assert opened.steps() == [6, 9] and opened.recover() == 9
  opened.save(12, _state(12))
  assert sorted(os.listdir(saved)) == ['12', '9']


def test_all_is_on_disk_before_the_one_before_is_removed(
    saved, monkeypatch):
  """A power cut may follow at any time."""
  done, sync, rename = [], checkpoint.checksums.sync, os.rename
  monkeypatch.setattr(checkpoint.checksums, 'sync',
                      lambda path: done.append(str(path)) or sync(path))
  monkeypatch.setattr(os, 'rename', lambda old, new: done.append(
      (pathlib.Path(old).name, pathlib.Path(new).name)) or rename(old, new))
  _open(saved).save(12, _state(12))
  named = done.index(('12.part', '12'))
  assert {str(saved / '12.part' / f.relative_to(saved / '12'))
          for f in _files(saved / '12')} <= set(map(str, done[:named]))
  assert done.index(str(saved)) in range(named, done.index(('6', '6.part')))


def test_every_flipped_bit_is_noticed(saved):
  """In each file, the checksums' own included."""
  rng, tried = random.Random(0), 0
  for path in _files(saved / '9'):
    before = path.read_bytes()
    for _ in range(8 if before else 0):
      _flip(path, rng.randrange(8 * len(before)))
      assert checksums.damage(saved / '9'), path
      tried += 1
      path.write_bytes(before)
  assert tried > 60 and checksums.damage(saved / '9') is None


@pytest.mark.parametrize('harm', ['cut', 'removed', 'emptied', 'added'])
def test_files_that_are_cut_or_removed_are_noticed(harm, saved):
  for path in [p for p in _files(saved / '9') if p.stat().st_size]:
    before = path.read_bytes()
    if harm == 'added':
      path.with_name('.nfs0').write_bytes(before)
    elif harm == 'removed':
      path.unlink()
    else:
      path.write_bytes(before[:-1] if harm == 'cut' else b'')
    if harm == 'added':  # by a backup, or a network's file system
      assert _open(saved).recover() == 9
      continue
    assert _open(saved).recover() == 6, path
    (saved / '9.damaged').rename(saved / '9')
    path.write_bytes(before)


def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(saved, capsys):
  _flip(_files(saved / '9' / 'state' / 'd')[0], 77)
  with pytest.raises(config_lib.ConfigError, match='9 is damaged.*run.strict'):
    _open(saved).recover(strict=True)
  with pytest.raises(config_lib.ConfigError, match='9 is damaged.*another'):
    _open(saved).restore(_ABSTRACT)  # a reader renames nothing
  assert sorted(os.listdir(saved)) == ['6', '9']
  opened = _open(saved)
  assert opened.recover() == 6
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'goes on from step 6' in said
  _same(opened.restore(_ABSTRACT), _state(6))
  opened.save(9, _state(9))
  _flip(_files(saved / '9' / 'state' / 'd')[0], 77)
  assert _open(saved).recover() == 6
  assert sorted(os.listdir(saved)) == ['6', '9.damaged', '9.damaged_2']


def test_where_no_good_one_is_left_nothing_is_renamed(saved):
  for step in '69':
    _flip(saved / step / '_CHECKPOINT_METADATA', 40)
  with pytest.raises(config_lib.ConfigError, match='no good checkpoint is left'
                     ) as e:
    _open(saved).recover()
  assert '\n' not in str(e.value)
  assert sorted(os.listdir(saved)) == ['6', '9']


def test_one_of_an_older_version_is_read_unchecked(saved, capsys):
  (saved / '9' / checksums.NAME).unlink()
  path = saved / '9' / '_CHECKPOINT_METADATA'
  path.write_text(path.read_text().replace(', "checksums": "xxh3"', ''))
  opened = _open(saved)
  assert opened.recover() == 9
  assert 'without checksums, and is read unchecked' in capsys.readouterr().err
  _same(opened.restore(_ABSTRACT), _state(9))


@pytest.mark.skipif(os.geteuid() != 0, reason='only root mounts a small disk')
def test_a_full_disk_is_one_sentence_and_the_last_one_stays(tmp_path):
  small = tmp_path / 'small'
  small.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', small],
                    capture_output=True).returncode:
    pytest.skip('this container mounts nothing')
  try:
    saved = checkpoint.Checkpoints(small / 'rl', keep=2)
    saved.save(1, _state(1))
    (small / 'filler').write_bytes(
        b'0' * (shutil.disk_usage(small).free - 4096))
    with pytest.raises(endings.EnvironmentFault, match='make room') as e:
      saved.save(2, _state(2))
    assert '\n' not in str(e.value) and _open(small / 'rl').recover() == 1
    (small / 'filler').unlink()
    saved.save(2, _state(2))
    assert os.listdir(small / 'rl') and _open(small / 'rl').recover() == 2
  finally:
    subprocess.run(['umount', '-l', small], check=True)


def test_a_sum_that_was_taken_early_holds_for_that_file_alone(tmp_path):
  folder = tmp_path / '3.part.tmp' / 'state' / 'ocdbt.process_0' / 'd'
  folder.mkdir(parents=True)
  (folder / 'whole').write_bytes(b'1' * 99)
  (folder / 'half.__lock').write_bytes(b'1' * 99)
  early = checksums.Early(str(tmp_path / '3.part'))
  while not early._sums:
    time.sleep(.01)
  early.close()
  assert list(early._sums) == ['whole']
  assert early.hash(folder / 'whole') == _hash(b'1' * 99)
  (folder / 'whole').write_bytes(b'2' * 99)
  assert early.hash(folder / 'whole') == _hash(b'2' * 99)


def test_checksums_that_are_cut_between_lines_are_noticed(saved):
  path = saved / '9' / checksums.NAME
  lines = path.read_text().splitlines(keepends=True)
  for kept in range(len(lines)):
    path.write_text(''.join(lines[:kept]))
    assert checksums.damage(saved / '9')
  path.write_text(''.join(lines[:-2] + lines[-1:]))
  assert checksums.damage(saved / '9')
  path.write_text(''.join(lines))
  assert checksums.damage(saved / '9') is None


def test_a_folder_may_be_renamed_under_a_sum_taken_early(tmp_path, monkeypatch):
  """Orbax's does, between the look at a file and its reading."""
  name = f'state/ocdbt.process_{checksums.distributed.index()}/d/a'
  path = tmp_path / '3.part.orbax-checkpoint-tmp' / name
  path.parent.mkdir(parents=True)
  path.write_bytes(b'abc')
  take, tried = checksums._hash, []
  def moves(where):
    if not tried:
      os.rename(tmp_path / '3.part.orbax-checkpoint-tmp', tmp_path / '3.part')
    tried.append(where)
    return take(where)
  monkeypatch.setattr(checksums, '_hash', moves)
  early = checksums.Early(str(tmp_path / '3.part'))
  deadline = time.monotonic() + 20
  while not tried and time.monotonic() < deadline:
    time.sleep(.01)
  early.close()
  assert 'tmp' in tried[0]
  assert early.hash(str(tmp_path / '3.part' / name)) == _hash(b'abc')


def test_a_folder_may_be_renamed_once_the_processes_have_met(
    tmp_path, monkeypatch):
  """Process 0 gives it its name while another may still write lines."""
  folder = tmp_path / '3.part'
  folder.mkdir()
  (folder / 'a').write_bytes(b'abc')
  split = checksums.distributed.split
  def meets(work, rows):
    sums = split(work, rows)
    os.rename(folder, tmp_path / '3')
    return sums
  monkeypatch.setattr(checksums.distributed, 'split', meets)
  assert checksums._lines(str(folder), ['a']) == [
      f'{_hash(b"abc"):013x} 3 a\n']
