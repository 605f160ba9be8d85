"""Published weights: what they compute, and the way there and back."""

import collections
import dataclasses
import pathlib
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors import numpy as safe

from mtp_rl import config as config_lib
from mtp_rl import sharding, tree
from mtp_rl.models import config_keys, presets, pretrained, sources
from tests import published, reference

GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'logits.npz')


def _folder(family, where, drop=(), **mtp):
  """Write a family's seeded weights; return model, mtp, tensors, path."""
  m, mtp = published.model(family, **mtp)
  tensors = published.weights(m, mtp)
  kept = {k: v for k, v in tensors.items() if k not in drop}
  return m, mtp, tensors, published.write(where / 'hf', m, mtp, kept)


@pytest.mark.parametrize('family', published.TRUNKS)
def test_logits_are_those_of_transformers(family, tmp_path):
  """Golden logits; tests/golden/make.py wrote them, padding included."""
  m, mtp, _, path = _folder(family, tmp_path, modules=0)
  net, abstract = published.network(m, mtp)
  got, = published.logits(net, pretrained.load(path, abstract, m, mtp))
  valid = published.tokens()[1]
  assert GOLDEN[family].std() > 1
  np.testing.assert_allclose(got[valid], GOLDEN[family], atol=1e-4)


@pytest.mark.parametrize('family', ['mimo', 'glm4_moe'])
def test_mtp_logits_are_those_of_the_reference(family, tmp_path):
  m, mtp, tensors, path = _folder(family, tmp_path)
  net, abstract = published.network(m, mtp)
  params = pretrained.load(path, abstract, m, mtp)
  main, ahead = published.logits(net, params)
  swap = {'h_emb': 'emb_h', 'emb_h': 'h_emb'}[mtp.concat]
  wrong = published.network(m, dataclasses.replace(mtp, concat=swap))[0]
  _, swapped = published.logits(wrong, params)
  tokens, valid = published.tokens()
  for row in range(len(tokens)):
    keep = np.flatnonzero(valid[row])
    a, b = reference.logits(tokens[row, keep], tensors, presets.to_hf(m, mtp))
    np.testing.assert_allclose(main[row, keep], a, atol=1e-4)
    np.testing.assert_allclose(ahead[row, keep[:-1]], b, atol=1e-4)
    assert np.abs(swapped[row, keep[:-1]] - b).max() > .1


@pytest.mark.parametrize('family', published.FAMILIES)
def test_export_and_import_are_exact(family, tmp_path):
  m, mtp, tensors, path = _folder(family, tmp_path)
  _, abstract = published.network(m, mtp)
  params = pretrained.load(path, abstract, m, mtp)
  assert presets.from_hf(presets.to_hf(m, mtp))[1] == (
      dict(modules=1, kind='sequential', concat=mtp.concat, hidden='post_norm')
      if mtp.modules else {})
  out = str(tmp_path / 'out')
  pretrained.save(out, params, m, mtp, shard_bytes=20000)
  files = sorted(pathlib.Path(out).glob('*.safetensors'))
  written = {k: v for f in files for k, v in safe.load_file(f).items()}
  copies = {'embed_tokens', 'shared_head.head'}
  for name, value in written.items():
    if name not in tensors:
      assert any(c in name for c in copies) and family == 'glm4_moe'
      continue
    np.testing.assert_array_equal(value, tensors[name], err_msg=name)
  assert len(files) > 1 and tensors.keys() <= written.keys()
  again = pretrained.load(out, abstract, m, mtp)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  with pytest.raises(config_lib.ConfigError, match='holds weights already'):
    pretrained.save(out, params, m, mtp)


@pytest.mark.parametrize('family, changed', [
    ('mimo', 'model.mtp_layers.0.'), ('glm4_moe', 'model.layers.3.')])
def test_changed_modules_are_changed_in_the_export(family, changed, tmp_path):
  m, mtp, tensors, path = _folder(family, tmp_path)
  _, abstract = published.network(m, mtp)
  params = pretrained.load(path, abstract, m, mtp)
  moved = {**params, tree.PSI: jax.tree.map(lambda x: x + 1,
                                            params[tree.PSI])}
  pretrained.save(str(tmp_path / 'out'), moved, m, mtp)
  written = safe.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, value in tensors.items():
    np.testing.assert_array_equal(
        written[name], value + name.startswith(changed), err_msg=name)


