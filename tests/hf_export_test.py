"""An exported folder, loaded by transformers itself (extra hf)."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mtp_rl import tree
from mtp_rl.models import config_keys, lora, pretrained
from tests import published

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize('family', published.TRUNKS)
def test_transformers_loads_an_export_with_the_same_logits(family, tmp_path):
  m, mtp = published.model(family, modules=0)
  if family in ('llama', 'qwen2'):
    m = dataclasses.replace(
        m, rope_type='llama3' if family == 'llama' else 'yarn', rope_factor=4.,
        rope_context=8, rope_gain=1. if family == 'llama' else 1.1)
  if family.startswith('qwen'):
    m = dataclasses.replace(m, window=5,
                            window_layers='fs' if family == 'qwen3' else '')
  path = published.write(tmp_path / 'in', m, mtp, published.weights(m, mtp))
  net, abstract = published.network(m, mtp)
  params = pretrained.load(path, abstract, m, mtp)
  got, = published.logits(net, params)
  pretrained.save(str(tmp_path / 'out'), params, m, mtp,
                  max_position_embeddings=64)
  tokens, valid = published.tokens()
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', dtype=torch.float32, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  with torch.no_grad():
    for row in range(len(tokens)):
      keep = np.flatnonzero(valid[row])
      want = model(torch.from_numpy(tokens[row:row + 1, keep]).long()).logits
      np.testing.assert_allclose(got[row, keep], want[0], atol=1e-4)


@pytest.mark.parametrize('family', published.TRUNKS)
def test_what_stays_float32_is_what_transformers_keeps_so(family):
  m, mtp = published.model(family, modules=0)
  kind = published.presets.to_hf(m, mtp)['architectures'][0]
  kept = getattr(transformers, kind)._keep_in_fp32_modules_strict or ()
  ours = config_keys.FLOAT32.get(family, ())
  names = pretrained.shapes(published.network(m, mtp)[1], m)
  assert ({n for n in names if any(k in n for k in kept)}
          == {n for n in names if n.endswith(ours) and ours})


@pytest.mark.parametrize('family', published.TRUNKS)
def test_a_config_json_that_transformers_wrote_is_kept(family, tmp_path):
  m, mtp = published.model(family, modules=0)
  values = published.presets.to_hf(m, mtp)
  kind = getattr(transformers, values.pop('architectures')[0])
  kind.config_class(**values).save_pretrained(tmp_path)
  written = json.loads((tmp_path / 'config.json').read_text())
  found, modules = published.presets.from_hf(written)
  assert not published.presets.differences(m, mtp, found, modules)
  out = published.presets.to_hf(found, mtp, written, 'float32')
  assert {k for k in out.keys() | written.keys() if out.get(k, ...) !=
          written.get(k, ...)} <= set(config_keys.MAY_DIFFER)


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'glm4_moe'])
def test_peft_loads_adapters_with_the_same_logits(family, tmp_path):
  peft = pytest.importorskip('peft')
  m, mtp = published.model(family, modules=0)
  path = published.write(tmp_path / 'in', m, mtp, published.weights(m, mtp))
  base = pretrained.load(path, published.network(m, mtp)[1], m, mtp)
  pretrained.save(str(tmp_path / 'base'), base, m, mtp)
  wide = dataclasses.replace(m, lora_rank=3, lora_alpha=8.)
  if m.experts:
    wide = dataclasses.replace(wide, lora_targets='query,value,out')
  net, abstract = published.network(wide, mtp)
  rng = np.random.default_rng(4)
  params = tree.merge(base, jax.tree.map(
      lambda x: .4 * rng.normal(size=x.shape).astype(np.float32),
      tree.adapters(abstract)))
  lora.save(str(tmp_path / 'adapter'), params, wide, mtp)
  model = peft.PeftModel.from_pretrained(
      transformers.AutoModelForCausalLM.from_pretrained(
          tmp_path / 'base', dtype=torch.float32), str(tmp_path / 'adapter'))
  loaded = peft.get_peft_model_state_dict(model)
  assert loaded.keys() == lora._tensors(tree.adapters(params), wide,
                                        mtp).keys()
  merged, = published.logits(published.network(m, mtp)[0],
                             lora.merged(params, wide, mtp))
  got, = published.logits(net, params)
  tokens, valid = published.tokens()
  with torch.no_grad():
    for row in range(len(tokens)):
      keep = np.flatnonzero(valid[row])
      want = model(torch.from_numpy(tokens[row:row + 1, keep]).long()).logits
      np.testing.assert_allclose(got[row, keep], want[0], atol=1e-4)
      np.testing.assert_allclose(merged[row, keep], want[0], atol=1e-4)
