"""Saving and restoring a TrainState with orbax; all processes take part.

A checkpoint is the folder <step>. It is written as <step>.part, gets its
checksums and then its name, so a kill leaves a whole one or none.
"""

import contextlib
import os
import re
import shutil
import sys

import jax
from orbax.checkpoint import v1 as ocp

from mtp_rl import config as config_lib
from mtp_rl import distributed
from mtp_rl import tree as tree_lib
from mtp_rl.run import checksums, endings

_FORMAT = 'mtp_rl TrainState 2'
# theta and psi had other names in the optimiser's state.
_OLDER = 'mtp_rl TrainState 1'
# Checksums are taken of several files at a time, so none is very large.
_FILE_BYTES = 64 * 2 ** 20
_UNFINISHED = re.compile(r'\d+(\.part|\.orbax-checkpoint-tmp).*')


class _OlderError(config_lib.ConfigError):
  """A checkpoint that only an older version can resume."""


class Checkpoints:
  """The checkpoints of one phase of a run, one directory per step."""

  def __init__(self, directory, keep):
    """Name the directory; the first `save` creates it.

    Args:
      directory: path.
      keep: how many checkpoints are kept, the latest ones.
    """
    self._directory = os.path.abspath(directory)
    self._keep = keep
    self._good = set()  # steps whose checksums were compared

  def path(self, step):
    """Return the directory of a step."""
    return os.path.join(self._directory, str(step))

  def steps(self):
    """Return the steps that are kept, ascending."""
    if not os.path.isdir(self._directory):
      return []
    return sorted(int(name) for name in os.listdir(self._directory)
                  if name.isdecimal() and os.path.isdir(self.path(name)))

  def latest(self, below=None):
    """Return the latest step, or None; the same in all processes.

    Args:
      below: only steps before this one count.
    """
    found = [s for s in self.steps() if below is None or s < below]
    return distributed.first(found[-1] if found else None)

  def latest_path(self):
    """Return the directory of the latest step, or None."""
    latest = self.latest()
    return None if latest is None else self.path(latest)

  def save(self, step, state):
    """Save a state unless its step is saved; return once it is on disk.

    Raises:
      endings.EnvironmentFault: the disk is full or broken.
    """
    latest = self.latest()
    if step == latest:
      return
    final, part = self.path(step), self.path(f'{step}.part')
    with distributed.together(), _disk(final):
      if distributed.is_writer():
        os.makedirs(self._directory, exist_ok=True)
        for name in filter(_UNFINISHED.fullmatch, os.listdir(self._directory)):
          shutil.rmtree(self.path(name))
    context = ocp.Context()
    context.array.saving.ocdbt_target_data_file_size = _FILE_BYTES
    early = checksums.Early(part)
    with _disk(final), contextlib.closing(early), context:
      ocp.save(part, state._asdict(),
               custom_metadata={'format': _FORMAT, 'checksums': 'xxh3'})
    with _disk(final):
      checksums.write(part, early)
    with distributed.together(), _disk(final):
      if distributed.is_writer():
        checksums.sync_all(part)
        os.rename(part, final)
        checksums.sync(self._directory)
        for old in self.steps()[:-self._keep]:
          # Under another name first: a kill leaves no half of a checkpoint.
          os.rename(self.path(old), self.path(f'{old}.part'))
          shutil.rmtree(self.path(f'{old}.part'))
    self._good.add(step)

  def recover(self, strict=False):
    """Return the latest good step, or None where nothing was saved.

    Damaged ones after it are renamed, which the run that owns them may do.

    Args:
      strict: refuse where the latest is damaged.

    Raises:
      config.ConfigError: no good one is left, or `strict`.
    """
    bad, step = {}, self.latest()
    while step is not None:
      damage = self.damage(step)
      if damage is None:
        break
      bad[step] = damage
      if strict:
        raise config_lib.ConfigError(
            f'checkpoint {self.path(step)} is damaged ({damage}) and '
            'run.strict is set; restore that folder from a copy, or unset '
            'run.strict to go on from an older one')
      step = self.latest(below=step)
    if bad and step is None:
      said = '; '.join(f'{s}: {damage}' for s, damage in bad.items())
      raise config_lib.ConfigError(
          f'no good checkpoint is left in {self._directory} ({said}); restore '
          'it from a copy, or remove it to begin this phase again')
    with distributed.together(), _disk(self._directory):
      if distributed.is_writer():
        for damaged, damage in bad.items():
          self._set_aside(damaged, damage, step)
    return step

  def _set_aside(self, step, damage, good):
    names = [f'{step}.damaged'] + [f'{step}.damaged_{i}' for i in range(2, 99)]
    name = next(n for n in names if not os.path.exists(self.path(n)))
    os.rename(self.path(step), self.path(name))
    print(f'checkpoint {self.path(step)} is damaged ({damage}): it is now '
          f'called {name}, and the run goes on from step {good}',
          file=sys.stderr, flush=True)

  def damage(self, step):
    """Return what is wrong with a checkpoint, in words, or None."""
    where = self.path(step)
    if step in self._good:
      return None
    if distributed.any_of(checksums.has(where) or _promises(where)):
      damage = checksums.damage(where)
      if damage is not None:
        return damage
    elif distributed.is_writer():
      print(f'checkpoint {where} was written by an older version, without '
            'checksums, and is read unchecked', file=sys.stderr, flush=True)
    self._good.add(step)
    return None

  def restore(self, abstract, step=None, params_only=False):
    """Return the state of a step, loaded straight into its shards.

    Args:
      abstract: TrainState of ShapeDtypeStructs with shardings.
      step: int; None: the latest.
      params_only: read and return the parameters alone; the optimiser's state
        may then be of any kind.

    Raises:
      config.ConfigError: there is none, it is damaged, or it belongs to
        another model or optimiser.
    """
    latest = self.latest()
    if latest is None:
      raise config_lib.ConfigError(
          f'{self._directory} holds no checkpoint; name the workdir of a run')
    step = latest if step is None else step
    where = self.path(step)
    if not os.path.isdir(where):
      raise config_lib.ConfigError(
          f'checkpoint {where} does not exist; this run keeps {self.steps()}')
    damage = self.damage(step)
    if damage is not None:
      raise config_lib.ConfigError(
          f'checkpoint {where} is damaged ({damage}); restore that folder from '
          f'a copy, or use another step of {self.steps()}')
    try:
      metadata = ocp.metadata(where)
      written = (metadata.custom_metadata or {}).get('format')
      if written == _OLDER and not params_only:
        raise _OlderError(
            f'checkpoint {where} was written by an older version and cannot be '
            'resumed by this one; use that version, or another workdir')
      if written not in (_FORMAT, _OLDER):
        raise ValueError('it was not written by this project')
      _compare(metadata.metadata, abstract)
      wanted = abstract._asdict()
      if params_only:
        wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, metadata.metadata)
        wanted['params'] = abstract.params
      restored = ocp.load(where, wanted)
    except _OlderError:
      raise
    except Exception as e:  # orbax raises many kinds for a damaged file
      first = str(e).strip().split('\n')[0][:300]
      raise config_lib.ConfigError(
          f'checkpoint {where} cannot be restored ({type(e).__name__}: '
          f'{first}); it is damaged or of another config: remove that folder '
          'to resume from an older one, or choose another workdir') from e
    return restored['params'] if params_only else type(abstract)(**restored)