def test_a_dense_model_can_bear_the_names_of_deepseek(tmp_path):
  m, mtp = published.model('mimo', layout='deepseek', concat='emb_h')
  tensors = published.weights(m, mtp)
  assert 'model.layers.2.eh_proj.weight' in tensors
  values = presets.to_hf(m, mtp)
  del values['mtp_rl']
  assert presets.from_hf(values, 'deepseek')[1]['concat'] == 'emb_h'
  path = published.write(tmp_path / 'in', m, mtp, tensors, mtp_rl=None)
  params = pretrained.load(path, published.network(m, mtp)[1], m, mtp)
  pretrained.save(str(tmp_path / 'out'), params, m, mtp)
  written = safe.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, value in tensors.items():
    np.testing.assert_array_equal(written[name], value, err_msg=name)
  for copy in ('embed_tokens', 'shared_head.head'):
    assert f'model.layers.2.{copy}.weight' in written
  with pytest.raises(config_lib.ConfigError, match='set mtp.layout=deepseek'):
    pretrained.check(path, m, dataclasses.replace(mtp, layout=''))


def test_every_tensor_that_does_not_fit_is_in_one_error(tmp_path):
  m, mtp = published.model('mimo')
  tensors = published.weights(m, mtp)
  del tensors['model.layers.1.mlp.up_proj.weight']
  del tensors['model.mtp_layers.0.input_proj.weight']
  tensors['model.norm.weight'] = np.ones(7, np.float32)
  tensors['model.layers.0.surprise'] = np.ones(7, np.float32)
  path = published.write(tmp_path / 'hf', m, mtp, tensors)
  with pytest.raises(config_lib.ConfigError) as error:
    pretrained.load(path, published.network(m, mtp)[1], m, mtp)
  for said in ('unknown: model.layers.0.surprise;',
               'missing: model.layers.1.mlp.up_proj.weight, '
               'model.mtp_layers.0.input_proj.weight;',
               'of another shape: model.norm.weight (7,) for (24,);'):
    assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_modules_are_fresh_on_request_only(tmp_path):
  m, mtp = published.model('llama', modules=2)
  bare = dataclasses.replace(mtp, modules=0)
  path = published.write(tmp_path / 'hf', m, bare, published.weights(m, bare))
  net, abstract = published.network(m, mtp)
  with pytest.raises(config_lib.ConfigError, match='set mtp.fresh=true'):
    pretrained.load(path, abstract, m, mtp)
  fresh = jax.jit(net.init)(jax.random.key(3), *published.tokens())[
      'params'][tree.PSI]
  params = pretrained.load(path, abstract, m, mtp, fresh)
  jax.tree.map(np.testing.assert_array_equal, params[tree.PSI], fresh)
  # With both depths written, one can be read and the other left.
  pretrained.save(str(tmp_path / 'out'), params, m, mtp)
  one = dataclasses.replace(mtp, modules=1)
  got = pretrained.load(str(tmp_path / 'out'), published.network(m, one)[1], m,
                        one)
  jax.tree.map(np.testing.assert_array_equal, got[tree.PSI]['depth_1'],
               fresh['depth_1'])


def test_a_copy_that_differs_is_refused(tmp_path):
  m, mtp, tensors, path = _folder('glm4_moe', tmp_path)
  _, abstract = published.network(m, mtp)
  name = 'model.layers.3.shared_head.head.weight'
  for gap, fits in ((0., True), (1e-3, False)):
    published.write(tmp_path / 'hf', m, mtp, tensors | {
        name: tensors['lm_head.weight'] + np.float32(gap)})
    if fits:
      pretrained.load(path, abstract, m, mtp)
  with pytest.raises(config_lib.ConfigError, match='shared_head.head'):
    pretrained.load(path, abstract, m, mtp)


@pytest.mark.parametrize('change, said', [
    (dict(model_type='gpt2'), "model_type='gpt2'"),
    (dict(hidden_act='gelu'), "hidden_act='gelu'"),
    (dict(rope_scaling={'type': 'longrope'}), 'rope_scaling'),
    (dict(rope_parameters={'rope_theta': 3.}, rope_theta=None),
     'model.rope_theta'),
    (dict(rope_parameters={'rope_theta': 3.}), 'another place'),
    (dict(rope_scaling={'rope_theta': 3.}), 'another place'),
    (dict(rope_scaling={'type': 'linear', 'factor': 2.},
          rope_parameters={'rope_type': 'default'}), 'but rope_parameters'),
    (dict(scale_depth=1.4), 'does not know'),
    (dict(model_type=['llama']), "model_type=\\['llama'\\]"),
    (dict(num_hidden_layers=10 ** 9), 'from 1 to 10000'),
    (dict(num_attention_heads=8), r'model.n_heads \(4, 8\)'),
    (dict(intermediate_size='40'), "d_ff the value '40'"),
    (dict(rms_norm_eps=None), 'norm_eps the value None'),
    (dict(rope_scaling='yarn'), 'must be an object'),
    (dict(rope_scaling={'type': 'linear', 'factor': float('inf')}),
     'factor=inf, which must be'),
    (dict(rope_scaling={'type': 'yarn', 'factor': 2., 'rope_theta': 1},
          rope_theta=None, max_position_embeddings=8), 'above 1'),
    (dict(mtp_layer_types=1), 'mtp_layer_types=1'),
    (dict(layer_types=[{}, {}]), 'layer_types'),
    (dict(mtp_rl={'concat': 'emb_h'}), 'mtp.concat')])
