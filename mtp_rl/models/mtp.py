"""Multi-token prediction modules and the decoder that carries them.

Depth k = 1..K at position i joins what the depth below knows of position i
with the embedding of token i+k, and predicts token i+k+1:

    u   = W [norm(h^{k-1}_i) ; norm(Emb(x_{i+k}))]
    h^k = norm_k(Block_k(u)),    logits = head(h^k_i)

h^0 is the trunk's output after its final norm (or before it: `mtp.hidden`).
Embedding and output head are the trunk's own. Following DeepSeek-V3; the
order of the concat differs between published models (`mtp.concat`).

With `mtp.kind` 'parallel' (Gloeckle et al. 2024) depth k has h^0_i alone,

    h^k = norm_k(Block_k(h^0_i))

so it must foresee x_{i+1} .. x_{i+k} as well as x_{i+k+1}.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_rl.models import attention, transformer


class Module(nn.Module):
  """One MTP module: two norms, a projection, a block and a final norm."""
  model: object  # config.Model
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


class ParallelModule(nn.Module):
  """One module that sees the trunk alone: a block and a final norm."""
  model: object  # config.Model

  @nn.compact
  def __call__(self, hidden, angles, rows):
    block = transformer.Block(self.model, bool(self.model.experts),
                              name='block')
    (x, _), _ = block((hidden, None), 0, angles, rows, 0)
    return transformer.RMSNorm(self.model.norm_eps, name='final_norm')(x)


class Modules(nn.Module):
  """K modules; parameters 'depth_1' .. 'depth_K'."""
  model: object  # config.Model
  mtp: object  # config.MTP

  @nn.compact
  def __call__(self, hidden, embeddings, angles, rows):
    if self.mtp.detach_hidden:
      hidden = jax.lax.stop_gradient(hidden)
    if self.mtp.kind == 'parallel':
      module = transformer.rematerialised(ParallelModule, self.model.remat)
      return tuple(module(self.model, name=f'depth_{k}')(hidden, angles, rows)
                   for k in range(1, self.mtp.heads + 1))
    if self.mtp.detach_embedding:
      embeddings = jax.lax.stop_gradient(embeddings)
    module = transformer.rematerialised(Module, self.model.remat)
    states = []
    for k in range(1, self.mtp.heads + 1):
      # Column i takes the embedding of column i+k; the last k columns wrap
      # round, and no earlier column can see them.
      ahead = jnp.roll(embeddings, -k, axis=1)
      hidden = module(self.model, self.mtp.concat, name=f'depth_{k}')(
          hidden, ahead, angles, rows)
      states.append(hidden)
    return tuple(states)


class Decoder(nn.Module):
  """Embedding, trunk, final norm, output head, and the MTP modules."""
  model: object  # config.Model
  mtp: object  # config.MTP
  vocab_size: int

  def setup(self):
    m = self.model
    self.embed = transformer.Embedding(self.vocab_size, m.d_model,
                                       jnp.dtype(m.dtype))
    self.blocks = transformer.Stack(m)
    self.final_norm = transformer.RMSNorm(m.norm_eps)
    if not m.tie_embeddings:
      self.lm_head = transformer.Linear(self.vocab_size)
    if self.mtp.heads:
      self.modules = Modules(m, self.mtp, name='mtp')

  def _angles(self, positions):
    return transformer.rope_angles(
        positions, transformer.rotary_channels(self.model),
        self.model.rope_theta)

  def __call__(self, tokens, valid, heads=True):
    """Return the hidden states that the output head reads.

    Args:
      tokens: int32 [B, T].
      valid: bool [B, T].
      heads: whether the MTP modules run too.

    Returns:
      h^0 after the final norm [B, T, D], and a tuple of h^1 .. h^K.
    """
    x = self.trunk(tokens, valid)
    h = self.norm(x)
    if self.is_initializing() and not self.model.tie_embeddings:
      self.lm_head(h)
    return h, self.ahead(x, tokens, valid) if heads else ()

  def trunk(self, tokens, valid):
    """Return the residual stream [B, T, D] before the final norm."""
    angles = self._angles(transformer.positions_of(valid))
    (x, _) = self.blocks((self.embed(tokens), None), angles,
                         attention.full(valid), 0)
    return x

  def norm(self, x):
    """Return h^0 of the residual stream, what the main head reads."""
    return self.final_norm(x)

  def ahead(self, x, tokens, valid):
    """Return h^1 .. h^K, each [B, T, D], from the residual stream."""
    if not self.mtp.heads:
      return ()
    angles = self._angles(transformer.positions_of(valid))
    below = self.final_norm(x) if self.mtp.hidden == 'post_norm' else x
    embeddings = None if self.mtp.kind == 'parallel' else self.embed(tokens)
    return self.modules(below, embeddings, angles, attention.full(valid))

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
