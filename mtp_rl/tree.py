"""Vector algebra on pytrees, and the split of parameters into theta and psi.

theta: what the RL and the MTP objectives share (trunk, embedding, output
head). psi: the MTP modules' own parameters, the sub-tree 'mtp'.
"""

import jax
import jax.numpy as jnp

PSI = 'mtp'
ADAPTER = ('lora_a', 'lora_b')  # leaves of a LoRA adapter, beside its kernel


def path(keys):
  """Return a key path of jax.tree_util as names joined by '/'."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def dot(a, b):
  """Return the inner product <a, b> of two trees, summed in float32."""
  products = jax.tree.map(
      lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
  return sum(jax.tree.leaves(products), jnp.float32(0))


def norm(a):
  """Return the Euclidean norm of a tree in float32."""
  return jnp.sqrt(dot(a, a))


def is_finite(a):
  """Return whether no element of a tree is NaN or infinite, bool []."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x))
                            for x in jax.tree.leaves(a)]))


def axpy(alpha, x, y):
  """Return alpha * x + y, each leaf in the dtype of y."""
  return jax.tree.map(lambda u, v: (alpha * u + v).astype(v.dtype), x, y)


def add(a, b):
  """Return a + b."""
  return jax.tree.map(jnp.add, a, b)


def total(trees):
  """Return the sum of a list of trees."""
  first, *rest = trees
  for other in rest:
    first = add(first, other)
  return first


def weighted(weights, trees):
  """Return sum_k weights_k trees_k.

  Args:
    weights: [K].
    trees: list of K trees.
  """
  return total([jax.tree.map(lambda x, w=w: w * x, t)
                for w, t in zip(weights, trees)])


def cut(rows, parts):
  """Return a tree of arrays [B, ...] as `parts` trees of B / parts rows each.

  Consecutive rows stay together: these are the minibatches of a rollout.
  """
  size = jax.tree.leaves(rows)[0].shape[0] // parts
  return [jax.tree.map(lambda x, i=i: x[i * size:(i + 1) * size], rows)
          for i in range(parts)]


def by_prompts(rows, parts, group):
  """Return a tree of arrays [B, ...] as `parts` trees of B / parts rows each.

  All `group` samples of a prompt are in one part, prompt p in part p mod parts.
  """
  def part(x, i):
    if parts == 1:
      return x
    return x.reshape(-1, parts, group, *x.shape[1:])[:, i].reshape(
        -1, *x.shape[1:])
  return [jax.tree.map(lambda x, i=i: part(x, i), rows) for i in range(parts)]


def rejoin(parts, group):
  """Undo `by_prompts` of one array."""
  if len(parts) == 1:
    return parts[0]
  y = jnp.stack([x.reshape(-1, group, *x.shape[1:]) for x in parts], 1)
  return y.reshape(-1, *parts[0].shape[1:])


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


def theta(params):
  """Return theta: every top-level entry but the MTP modules."""
  return {k: v for k, v in params.items() if k != PSI}


def psi(params):
  """Return psi: the MTP modules' own parameters ({} where K = 0)."""
  return {k: v for k, v in params.items() if k == PSI}


def _pick(node, keep):
  """Return the part of nested dicts whose leaves' names satisfy `keep`."""
  out = {k: _pick(v, keep) if isinstance(v, dict) else v
         for k, v in node.items() if isinstance(v, dict) or keep(k)}
  return {k: v for k, v in out.items() if not isinstance(v, dict) or v}


def adapters(params):
  """Return the adapters alone, {} where there are none."""
  return _pick(params, lambda name: name in ADAPTER)


def without_adapters(params):
  """Return the parameters but for the adapters."""
  return _pick(params, lambda name: name not in ADAPTER)


def trained(params):
  """Return what is trained: of theta and of psi, the adapters if it has any.

  Gradients, their inner products and the optimiser's state are trees like
  this one.
  """
  parts = theta(params), psi(params)
  return {k: v for part in parts for k, v in (adapters(part) or part).items()}


def merge(params, part):
  """Return params with the leaves of `part` in place of theirs, or added."""
  if not isinstance(part, dict):
    return part
  return {**params, **{k: merge(params.get(k, {}), v)
                       for k, v in part.items()}}


def labels(params):
  """Return params' tree with 'theta' or 'psi' in place of each leaf."""
  return {k: jax.tree.map(lambda _: 'psi' if k == PSI else 'theta', v)
          for k, v in params.items()}
