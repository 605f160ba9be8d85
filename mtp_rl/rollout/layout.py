"""How the parameters are sharded while the model samples.

Training shards parameters over 'fsdp' and gathers them at each use. That is
cheap beside the millions of tokens of an update, but not beside the one token
a row of a decoding step. With rollout.tensor (or rollout.expert) set, the same
devices form a second mesh for sampling, `data` x `tensor` x `expert`, and once
a rollout `make_place` copies the parameters there, in the model's dtype.
Otherwise sampling uses the training layout and nothing is moved.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl import tree as tree_lib


def sampling_config(config: config_lib.Config):
  """Return the `config.Config` whose mesh is that of sampling."""
  r, m = config.rollout, config.mesh
  if not (r.tensor or r.expert):
    return config
  tensor, expert = r.tensor or 1, r.expert or 1
  devices = m.data * m.fsdp * m.tensor * m.expert
  mesh = dataclasses.replace(m, data=devices // (tensor * expert), fsdp=1,
                             tensor=tensor, expert=expert)
  return dataclasses.replace(config, mesh=mesh)


def sampling_mesh(config: config_lib.Config, mesh):
  """Return the mesh of sampling: the devices of `mesh`, in their order."""
  wanted = sampling_config(config).mesh
  shape = tuple(getattr(wanted, axis) for axis in sharding.AXES)
  if shape == tuple(mesh.shape[axis] for axis in sharding.AXES):
    return mesh
  assert math.prod(shape) == mesh.size, (shape, mesh)
  return jax.sharding.Mesh(mesh.devices.reshape(shape), sharding.AXES,
                           axis_types=mesh.axis_types)


def compiler_options(mesh):
  """Return XLA's options for decoding on a mesh, a dict or None.

  XLA for CPU copies each layer's weights out of their stack before it reads
  them. In the order that it prefers, all copies of a layer come first, and have
  left the processor's cache when they are read.
  """
  cpu = mesh.devices.flat[0].platform == 'cpu'
  name = 'xla_cpu_enable_concurrency_optimized_scheduler'
  return {name: False} if cpu else None


def _dtype(path, x, dtype):
  """Return the dtype in which the model uses a parameter."""
  cast = path.endswith(('kernel', 'embedding', 'bias', *tree_lib.ADAPTER)) and (
      '/router/' not in path)
  return jnp.dtype(dtype) if cast else x.dtype


def abstract(params, config: config_lib.Config, mesh):
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


def mover(params, config: config_lib.Config, mesh):
  """Return the jitted params -> params in the layout of `abstract`, or None.

  None means that sampling uses the training layout. The MTP modules are moved
  as well, though the sampler does not read them: they are small, and moving
  the whole tree is simpler.

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
    # Gather, then split again: the partitioner finds no shorter way.
    whole = jax.lax.with_sharding_constraint(x.astype(t.dtype), everywhere)
    return jax.lax.with_sharding_constraint(whole, t.sharding)

  def by_layers(keys, x, t):
    if 'blocks' not in tree_lib.path(keys):
      return move(x, t)
    spec = NamedSharding(t.sharding.mesh, P(*t.sharding.spec[1:]))
    layer = jax.ShapeDtypeStruct(t.shape[1:], t.dtype, sharding=spec)
    return jax.lax.map(lambda y: move(y, layer), x)  # one layer at a time

  return jax.jit(
      lambda params: jax.tree_util.tree_map_with_path(by_layers, params, to),
      out_shardings=jax.tree.map(lambda x: x.sharding, to))


def make_place(params, config: config_lib.Config, mesh):
  """Return the function params -> params of `mover`; it waits for the move."""
  move = mover(params, config, mesh)
  if move is None:
    return lambda params: params
  return lambda params: jax.block_until_ready(move(params))
