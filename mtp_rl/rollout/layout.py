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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def mover(params, config, mesh):
  """Return the jitted function params -> params as `abstract` says, or None.

  None stands for the training layout itself. The MTP modules go along, though
  the sampler does not read them: they are small, and one tree is simpler.

  Args:
    params: parameters of the training layout, abstract.
    config: `config.Config`.
    mesh: the training mesh.
  """
  to = abstract(params, config, mesh)
  if to is params:
    return None
  everywhere = NamedSharding(mesh, P())

  def move(x, t):
    # Gathered and cut again: the partitioner knows no shorter way.
    whole = jax.lax.with_sharding_constraint(x.astype(t.dtype), everywhere)
    return jax.lax.with_sharding_constraint(whole, t.sharding)

  def by_layers(keys, x, t):
    if 'blocks' not in tree_lib.path(keys):
      return move(x, t)
    spec = NamedSharding(t.sharding.mesh, P(*t.sharding.spec[1:]))
    layer = jax.ShapeDtypeStruct(t.shape[1:], t.dtype, sharding=spec)
    return jax.lax.map(lambda y: move(y, layer), x)  # one layer whole at once

  return jax.jit(
      lambda params: jax.tree_util.tree_map_with_path(by_layers, params, to),
      out_shardings=jax.tree.map(lambda x: x.sharding, to))


def make_place(params, config, mesh):
  """Return the function that moves parameters, and waits; see `mover`."""
  move = mover(params, config, mesh)
  if move is None:
    return lambda params: params
  return lambda params: jax.block_until_ready(move(params))
