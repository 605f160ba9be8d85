"""The mesh, the one table of parameter shardings, and activation constraints.

Batches are split over 'data', 'fsdp' and 'expert'; parameters over 'fsdp' and
'tensor', those of experts over 'expert' as well. One CPU is a mesh with all
axes of size 1, so the same code runs there and on a slice.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import tree as tree_lib

AXES = ('data', 'fsdp', 'tensor', 'expert')
BATCH = ('data', 'fsdp', 'expert')

# Path pattern -> spec of the *last* dimensions, so that stacked layers and
# the optimiser's moments follow the rule of their parameter. The first match
# counts; a parameter without a match is replicated.
RULES = (
    (r'experts/(gate|up)/kernel$', ('expert', 'fsdp', 'tensor')),
    (r'experts/down/kernel$', ('expert', 'tensor', 'fsdp')),
    (r'embed/embedding$', ('tensor', 'fsdp')),
    (r'lm_head/kernel$', ('fsdp', 'tensor')),
    (r'(query|key|value|gate|up)/kernel$', ('fsdp', 'tensor')),
    (r'(query|key|value)/bias$', ('tensor',)),
    (r'(out|down)/kernel$', ('tensor', 'fsdp')),
    (r'proj/kernel$', ('fsdp', 'tensor')),
)


def platform():
  """Return what is compiled for: 'tpu', 'gpu' or 'cpu'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


def make_mesh(mesh_config: config_lib.Mesh, devices=None):
  """Return the device mesh of a config.

  Args:
    mesh_config: `config.Mesh`.
    devices: those of a slice to compile for, all of which the mesh must use;
      None: as many of this machine's devices as the mesh has.

  Raises:
    config.ConfigError: there are fewer devices than the mesh has, or more
      than it uses of a slice or of several processes.
  """
  shape = tuple(getattr(mesh_config, axis) for axis in AXES)
  size = math.prod(shape)
  if devices is not None:
    if size != len(devices):
      raise config_lib.ConfigError(
          f'mesh {dict(zip(AXES, shape))} has {size} devices, but the slice '
          f'has {len(devices)}; set --config.mesh.fsdp={len(devices)}, or '
          'other axes with that product')
    return jax.sharding.Mesh(
        np.array(devices).reshape(shape), AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
  have = jax.device_count()
  if size > have:
    raise config_lib.ConfigError(
        f'mesh {dict(zip(AXES, shape))} needs {size} devices, but this '
        f'machine has {have}; make mesh.{", mesh.".join(AXES)} smaller')
  if size < have and jax.process_count() > 1:
    raise config_lib.ConfigError(
        f'mesh {dict(zip(AXES, shape))} takes {size} of the {have} devices, '
        f'but each of the {jax.process_count()} processes must take part; make '
        f'mesh.{", mesh.".join(AXES)} larger')
  return jax.make_mesh(
      shape, AXES, devices=jax.devices()[:size],
      axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def spec(path, shape, mesh):
  """Return the PartitionSpec of one parameter.

  A mesh axis that does not divide its dimension is left out (a vocabulary of
  17 characters stays whole); that costs memory and never changes a result.

  Args:
    path: '/'-joined key path.
    shape: the parameter's shape.
    mesh: the device mesh.
  """
  for pattern, last in RULES:
    if re.search(pattern, path) and len(shape) >= len(last):
      full = (None,) * (len(shape) - len(last)) + last
      return P(*[a if a and n % mesh.shape[a] == 0 else None
                 for a, n in zip(full, shape)])
  return P()


def tree_shardings(tree, mesh):
  """Return a NamedSharding for every leaf of a tree of (abstract) arrays."""
  return jax.tree_util.tree_map_with_path(
      lambda keys, x: NamedSharding(
          mesh, spec(tree_lib.path(keys), x.shape, mesh)), tree)


def batch_devices(mesh_config: config_lib.Mesh):
  """Return the number of devices that a `config.Mesh` splits a batch over."""
  return math.prod(getattr(mesh_config, axis) for axis in BATCH)


def batch_size(mesh):
  """Return the number of devices that a mesh splits a batch over."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh):
  """Return the sharding that splits the leading axis over the batch axes."""
  return NamedSharding(mesh, P(BATCH))


def constrain(x, *entries):
  """Constrain x to a PartitionSpec of `entries`, one for each axis of x.

  A mesh axis that does not divide its dimension is left out; outside a mesh
  context x is returned unchanged.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  size = lambda axes: math.prod(
      mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)))
  return jax.lax.with_sharding_constraint(x, P(*[
      a if a and n % size(a) == 0 else None
      for a, n in zip(entries, x.shape, strict=True)]))


def constrain_batch(x, axis=0):
  """Constrain x to be split over the batch axes along one of its axes."""
  entries = [None] * x.ndim
  entries[axis] = BATCH
  return constrain(x, *entries)


def split_rows(x, microbatches):
  """[B, ...] -> [M, B/M, ...], row r in microbatch r mod M (device-local)."""
  x = x.reshape(x.shape[0] // microbatches, microbatches,
                *x.shape[1:]).swapaxes(0, 1)
  return constrain_batch(x, axis=1)


def join_rows(x):
  """Undo `split_rows`."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