def _promises(where):
  """Return whether a checkpoint says of itself that it has checksums."""
  try:
    with open(os.path.join(where, '_CHECKPOINT_METADATA'), 'rb') as f:
      return b'"checksums"' in f.read()
  except OSError:
    return True


@contextlib.contextmanager
def _disk(where):
  """Turn the errors of a full or broken disk into one sentence."""
  try:
    yield
  except config_lib.ConfigError:
    raise
  except Exception as e:  # tensorstore has its own kinds
    text = str(e).strip().split('\n')[0][:300]
    if not isinstance(e, OSError) and not re.search(
        'No space left|quota exceeded|Input/output error|Read-only file',
        str(e), re.I):
      raise
    raise endings.EnvironmentFault(
        f'checkpoint {where} cannot be written ({text}); make room or repair '
        'the disk, and the same command goes on from the last checkpoint'
    ) from e


def _leaves(tree):
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {tree_lib.path(keys): tuple(leaf.shape) for keys, leaf in paths}


def _compare(saved, abstract):
  """Raise ValueError naming a parameter whose shape differs."""
  have, want = _leaves(saved['params']), _leaves(abstract.params)
  for name in sorted(have.keys() | want.keys()):
    if have.get(name) != want.get(name):
      raise ValueError(f'parameter {name} has shape {have.get(name)} there, '
                       f'but {want.get(name)} under the config')


def prepare_workdir(workdir):
  """Create a workdir and make sure that it can be written.

  Raises:
    config.ConfigError: it cannot be created or written.
  """
  try:
    os.makedirs(os.path.join(workdir, 'figures'), exist_ok=True)
    # One file per process: several may run this at the same time.
    probe = os.path.join(workdir, f'.writable_{distributed.index()}')
    with open(probe, 'w', encoding='utf-8') as f:
      f.write('')
    os.remove(probe)
    free = shutil.disk_usage(workdir).free
  except OSError as e:
    raise config_lib.ConfigError(
        f'workdir {workdir} cannot be written ({e.strerror}); choose another '
        '--workdir') from e
  if free < 100 * 2 ** 20:
    raise config_lib.ConfigError(
        f'workdir {workdir} has {free >> 20} MiB of disk left; free some space')
