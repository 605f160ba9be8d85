"""Where the parameters lie while the model samples.

Training splits parameters over 'fsdp': each use gathers them, which pays over
millions of tokens and not over the one token a row that a decoding step adds.
With rollout.model (or rollout.expert) set, the same devices form another
mesh for sampling, `data` x `model` x `expert`, on which a copy of the
parameters in the model's dtype lies ready; `make_place` moves it there, once a
rollout. Without, sampling uses the training layout and nothing is moved.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mtp_rl import sharding
from mtp_rl import tree as tree_lib


def sampling_config(config):
  """Return the `config.Config` whose mesh is the one that samples."""
  r, m = config.rollout, config.mesh
  if not (r.model or r.expert):
    return config
  model, expert = r.model or 1, r.expert or 1
  devices = m.data * m.fsdp * m.model * m.expert
  mesh = dataclasses.replace(m, data=devices // (model * expert), fsdp=1,
                             model=model, expert=expert)
  return dataclasses.replace(config, mesh=mesh)


def sampling_mesh(config, mesh):
  """Return the mesh that samples: the devices of `mesh`, in their order."""
  wanted = sampling_config(config).mesh
  shape = tuple(getattr(wanted, axis) for axis in sharding.AXES)
  if shape == tuple(mesh.shape[axis] for axis in sharding.AXES):
    return mesh
  assert math.prod(shape) == mesh.size, (shape, mesh)
  return jax.sharding.Mesh(mesh.devices.reshape(shape), sharding.AXES,
                           axis_types=mesh.axis_types)


def _dtype(path, x, dtype):
  """Return the dtype that the model uses a parameter in."""
  cast = path.endswith(('kernel', 'embedding', 'bias')) and (
      '/router/' not in path)
  return jnp.dtype(dtype) if cast else x.dtype


def abstract(params, config, mesh):
  """Return the parameters as the sampler reads them, as ShapeDtypeStructs.

  Args:
    params: parameters of the training layout, abstract.
    config: `config.Config`.
    mesh: the training mesh.
  """
  other = sampling_mesh(config, mesh)
  if other is mesh:
    return params
  places = sharding.tree_shardings(params, other)
  return jax.tree_util.tree_map_with_path(
      lambda keys, x, s: jax.ShapeDtypeStruct(
          x.shape, _dtype(tree_lib.path(keys), x, config.model.dtype),
          sharding=s), params, places)


def make_place(params, config, mesh):
  """Return the function params -> params as `abstract` says.

  The MTP modules go along, though the sampler does not read them: they are
  small, and one tree is simpler than two.

  Args:
    params: parameters of the training layout, abstract.
    config: `config.Config`.
    mesh: the training mesh.
  """
  to = abstract(params, config, mesh)
  if to is params:
    return lambda params: params
  cast = lambda tree: jax.tree.map(lambda x, t: x.astype(t.dtype), tree, to)
  narrow = jax.jit(cast, out_shardings=jax.tree.map(
      lambda x: x.sharding, params))
  places = jax.tree.map(lambda x: x.sharding, to)
  return lambda params: jax.block_until_ready(
      jax.device_put(narrow(params), places))
