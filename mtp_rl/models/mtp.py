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

With `mtp.unroll` one sequential module is every depth: it is applied to its own
states, K = unroll times (FastMTP, arXiv 2509.18362). K is `config.depths`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl.models import attention, transformer


def module_config(model_config: config_lib.Model, mtp: config_lib.MTP):
  """Return the `config.Model` of the MTP modules' blocks.

  They have full attention, also where the trunk's layers slide, and adapters
  of their own.
  """
  return dataclasses.replace(
      model_config, window=0, lora_rank=mtp.lora_rank,
      lora_alpha=mtp.lora_alpha, lora_targets=mtp.lora_targets)


class MTPModule(nn.Module):
  """One MTP module: two norms, a projection, a block and a final norm.

  With `keep` it returns the states and the tokens' keys and values, which the
  sampler passes again in `past`, as those of `layer`; see `transformer.Block`.
  """
  model: config_lib.Model
  concat: str
  keep: bool = False

  @nn.compact
  def __call__(self, hidden, embedding, angles, rows, past=None, layer=0):
    m = self.model
    h = transformer.RMSNorm(m.norm_eps, name='hidden_norm')(hidden)
    e = transformer.RMSNorm(m.norm_eps, name='embedding_norm')(embedding)
    pair = (h, e) if self.concat == 'h_emb' else (e, h)
    u = transformer.Linear(m.d_model, dtype=jnp.dtype(m.dtype), name='proj')(
        jnp.concatenate(pair, -1))
    block = transformer.Block(m, bool(m.experts), self.keep, name='block')
    x, new = block(u, layer, angles, rows, past)
    x = transformer.RMSNorm(m.norm_eps, name='final_norm')(x)
    return (x, new) if self.keep else x


class ParallelMTPModule(nn.Module):
  """One MTP module that reads the trunk alone: a block and a final norm."""
  model: config_lib.Model
  keep: bool = False

  @nn.compact
  def __call__(self, hidden, angles, rows, past=None, layer=0):
    m = self.model
    block = transformer.Block(m, bool(m.experts), self.keep, name='block')
    x, new = block(hidden, layer, angles, rows, past)
    x = transformer.RMSNorm(m.norm_eps, name='final_norm')(x)
    return (x, new) if self.keep else x


class MTPModules(nn.Module):
  """The MTP modules; parameters 'depth_1' .. 'depth_<mtp.modules>'."""
  model: config_lib.Model
  mtp: config_lib.MTP

  def setup(self):
    parallel = self.mtp.kind == 'parallel'
    module = transformer.rematerialised(
        ParallelMTPModule if parallel else MTPModule, self.model.remat)
    settings = (self.model,) if parallel else (self.model, self.mtp.concat)
    self.depth = [module(*settings, name=f'depth_{k}')
                  for k in range(1, self.mtp.modules + 1)]

  def at_depth(self, k, *inputs):
    """Apply depth k to columns and return its states [B, T, D].

    Depths beyond the last module apply that one again.

    Args:
      k: depth, from 1.
      *inputs: those of `MTPModule` (the states of depth k - 1, h^0 for k = 1,
        and the embedding of token i+k in column i) or `ParallelMTPModule`.
    """
    return self.depth[min(k, self.mtp.modules) - 1](*inputs)

  def __call__(self, hidden, embeddings, angles, rows):
    depths = range(1, config_lib.depths(self.mtp) + 1)
    if self.mtp.detach_hidden:
      hidden = jax.lax.stop_gradient(hidden)
    if self.mtp.kind == 'parallel':
      return tuple(self.at_depth(k, hidden, angles, rows) for k in depths)
    if self.mtp.detach_embedding:
      embeddings = jax.lax.stop_gradient(embeddings)
    states = []
    for k in depths:
      # Column i takes the embedding of column i+k. The last k columns wrap
      # around; earlier columns do not attend to them.
      ahead = jnp.roll(embeddings, -k, axis=1)
      hidden = self.at_depth(k, hidden, ahead, angles, rows)
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
      self.modules = MTPModules(module_config(m, self.mtp), self.mtp,
                                name='mtp')

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
    angles = transformer.angles_of(self.model,
                                   transformer.positions_of(attending))
    return self.blocks(self.embed(tokens), angles,
                       attention.full(attending))[0]

  def norm(self, x):
    """Return h^0 [B, T, D], which the main head reads, from the trunk's x."""
    return self.final_norm(x)

  def ahead(self, x, tokens, attending):
    """Return h^1 .. h^K, each [B, T, D], from the residual stream."""
    if not self.mtp.modules:
      return ()
    angles = transformer.angles_of(self.model,
                                   transformer.positions_of(attending))
    below = self.final_norm(x) if self.mtp.hidden == 'post_norm' else x
    embeddings = None if self.mtp.kind == 'parallel' else self.embed(tokens)
    return self.modules(below, embeddings, angles, attention.full(attending))

  def extend(self, tokens, positions, here, past):
    """Read tokens that continue rows.

    Args:
      tokens: int32 [B, W].
      positions: int32 [B, W], the tokens' places among the row's valid ones.
      here: bool [B, W], tokens that belong to the row.
      past: `attention.Past` of the trunk, or None at the start of the rows.

    Returns:
      The residual stream before the final norm [B, W, D], and the tokens'
      keys and values, [L, B, N, W, C] each.
    """
    angles = transformer.angles_of(self.model, positions)
    return self.blocks(self.embed(tokens), angles, attention.full(here), past,
                       True)
