"""An independent decoder with MTP modules in NumPy, one sequence at a time.

Reads published names and the dict of a config.json; shares no code with the
library. Sources: DeepSeek-V3 (arXiv 2412.19437), the models' own layer names.
"""

import numpy as np


def _norm(x, w, c):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + c['rms_norm_eps']) * w


def _rotate(x, c):
  """[T, heads, C]: turn the pairs (j, j + R/2) of the first R channels."""
  r = int(x.shape[-1] * c.get('partial_rotary_factor', 1))
  half = r // 2
  out = x.copy()
  for j in range(half):
    angle = np.arange(len(x)) * c['rope_theta'] ** (-2 * j / r)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., j], x[..., j + half]
    out[..., j], out[..., j + half] = a * cos - b * sin, a * sin + b * cos
  return out


def _attention(x, w, p, c):
  channels = c['head_dim']
  def project(name, heads):
    y = x @ w[f'{p}self_attn.{name}_proj.weight'].T
    y = y + w.get(f'{p}self_attn.{name}_proj.bias', 0.)
    y = y.reshape(len(x), heads, channels)
    if f'{p}self_attn.{name}_norm.weight' in w:
      y = _norm(y, w[f'{p}self_attn.{name}_norm.weight'], c)
    return y
  heads, groups = c['num_attention_heads'], c['num_key_value_heads']
  q, k = _rotate(project('q', heads), c), _rotate(project('k', groups), c)
  v = project('v', groups)
  out = np.zeros_like(q)
  for h in range(heads):
    g = h // (heads // groups)
    for t in range(len(x)):
      s = k[:t + 1, g] @ q[t, h] / channels ** .5
      s = np.exp(s - s.max())
      out[t, h] = s / s.sum() @ v[:t + 1, g]
  return out.reshape(len(x), -1) @ w[p + 'self_attn.o_proj.weight'].T


def _swiglu(x, w, p):
  z = x @ w[p + 'gate_proj.weight'].T
  return (z / (1 + np.exp(-z)) * (x @ w[p + 'up_proj.weight'].T)) @ w[
      p + 'down_proj.weight'].T


def _mlp(x, w, p, c):
  if p + 'gate.weight' not in w:
    return _swiglu(x, w, p)
  out = _swiglu(x, w, p + 'shared_experts.')
  for t, row in enumerate(x):
    s = 1 / (1 + np.exp(-w[p + 'gate.weight'] @ row))
    biased = s + w[p + 'gate.e_score_correction_bias']
    groups = biased.reshape(c['n_group'], -1)
    rank = np.sort(groups, -1)[:, -2:].sum(-1)
    dropped = np.argsort(-rank)[c['topk_group']:]
    groups[dropped] = -np.inf
    chosen = np.argsort(-groups.reshape(-1))[:c['num_experts_per_tok']]
    total = s[chosen].sum() if c['norm_topk_prob'] else 1.
    for e in chosen:
      out[t] += (c['routed_scaling_factor'] * s[e] / total
                 * _swiglu(row[None], w, f'{p}experts.{e}.')[0])
  return out


def _layer(x, w, p, c):
  x = x + _attention(_norm(x, w[p + 'input_layernorm.weight'], c), w, p, c)
  return x + _mlp(_norm(x, w[p + 'post_attention_layernorm.weight'], c), w,
                  p + 'mlp.', c)


def logits(tokens, w, c):
  """Return the logits of the main head and of depth 1, [T, V] each.

  Position i of depth 1 takes token i+1, so its last position is left out.

  Args:
    tokens: int [T].
    w: {published name: array}.
    c: dict of config.json.
  """
  embed = w['model.embed_tokens.weight']
  head = w.get('lm_head.weight', embed)
  x = embed[tokens].astype(np.float64)
  for i in range(c['num_hidden_layers']):
    x = _layer(x, w, f'model.layers.{i}.', c)
  h = _norm(x, w['model.norm.weight'], c)
  emb = embed[tokens[1:]]
  if c['model_type'] == 'glm4_moe':
    p = f'model.layers.{c["num_hidden_layers"]}.'
    u = np.concatenate([_norm(emb, w[p + 'enorm.weight'], c),
                        _norm(h[:-1], w[p + 'hnorm.weight'], c)], -1)
    u, last = u @ w[p + 'eh_proj.weight'].T, 'shared_head.norm.weight'
  else:
    p = 'model.mtp_layers.0.'
    u = np.concatenate([_norm(h[:-1], w[p + 'hidden_layernorm.weight'], c),
                        _norm(emb, w[p + 'token_layernorm.weight'], c)], -1)
    u, last = u @ w[p + 'input_proj.weight'].T, 'final_layernorm.weight'
  y = _norm(_layer(u, w, p, c), w[p + last], c)
  return h @ head.T, y @ head.T
