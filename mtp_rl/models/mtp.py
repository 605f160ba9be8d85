"""Multi-token prediction modules and the decoder that carries them.

Depth k = 1..K at position i combines the state of the depth below at position i
with the embedding of token i+k, and predicts token i+k+1:

    u   = W [norm(h^{k-1}_i) ; norm(Emb(x_{i+k}))]
    h^k = norm_k(Block_k(u)),    logits = head(h^k_i)

h^0 is the trunk's output after its final norm (or before it: `mtp.hidden`).
Embedding and output head are shared with the main model. Source: DeepSeek-V3;
published models differ in the order of concatenation (`mtp.concat`).

With `mtp.kind` 'parallel' (Gloeckle et al. 2024) depth k reads h^0_i alone,

    h^k = norm_k(Block_k(h^0_i))

so it must predict x_{i+k+1} without knowing x_{i+1} .. x_{i+k}.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl.models import attention, rope, transformer


class MTPModule(nn.Module):
  """One MTP module: two norms, a projection, a block and a final norm."""
  model: config_lib.Model
  concat: str

  @nn.compact
  def __call__(self, hidden, embedding, angles, rows):
    m = self.model
    h = transformer.RMSNorm(m.norm_eps, name='hidden_norm')(hidden)
    e = transformer.RMSNorm(m.norm_eps, name='embedding_norm')(embedding)
    pair = (h, e) if self.concat == 'h_emb' else (e, h)
    u = transformer.Linear(m.d_model, dtype=jnp.dtype(m.dtype), name='proj')(
        jnp.concatenate(pair, -1))
    block = transformer.Block(m, bool(m.experts), name='block')
    (x, _), _ = block((u, None), 0, angles, rows, 0)
    return transformer.RMSNorm(m.norm_eps, name='final_norm')(x)


class ParallelMTPModule(nn.Module):
  """One MTP module that reads the trunk alone: a block and a final norm."""
  model: config_lib.Model

  @nn.compact
  def __call__(self, hidden, angles, rows):
    block = transformer.Block(self.model, bool(self.model.experts),
                              name='block')
    (x, _), _ = block((hidden, None), 0, angles, rows, 0)
    return transformer.RMSNorm(self.model.norm_eps, name='final_norm')(x)


class MTPModules(nn.Module):
  """The K MTP modules; parameters 'depth_1' .. 'depth_K'."""
  model: config_lib.Model
  mtp: config_lib.MTP

  @nn.compact
  def __call__(self, hidden, embeddings, angles, rows):
    if self.mtp.detach_hidden:
      hidden = jax.lax.stop_gradient(hidden)
    if self.mtp.kind == 'parallel':
      module = transformer.rematerialised(ParallelMTPModule, self.model.remat)
      return tuple(module(self.model, name=f'depth_{k}')(hidden, angles, rows)
                   for k in range(1, self.mtp.modules + 1))
    if self.mtp.detach_embedding:
      embeddings = jax.lax.stop_gradient(embeddings)
    module = transformer.rematerialised(MTPModule, self.model.remat)
    states = []
    for k in range(1, self.mtp.modules + 1):
      # Column i takes the embedding of column i+k. The last k columns wrap
      # around; earlier columns do not attend to them.
      ahead = jnp.roll(embeddings, -k, axis=1)
      hidden = module(self.model, self.mtp.concat, name=f'depth_{k}')(
          hidden, ahead, angles, rows)
      states.append(hidden)
    return tuple(states)


class Decoder(nn.Module):
  """Embedding, trunk, final norm, output head, and the MTP modules."""
  model: config_lib.Model
  mtp: config_lib.MTP

  def setup(self):
    m = self.model
    assert m.vocab_size > 0, 'resolve it first: config.with_vocabulary'
    self.embed = transformer.Embedding(m.vocab_size, m.d_model,
                                       jnp.dtype(m.dtype))
    self.blocks = transformer.Stack(m)
    self.final_norm = transformer.RMSNorm(m.norm_eps)
    if not m.tie_embeddings:
      self.lm_head = transformer.Linear(m.vocab_size)
    if self.mtp.modules:
      # A module's layer has full attention, also where the trunk's slide.
      own = {f: getattr(self.mtp, f) for f in ('lora_rank', 'lora_alpha',
                                               'lora_targets')}
      self.modules = MTPModules(dataclasses.replace(m, window=0, **own),
                                self.mtp, name='mtp')

  def _angles(self, positions):
    return transformer.rope_angles(
        positions, transformer.rotary_channels(self.model),
        self.model.rope_theta, rope.stretched(
            self.model, transformer.rotary_channels(self.model)))

  def __call__(self, tokens, attending, with_mtp=True):
    """Return the hidden states that the output head reads.

    Args:
      tokens: int32 [B, T].
      attending: bool or int32 [B, T], see `types.Tokens`.
      with_mtp: whether the MTP modules run too.

    Returns:
      h^0 after the final norm [B, T, D], and a tuple of h^1 .. h^K.
    """
    x = self.trunk(tokens, attending)
    h = self.norm(x)
    if self.is_initializing() and not self.model.tie_embeddings:
      self.lm_head(h)
    return h, self.ahead(x, tokens, attending) if with_mtp else ()

  def trunk(self, tokens, attending):
    """Return the residual stream [B, T, D] before the final norm."""
    angles = self._angles(transformer.positions_of(attending))
    (x, _) = self.blocks((self.embed(tokens), None), angles,
                         attention.full(attending), 0)
    return x

  def norm(self, x):
    """Return h^0 [B, T, D], which the main head reads, from the trunk's x."""
    return self.final_norm(x)

  def ahead(self, x, tokens, attending):
    """Return h^1 .. h^K, each [B, T, D], from the residual stream."""
    if not self.mtp.modules:
      return ()
    angles = self._angles(transformer.positions_of(attending))
    below = self.final_norm(x) if self.mtp.hidden == 'post_norm' else x
    embeddings = None if self.mtp.kind == 'parallel' else self.embed(tokens)
    return self.modules(below, embeddings, angles, attention.full(attending))

  def decode(self, tokens, positions, key_valid, cache, column):
    """Extend the cache by the columns of `tokens` and return their states.

    Args:
      tokens: int32 [B, T], for columns column .. column + T - 1.
      positions: int32 [B, T], the tokens' places among the valid ones.
      key_valid: bool [B, U], valid columns of the cache, these included.
      cache: `transformer.Cache` of U columns.
      column: int32 [], or None for the first columns of an empty cache.

    Returns:
      h^0 after the final norm [B, T, D], and the new cache.
    """
    count, column_ = tokens.shape[1], 0 if column is None else column
    keys = key_valid.astype(jnp.int32)
    here = jax.lax.dynamic_slice_in_dim(keys, column_, count, 1)
    rows = (attention.full(here) if column is None else attention.Rows(
        here, keys, column + jnp.arange(count)))
    x, cache = self.blocks((self.embed(tokens), cache),
                           self._angles(positions), rows, column_)
    return self.final_norm(x), cache