def test_another_architecture_is_named(change, said, tmp_path):
  m, mtp = published.model('mimo')
  path = published.write(tmp_path / 'hf', m, mtp, published.weights(m, mtp),
                         **change)
  with pytest.raises(config_lib.ConfigError, match=said):
    pretrained.check(path, m, mtp)


@pytest.mark.parametrize('damage, said', [
    (lambda d: (d / 'config.json').unlink(), 'config.json cannot be read'),
    (lambda d: (d / 'config.json').write_text('[]'), 'no JSON object'),
    (lambda d: (d / 'part-1.safetensors').unlink(), 'part-1.safetensors'),
    (lambda d: (d / 'part-0.safetensors').write_bytes(b'\x80\x04.'),
     'part-0.safetensors cannot be read')])
def test_a_damaged_folder_is_named(damage, said, tmp_path):
  m, mtp, _, path = _folder('llama', tmp_path)
  damage(tmp_path / 'hf')
  with pytest.raises(config_lib.ConfigError, match=said):
    pretrained.check(path, m, mtp)
  with pytest.raises(config_lib.ConfigError, match='model.pretrained'):
    pretrained.check(path + '/nothing', m, mtp)


def test_integers_are_no_weights(tmp_path):
  m, mtp, tensors, _ = _folder('llama', tmp_path)
  whole = {k: v.astype(np.int32) for k, v in tensors.items()}
  path = published.write(tmp_path / 'i', m, mtp, whole)
  with pytest.raises(config_lib.ConfigError, match='as I32, but only F32'):
    pretrained.check(path, m, mtp)


def test_bfloat16_weights_are_read_exactly(tmp_path):
  import ml_dtypes
  m, mtp, tensors, _ = _folder('qwen3', tmp_path)
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  path = published.write(tmp_path / 'half', m, mtp, half)
  _, abstract = published.network(m, mtp)
  params = pretrained.load(path, abstract, m, mtp)
  pretrained.save(str(tmp_path / 'out'), params, m, mtp, dtype='bfloat16')
  written = safe.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, value in half.items():
    assert written[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(written[name], value, err_msg=name)


# Entries of published files: a family's own, and those of any model.
_EVERY = dict(max_position_embeddings=131072, bos_token_id=1, pad_token_id=0,
              eos_token_id=[2, 7], initializer_range=.02, use_cache=True,
              attention_dropout=0., transformers_version='4.40.1',
              rope_scaling=None, architectures=['X'], torch_dtype='bfloat16')


@pytest.mark.parametrize('family, own', [
    ('llama', dict(rope_interleaved=False, is_llama_config=True,
                   use_sliding_window=True)),
    ('llama', dict(pretraining_tp=1, mlp_bias=False, rope_scaling=dict(
        rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4.,
        original_max_position_embeddings=8192))),
    ('qwen2', dict(sliding_window=4096, max_window_layers=28,
                   use_sliding_window=True, use_mrope=False)),
    ('qwen3', dict(rope_theta=None, rope_parameters=dict(
        rope_type='yarn', factor=4., rope_theta=1e4,
        original_max_position_embeddings=32768))),
    ('mimo', dict(auto_map={'AutoConfig': 'x.Y'}, sliding_window=32768)),
    ('glm4_moe', dict(torch_dtype=None, dtype='bfloat16')),
    ('qwen3_moe', dict(decoder_sparse_step=1, router_aux_loss_coef=.001,
                       shared_expert_intermediate_size=0, qkv_bias=False,
                       use_qk_norm=True))])
def test_config_json_comes_out_as_it_went_in(family, own):
  m, mtp = published.model(family)
  values = presets.to_hf(m, mtp) | _EVERY | own
  values.pop('mtp_rl', None)
  if values['torch_dtype'] is None:
    del values['torch_dtype']
  m, fields = presets.from_hf(values)
  mtp = dataclasses.replace(mtp, **fields)
  out = presets.to_hf(m, mtp, values, 'float32')
  changed = {k for k in out.keys() | values.keys()
             if out.get(k, ...) != values.get(k, ...)}
  assert changed == {'dtype' if 'dtype' in values else 'torch_dtype'}
  assert changed < set(config_keys.MAY_DIFFER)
  # With other modules no more than the listed keys change.
  for k in (0, 2):
    out = presets.to_hf(m, dataclasses.replace(mtp, modules=k), values)
    assert {n for n in out.keys() | values.keys() if out.get(n, ...) !=
            values.get(n, ...)} <= set(config_keys.MAY_DIFFER)
    assert presets.from_hf(out)[1].get('modules', 0) == k


@pytest.mark.parametrize('family, change', [
    ('llama', dict(is_llama_config=False)), ('llama', dict(sliding_window=8)),
    ('qwen2', dict(qkv_bias=False)), ('qwen3_moe', dict(use_qk_norm=False)),
    ('qwen3_moe', dict(shared_expert_intermediate_size=8))])
def test_a_key_without_effect_at_one_value_is_refused_at_others(
    family, change):
  values = presets.to_hf(*published.model(family))
  key, = change
  with pytest.raises(config_lib.ConfigError, match=f'sets {key}='):
    presets.from_hf(values | change)


def test_a_bfloat16_export_keeps_the_routers_in_float32(tmp_path):
  m, mtp, tensors, path = _folder('glm4_moe', tmp_path)
  params = pretrained.load(path, published.network(m, mtp)[1], m, mtp)
  pretrained.save(str(tmp_path / 'out'), params, m, mtp, dtype='bfloat16')
  written = safe.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, value in tensors.items():
    router = '.mlp.gate.' in name
    assert (written[name].dtype == np.float32) == router, name
    if router:
      np.testing.assert_array_equal(written[name], value)
  assert sum('e_score_correction_bias' in n for n in written) == 3


def test_each_device_reads_its_own_shards(tmp_path, monkeypatch):
  m, mtp, _, path = _folder('glm4_moe', tmp_path)
  _, abstract = published.network(m, mtp)
  whole = pretrained.load(path, abstract, m, mtp)
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=2, tensor=2, expert=2))
  sharded = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract, sharding.tree_shardings(abstract, mesh))
  reads = collections.Counter()
  one = sources.Folder.read

  def counted(source, name, slices):
    reads[name] += 1
    assert list(reads)[-1] == name  # all parts of a tensor, then the next
    return one(source, name, slices)

  monkeypatch.setattr(sources.Folder, 'read', counted)
  params = pretrained.load(path, sharded, m, mtp)
  assert max(reads.values()) > 1
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  gate = params['blocks']['layers']['experts']['gate']['kernel']
  assert gate.shape == (2, 8, 24, 12)
  assert gate.addressable_shards[0].data.shape == (2, 4, 12, 6)


