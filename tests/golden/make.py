"""Write logits.npz: what transformers computes from tests/published.py.

    python -m tests.golden.make        (needs the extra hf)
"""

import pathlib

import numpy as np

from mtp_rl.models import presets
from tests import published

PATH = pathlib.Path(__file__).parent / 'logits.npz'


def logits(m, mtp, tensors):
  """Return transformers' logits of valid tokens, [n, V], and its model.

  Args:
    m: `config.Model`.
    mtp: `config.MTP` with modules=0.
    tensors: {published name: array}.
  """
  import torch
  import transformers
  values = presets.to_hf(m, mtp)
  kind = getattr(transformers, values.pop('architectures')[0])
  values.pop('torch_dtype')
  model = kind(kind.config_class(**values)).eval()
  state = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
  model.load_state_dict(fused(state, model.state_dict()))
  tokens, valid = published.tokens()
  positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
  with torch.no_grad():
    out = model(input_ids=torch.from_numpy(tokens).long(),
                attention_mask=torch.from_numpy(valid).long(),
                position_ids=torch.from_numpy(positions).long())
  return out.logits.numpy()[valid], model


def fused(state, wanted):
  """Stack experts as the torch module keeps them; tie what it ties."""
  import torch
  out = {k: v for k, v in state.items() if '.experts.' not in k}
  for name in wanted:
    if '.experts.' in name:
      stem, part = name.rsplit('.', 1)
      pick = lambda which: torch.stack(
          [state[f'{stem}.{e}.{which}_proj.weight']
           for e in range(wanted[name].shape[0])])
      out[name] = (pick('down') if part == 'down_proj' else
                   torch.cat([pick('gate'), pick('up')], 1))
  if 'lm_head.weight' in wanted:
    out.setdefault('lm_head.weight', state['model.embed_tokens.weight'])
  return out


def _golden(family):
  m, mtp = published.model(family, modules=0)
  return logits(m, mtp, published.weights(m, mtp))[0]


if __name__ == '__main__':
  np.savez_compressed(PATH, **{f: _golden(f) for f in published.TRUNKS})
