"""Every form of attention is softmax attention, and so are its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl.models import attention


def _inputs(b, t, h, n, c, seed=0):
  """Queries, keys, values, and segments: padded left, right, and packed."""
  rng = np.random.default_rng(seed)
  draw = lambda heads: rng.normal(size=(b, t, heads, c)).astype(np.float32)
  segments = np.ones((b, t), np.int32)
  segments[0, :t // 3] = 0
  segments[1, t - t // 5:] = 0
  return (draw(h), draw(n), draw(n)), segments


def _weighted(form, segments):
  """A scalar of the outputs at tokens, padding left out."""
  weights = np.cos(np.arange(segments.size, dtype=np.float32)).reshape(
      *segments.shape, 1, 1) * (segments > 0)[..., None, None]
  return lambda qkv: jnp.sum(jnp.sin(form(
      *qkv, attention.full(jnp.asarray(segments)))) * weights)


def _derivatives(form, qkv, segments):
  """Value, gradient, and the derivative of the gradient along a direction."""
  f = _weighted(form, segments)
  direction = jax.tree.map(lambda x: jnp.cos(3 * x), qkv)
  gradient, second = jax.jit(lambda x: jax.jvp(
      jax.grad(f), (x,), (direction,)))(qkv)
  return jax.jit(f)(qkv), gradient, second


@pytest.mark.parametrize('block', (8, 16, 64))
def test_blocks_are_plain_attention(block):
  qkv, segments = _inputs(3, 50, 4, 2, 8)
  segments[2, 20:] = 2  # a packed row
  want = _derivatives(attention.plain, qkv, segments)
  got = _derivatives(functools.partial(attention.blocks, block=block), qkv,
                     segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_blocks_never_hold_all_scores():
  t, block = 512, 32
  (q, k, v), segments = _inputs(2, t, 2, 1, 8)
  f = _weighted(functools.partial(attention.blocks, block=block), segments)
  temporary = lambda g: jax.jit(jax.grad(g)).lower(
      (q, k, v)).compile().memory_analysis().temp_size_in_bytes
  scores = 4 * 2 * 2 * t * t
  assert temporary(f) < scores / 2
  assert temporary(_weighted(attention.plain, segments)) > scores


def test_segments_do_not_see_each_other():
  qkv, segments = _inputs(2, 12, 2, 2, 4)
  segments[:] = [0] + [1] * 5 + [2] * 6
  whole = attention.plain(*qkv, attention.full(jnp.asarray(segments)))
  apart = attention.plain(*(x[:, 6:] for x in qkv),
                          attention.full(jnp.ones((2, 6), bool)))
  np.testing.assert_allclose(whole[:, 6:], apart, atol=1e-6)


def test_rows_aligned_for_cudnn_are_plain_attention():
  qkv, segments = _inputs(2, 16, 4, 2, 8)
  form = functools.partial(attention.aligned, implementation='xla')
  want = jax.value_and_grad(_weighted(attention.plain, segments))(qkv)
  got = jax.value_and_grad(_weighted(form, segments))(qkv)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_the_splash_kernel_is_plain_attention():
  """The kernel itself, interpreted; compiled for TPU in compile_for_test."""
  qkv, segments = _inputs(2, 256, 2, 1, 128)
  segments[1, 100:] = 2
  form = functools.partial(attention.splash, interpret=True)
  want = jax.value_and_grad(_weighted(attention.plain, segments))(qkv)
  got = jax.value_and_grad(_weighted(form, segments))(qkv)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_auto_takes_what_the_target_has():
  resolve = functools.partial(attention.resolve, 'auto', 128)
  assert resolve(48, 'float32') == 'plain'
  assert resolve(4096, 'float32') == 'blocks'
  assert attention.resolve('plain', 128, 4096, 'float32') == 'plain'
  for kind in ('splash', 'cudnn'):
    with pytest.raises(config_lib.ConfigError, match=f'{kind} needs a'):
      attention.resolve(kind, 128, 4096, 'bfloat16')
