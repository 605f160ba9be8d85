"""Vector algebra on pytrees, and the split of parameters into theta and psi.

theta: what the RL and the MTP objectives share (trunk, embedding, output
head). psi: the MTP modules' own parameters, the sub-tree 'mtp'.
"""

import jax
import jax.numpy as jnp

HEAD = 'mtp'


def path(keys):
  """Return a key path of jax.tree_util as names joined by '/'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(
      k, 'idx', k)))) for k in keys)


def dot(a, b):
  """Return the inner product <a, b> of two trees, summed in float32."""
  products = jax.tree.map(
      lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
  return sum(jax.tree.leaves(products), jnp.float32(0))


def norm(a):
  """Return the Euclidean norm of a tree in float32."""
  return jnp.sqrt(dot(a, a))


def axpy(alpha, x, y):
  """Return alpha * x + y, each leaf in the dtype of y."""
  return jax.tree.map(lambda u, v: (alpha * u + v).astype(v.dtype), x, y)


def add(a, b):
  """Return a + b."""
  return jax.tree.map(jnp.add, a, b)


def scope(theta, which):
  """Return the part of theta that `which` names.

  Args:
    theta: parameters without the MTP modules, or a gradient of them.
    which: 'all', 'trunk' (the blocks) or 'readout' (all the rest).
  """
  if which == 'all':
    return theta
  return {k: v for k, v in theta.items() if (k == 'blocks') == (
      which == 'trunk')}


def shared(params):
  """Return theta: every top-level entry but the MTP modules."""
  return {k: v for k, v in params.items() if k != HEAD}


def head(params):
  """Return psi: the MTP modules' own parameters ({} where K = 0)."""
  return {k: v for k, v in params.items() if k == HEAD}


def labels(params):
  """Return params' tree with 'shared' or 'head' in place of each leaf."""
  return {k: jax.tree.map(lambda _: 'head' if k == HEAD else 'shared', v)
          for k, v in params.items()}
