"""Rejects fields of `config.Model` that cannot work."""

from mtp_rl import config as config_lib
from mtp_rl.models import rope


def need(condition, message):
  """Raise config.ConfigError with a message unless a condition holds."""
  if not condition:
    raise config_lib.ConfigError(message)


def check(m: config_lib.Model):
  """Reject a model that cannot work; see `validate.validate`."""
  need(m.n_heads % m.n_kv_heads == 0,
       f'model.n_heads={m.n_heads} is no multiple of model.n_kv_heads='
       f'{m.n_kv_heads}')
  need(m.head_dim or m.d_model % m.n_heads == 0,
       f'model.d_model={m.d_model} is no multiple of model.n_heads='
       f'{m.n_heads}; set model.head_dim')
  need(0 < m.rotary <= 1, f'model.rotary={m.rotary} must lie in (0, 1]')
  channels = int((m.head_dim or m.d_model // m.n_heads) * m.rotary)
  need(channels and channels % 2 == 0, f'RoPE turns {channels} channels of '
       'a head, but needs an even number; change model.head_dim or '
       'model.rotary')
  _check_attention(m)
  _check_experts(m)


def _check_attention(m: config_lib.Model):
  scaled = m.rope_type in ('llama3', 'yarn')
  need(not scaled or m.rope_context,
       f'model.rope_type={m.rope_type} stretches a first context, but '
       'model.rope_context=0; set it')
  need(m.rope_type != 'yarn' or m.rope_theta > 1,
       f'model.rope_type=yarn needs model.rope_theta={m.rope_theta} above 1')
  need(m.rope_type != 'llama3' or m.rope_low < m.rope_high,
       f'model.rope_low={m.rope_low} must be below model.rope_high='
       f'{m.rope_high}')
  plain = config_lib.Model()
  for field in rope.FIELDS[1:]:
    need(m.rope_type != 'default' or getattr(m, field) == getattr(
       plain, field), f'model.{field}={getattr(m, field)} stretches RoPE, but '
         'model.rope_type=default; set model.rope_type')
  need(m.rope_type == 'yarn' or m.rope_gain == plain.rope_gain,
       f'model.rope_gain={m.rope_gain} is of model.rope_type=yarn alone; set '
       'that type, or leave the gain out')
  marks = m.window_layers
  need(not marks or m.window, f'model.window_layers={marks} needs a window, '
       'but model.window=0; set model.window')
  need(not marks or (len(marks) == m.n_layers and not set(marks) - {*'sf'}),
       f'model.window_layers={marks!r} must be one letter, s or f, for each '
       f'of the model.n_layers={m.n_layers} layers')


def _check_experts(m: config_lib.Model):
  if not m.experts:
    plain = config_lib.Model()
    for field in ('experts_per_token', 'expert_ff', 'shared_experts',
                 'dense_layers', 'router_groups', 'router_top_groups',
                 'router', 'router_scale', 'norm_topk'):
      need(getattr(m, field) == getattr(plain, field),
           f'model.{field}={getattr(m, field)} needs experts, but '
           'model.experts=0; set model.experts')
    return
  need(1 <= m.experts_per_token <= m.experts,
       f'model.experts_per_token={m.experts_per_token} must lie between 1 and '
       f'model.experts={m.experts}')
  need(m.expert_ff > 0, f'model.expert_ff={m.expert_ff} must be positive')
  need(m.dense_layers < m.n_layers,
       f'model.dense_layers={m.dense_layers} leaves none of the model.n_layers'
       f'={m.n_layers} layers to the experts; set model.experts=0')
  groups, top = m.router_groups, m.router_top_groups
  need(groups > 0 and m.experts % groups == 0,
       f'model.experts={m.experts} does not split into model.router_groups='
       f'{groups}; make it a multiple')
  need(1 <= top <= groups, f'model.router_top_groups={top} must lie between 1 '
       f'and model.router_groups={groups}')
  size = m.experts // groups
  need(top == groups or size >= 2, f'model.router_groups={groups} leaves '
       f'{size} expert in each, but ranking a group takes two; set fewer')
  need(top * size >= m.experts_per_token,
       f'model.router_top_groups={top} leaves {top * size} experts to choose '
       f'model.experts_per_token={m.experts_per_token} from; set it higher')
