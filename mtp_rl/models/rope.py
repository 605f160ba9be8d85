"""RoPE's frequencies, as published models stretch them to longer contexts.

With f_c = theta^(-2c / C), wavelength 2 pi / f_c and factor s:

    default   f_c
    linear    f_c / s
    llama3    f_c where the wavelength is short for the first context, f_c / s
              where it is long, a blend of the two between
    yarn      the same with a ramp over channels c, and cos and sin scaled

Sources: Chen et al. 2023 (arXiv 2306.15595), the Llama 3.1 model card, YaRN
(arXiv 2309.00071). Everything is computed in float32, in the order in which
the published code does.
"""

import math

import numpy as np

from mtp_rl import config as config_lib

TYPES = ('default', 'linear', 'llama3', 'yarn')
FIELDS = ('rope_type', 'rope_factor', 'rope_context', 'rope_low', 'rope_high',
          'rope_gain', 'rope_truncate')
# Keys of config.json's object that each type reads, beside those of all.
_ALWAYS = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor')
_CONTEXT = 'original_max_position_embeddings'
_KEYS = {
    'default': (), 'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', _CONTEXT),
    'yarn': ('factor', 'beta_fast', 'beta_slow', 'attention_factor', 'mscale',
             'mscale_all_dim', 'truncate', _CONTEXT)}


