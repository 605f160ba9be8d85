"""Saving and restoring a TrainState with orbax; all processes take part."""

import os
import shutil

import jax
from orbax.checkpoint import v1 as ocp

from mtp_rl import config as config_lib
from mtp_rl import distributed
from mtp_rl import tree as tree_lib

_FORMAT = 'mtp_rl TrainState 2'
# theta and psi had other names in the optimiser's state.
_OLDER = 'mtp_rl TrainState 1'


class _OlderError(config_lib.ConfigError):
  """A checkpoint that only an older version can resume."""


class Checkpoints:
  """The checkpoints of one phase of a run, one directory per step."""

  def __init__(self, directory, keep):
    """Open (and create) the directory.

    Args:
      directory: path.
      keep: how many checkpoints are kept, the latest ones.
    """
    self._directory = os.path.abspath(directory)
    os.makedirs(self._directory, exist_ok=True)
    self._inner = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep))

  def latest(self):
    """Return the latest step, or None."""
    latest = self._inner.latest
    return distributed.first(None if latest is None else latest.step)

  def latest_path(self):
    """Return the directory of the latest step, or None."""
    latest = self.latest()
    return None if latest is None else os.path.join(self._directory,
                                                    str(latest))

  def steps(self):
    """Return the steps that are kept, ascending."""
    return sorted(c.step for c in self._inner.checkpoints)

  def save(self, step, state):
    """Save a state unless its step is saved; return once it is on disk."""
    if step != self.latest():
      self._inner.save(step, state._asdict(), force=True,
                       custom_metadata={'format': _FORMAT})

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
    if self.latest() is None:
      raise config_lib.ConfigError(
          f'{self._directory} holds no checkpoint; name the workdir of a run')
    step = self.latest() if step is None else step
    where = os.path.join(self._directory, str(step))
    if not os.path.isdir(where):
      raise config_lib.ConfigError(
          f'checkpoint {where} does not exist; this run keeps {self.steps()}')
    try:
      metadata = self._inner.metadata(step)
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
      restored = self._inner.load(step, wanted)
    except _OlderError:
      raise
    except Exception as e:  # orbax raises many kinds for a damaged file
      first = str(e).strip().split('\n')[0][:300]
      raise config_lib.ConfigError(
          f'checkpoint {where} cannot be restored ({type(e).__name__}: '
          f'{first}); it is damaged or of another config: remove that folder '
          'to resume from an older one, or choose another workdir') from e
    return restored['params'] if params_only else type(abstract)(**restored)

  def close(self):
    """Wait for pending work."""
    self._inner.close()


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