def test_host_memory_is_one_parameter_and_one_tensor(tmp_path, monkeypatch):
  """NumPy bytes that reading a parameter adds: its own, and one tensor.

  (On CPU an array may be the very buffer that it was read into.)
  """
  m = config_lib.Model(d_model=256, n_layers=6, n_heads=4, n_kv_heads=4,
                       d_ff=512, vocab_size=1024)
  mtp = config_lib.MTP(modules=0)
  path = published.write(tmp_path / 'hf', m, mtp, published.weights(m, mtp))
  _, abstract = published.network(m, mtp)
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
  sharded = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract, sharding.tree_shardings(abstract, mesh))
  one, seen = pretrained._array, []

  def watched(source, leaf, grid, transposed):
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    out = one(source, leaf, grid, transposed)
    seen.append((tracemalloc.get_traced_memory()[1] - before, out.nbytes,
                 out.nbytes // grid.size))
    return out

  monkeypatch.setattr(pretrained, '_array', watched)
  tracemalloc.start()
  pretrained.load(path, sharded, m, mtp)
  tracemalloc.stop()
  assert len(seen) == 11
  for added, own, tensor in seen:
    assert added < own + tensor + 2 ** 16


@pytest.mark.parametrize('name, count', [
    ('smollm2_135m', 134_515_008), ('qwen3_0_6b', 596_049_920),
    ('mimo_7b', 7_833_409_536), ('glm_4_5_air', 109_227_310_848)])
def test_presets_have_the_published_sizes(name, count):
  """With the MTP layer; GLM-4.5-Air without it is the 106 B of its name."""
  m, fields = presets.model(name)
  mtp = dataclasses.replace(config_lib.MTP(modules=0), **fields)
  _, abstract = published.network(m, mtp)
  size = lambda t: sum(x.size for x in jax.tree.leaves(t))
  assert size(abstract) == count
  if name == 'glm_4_5_air':
    assert size(tree.theta(abstract)) == 106_852_251_264
  values = presets.to_hf(m, mtp)
  assert not presets.differences(m, mtp, *presets.from_hf(values))
  # Every tensor of the model has a name of its own in the checkpoint.
  wanted = pretrained.shapes(abstract, m)
  assert sum(int(np.prod(s)) for s in wanted.values()) == count
  with pytest.raises(config_lib.ConfigError, match='choose from'):
    presets.model('gpt5')