def stretched(m: config_lib.Model, channels):
  """Return frequencies, float32 [C/2], and the gain of cos and sin.

  Args:
    m: `config.Model`.
    channels: C, channels of a head that RoPE turns.

  Returns:
    the pair, or None where RoPE is the plain one.
  """
  if m.rope_type == 'default':
    return None
  one, factor = np.float32(1), np.float32(m.rope_factor)
  powers = np.float32(m.rope_theta) ** (
      np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels))
  plain = one / powers
  if m.rope_type == 'linear':
    return plain / factor, m.rope_gain
  if m.rope_type == 'llama3':
    return _llama3(m, plain), m.rope_gain
  low, high = (channels * math.log(m.rope_context / (turns * 2 * math.pi))
               / (2 * math.log(m.rope_theta))
               for turns in (m.rope_high, m.rope_low))
  if m.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, channels - 1)
  if low == high:
    high += .001
  ramp = np.clip((np.arange(channels // 2, dtype=np.float32) - np.float32(low))
                 / np.float32(high - low), 0, 1)
  kept = one - ramp
  return (one / (factor * powers) * (one - kept) + plain * kept).astype(
      np.float32), m.rope_gain


def _llama3(m, plain):
  context, low, high = m.rope_context, m.rope_low, m.rope_high
  waves = np.float32(2 * math.pi) / plain
  out = np.where(waves > context / low, plain / np.float32(m.rope_factor),
                 plain)
  blend = (np.float32(context) / waves - np.float32(low)) / np.float32(
      high - low)
  between = (waves >= context / high) & (waves <= context / low)
  smooth = (1 - blend) * out / np.float32(m.rope_factor) + blend * out
  return np.where(between, smooth, out).astype(np.float32)


def _refuse(key, value, why):
  raise config_lib.ConfigError(
      f'config.json sets {key}={value!r}, {why}; choose another model or '
      'correct the file')


def _number(source, key, kinds=(int, float)):
  value = source[key]
  if isinstance(value, bool) or not isinstance(value, kinds) or not (
      0 < value < math.inf):
    _refuse(key, value, 'which must be a positive number')
  return value


def _gain(source, factor):
  """Return YaRN's factor on cos and sin."""
  get = lambda key: source.get(key) or 0
  scale = lambda m: .1 * m * math.log(factor) + 1 if factor > 1 else 1.
  if source.get('attention_factor') is not None:
    return float(_number(source, 'attention_factor'))
  if get('mscale') and get('mscale_all_dim'):
    return float(scale(_number(source, 'mscale'))
                 / scale(_number(source, 'mscale_all_dim')))
  return float(scale(1))


def _one(name, source, values):
  """Return the fields that one object of config.json describes."""
  for place in (source, values):
    if place.get('partial_rotary_factor', 1.) is None:
      _refuse('partial_rotary_factor', None, 'which must be a number')
  source = {k: v for k, v in source.items() if v is not None}
  kind = source.get('rope_type', source.get('type', 'default'))
  if source.get('type', kind) != kind:
    _refuse(name, source, 'whose type and rope_type differ')
  if kind not in TYPES:
    _refuse(name, source, f'of which only {", ".join(TYPES)} are supported')
  unknown = source.keys() - {*_ALWAYS, *_KEYS[kind]}
  if unknown:
    _refuse(name, source,
            f'whose {", ".join(sorted(unknown))} the decoder does not support')
  out = {'rope_theta': float(_number({'rope_theta': source.get(
      'rope_theta', values.get('rope_theta') or 10000.)}, 'rope_theta')),
         'rope_type': kind}
  if 'partial_rotary_factor' in source:
    out['rotary'] = _number(source, 'partial_rotary_factor')
  if kind == 'default':
    return out
  most = values.get('max_position_embeddings')
  if _CONTEXT in _KEYS[kind]:
    context = source.get(_CONTEXT, values.get(_CONTEXT) or most)
    if values.get(_CONTEXT) not in (None, context):
      _refuse(_CONTEXT, values[_CONTEXT], f'but {name} says {context}')
    out['rope_context'] = _number({_CONTEXT: context}, _CONTEXT, int)
  if kind == 'yarn' and 'factor' not in source and isinstance(most, int):
    source['factor'] = most / out['rope_context']
  needed = {'factor', 'low_freq_factor', 'high_freq_factor'} & {*_KEYS[kind]}
  for key in sorted(needed - source.keys()):
    _refuse(name, source, f'which has no {key}')
  out['rope_factor'] = float(_number(source, 'factor'))
  if kind == 'llama3':
    out |= {'rope_low': float(_number(source, 'low_freq_factor')),
            'rope_high': float(_number(source, 'high_freq_factor'))}
    if out['rope_low'] >= out['rope_high']:
      _refuse(name, source, 'whose high_freq_factor must be the larger one')
  if kind == 'yarn':
    if out['rope_theta'] <= 1:
      _refuse(name, source, 'whose rope_theta must be above 1')
    if not isinstance(source.get('truncate', True), bool):
      _refuse(name, source, 'whose truncate must be true or false')
    out |= {'rope_gain': _gain(source, out['rope_factor']),
            'rope_low': float(_number({'beta_slow': source.get('beta_slow')
                                       or 1}, 'beta_slow')),
            'rope_high': float(_number({'beta_fast': source.get('beta_fast')
                                        or 32}, 'beta_fast')),
            'rope_truncate': source.get('truncate', True)}
  return out


def read(values):
  """Return the fields of `config.Model` that a config.json says about RoPE.

  It may stand in rope_parameters, rope_scaling, or rope_theta beside them.
  'rotary' is among the fields only where the file names it.

  Raises:
    config.ConfigError: it is not supported, or two places disagree.
  """
  found = {}
  for name in ('rope_parameters', 'rope_scaling'):
    if not isinstance(values.get(name) or {}, dict):
      _refuse(name, values[name], 'which must be an object')
    if values.get(name):
      found[name] = _one(name, values[name], values)
  alone = _one('rope_theta', {}, values)
  if len(found) == 2 and found['rope_parameters'] != found['rope_scaling']:
    _refuse('rope_scaling', values['rope_scaling'],
            f'but rope_parameters={values["rope_parameters"]!r}')
  out = next(iter(found.values()), alone)
  for key, field in (('rope_theta', 'rope_theta'),
                     ('partial_rotary_factor', 'rotary')):
    value = values.get(key)
    if value is not None and out.setdefault(field, value) != value:
      _refuse(key, value, f'but another place of the file says {out[field]!r}')
  return out


def write(m: config_lib.Model):
  """Return config.json's entries about RoPE; `read` reads them back."""
  if m.rope_type == 'default':
    return {'rope_theta': m.rope_theta}
  out = {'rope_type': m.rope_type, 'factor': m.rope_factor}
  if m.rope_type == 'llama3':
    out |= {'low_freq_factor': m.rope_low, 'high_freq_factor': m.rope_high,
            _CONTEXT: m.rope_context}
  if m.rope_type == 'yarn':
    out |= {'beta_slow': m.rope_low, 'beta_fast': m.rope_high,
            'attention_factor': m.rope_gain, 'truncate': m.rope_truncate,
            _CONTEXT: m.rope_context}
  return {'rope_theta': m.rope_theta, 'rope_scaling': out}
