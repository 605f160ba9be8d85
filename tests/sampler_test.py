"""Sampling: scored log-probs, ended rows, greedy, top-k, top-p."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import forward, prng, tokenizers
from mtp_rl.models import transformer
from mtp_rl.rollout import decode, draft, sampler
from mtp_rl.rollout import prompts as prompts_lib
from tests import conftest

V = 9
TOKENIZER = tokenizers.CharTokenizer('abcdef')
PROMPTS = ['abcdef', 'a', 'fed', 'cc']


def _config(**rollout):
  return conftest.tiny_config(model=dict(vocab_size=V), rollout=rollout)


def _sharp(config):
  """Return parameters with sharper logits than an untrained model's.

  So rows end and differ.
  """
  net = forward.network(config)
  params = net.init(jax.random.key(0), jnp.zeros((1, 4), int),
                    jnp.ones((1, 4), bool))['params']
  params['embed']['embedding'] *= 30.
  return params


@functools.cache
def _params():
  return _sharp(_config())


def _generate(params, config, texts=PROMPTS, group=1, greedy=False, seed=0):
  prompts, valid = prompts_lib.pad_prompts(texts, TOKENIZER, 6)
  return jax.device_get(jax.jit(functools.partial(
      sampler.generate, config=config, ends=TOKENIZER.ends, group=group,
      greedy=greedy))(params, prompts, valid,
                      prng.identify(prompts, valid), jax.random.key(seed)))


@functools.cache
def _run(config, group=1, greedy=False, seed=0):
  return _generate(_params(), config, group=group, greedy=greedy, seed=seed)[:2]


@pytest.mark.parametrize('temperature', [1., .7])
def test_sampler_log_probs_are_the_scored_ones(temperature):
  config = _config(temperature=temperature, max_response=8)
  tokens, sampled = _run(config, group=8)
  scored = jax.jit(functools.partial(
      forward.score, config=config))(_params(), tokens)
  mask = tokens.valid[:, -8:]
  assert mask.sum() > 50 and not mask.all()
  np.testing.assert_allclose(sampled[mask], np.asarray(scored.main)[mask],
                             atol=1e-5)


def test_a_finished_row_never_changes():
  tokens, sampled = _run(_config(max_response=8), group=8)
  response, valid = tokens.tokens[:, 6:], tokens.valid[:, 6:]
  ended = 0
  for row, there, logp in zip(response, valid, sampled):
    ends = np.flatnonzero(row == tokenizers.EOS)
    if len(ends):
      ended += 1
      assert there[:ends[0] + 1].all() and not there[ends[0] + 1:].any()
      assert (row[ends[0] + 1:] == tokenizers.PAD).all()
      assert (logp[ends[0] + 1:] == 0).all()
    else:
      assert there.all()
  assert ended > 0


def test_prompts_stay_as_they_were_and_samples_are_adjacent():
  tokens, _ = _run(_config(max_response=8), group=8)
  for i, text in enumerate(PROMPTS):
    for row in range(8 * i, 8 * i + 8):
      assert TOKENIZER.decode(tokens.tokens[row, :6]) == text
      assert tokens.valid[row, :6].sum() == len(text)
  assert len({tuple(r) for r in tokens.tokens[:8].tolist()}) > 1


def test_greedy_is_the_argmax_of_the_full_forward():
  config = _config(max_response=8)
  tokens, _ = _run(config, greedy=True)
  net = forward.network(config)
  h, _ = net.apply({'params': _params()}, tokens.tokens, tokens.valid)
  best = np.argmax(h @ _params()['embed']['embedding'].T, -1)
  for row in range(len(PROMPTS)):
    for column in range(6, 14):
      if tokens.valid[row, column]:
        assert tokens.tokens[row, column] == best[row, column - 1]


def test_the_loop_stops_when_all_rows_are_done(monkeypatch):
  """Where EOS comes second, one column is read, whatever max_response is."""
  config = _config(max_response=8)
  steps = []
  def eos(logits, keys, places, *unused):
    jax.debug.callback(lambda: steps.append(1))
    token = jnp.where(places > 0, tokenizers.EOS, 4).astype(jnp.int32)
    return token, jnp.zeros_like(token, jnp.float32)
  monkeypatch.setattr(decode, 'choose', eos)
  drawn = _generate(_params(), config)
  jax.effects_barrier()
  assert len(steps) == 2  # the prefill's, and one step's
  np.testing.assert_array_equal(drawn.rows.valid[:, 6:].sum(1), [2] * 4)
  assert drawn.counts.tolist() == [4, 4, 0]


def test_a_completion_depends_on_its_prompt_and_sample_alone():
  """Not on the other prompts, their order or their number."""
  config = _config(max_response=8)
  texts = [*PROMPTS, 'a', 'b']
  def of(texts, group):
    tokens = _generate(_params(), config, texts, group).rows.tokens[:, 6:]
    return tokens.reshape(len(texts), group, -1)
  want = of(texts, 4)
  order = [5, 3, 1, 0, 4, 2]  # the two 'a' in their order
  np.testing.assert_array_equal(of([texts[i] for i in order], 4), want[order])
  np.testing.assert_array_equal(of(['fed'], 4)[0], want[2])
  assert (want[1] != want[4]).any()  # equal prompts, other samples
  np.testing.assert_array_equal(of(['fed'], 2)[0], want[2, :2])


def test_restrict_by_hand():
  logits = jnp.log(jnp.asarray([[.5, .3, .15, .05]]))
  kept = lambda *a: np.isfinite(decode.restrict(logits, *a))[0].tolist()
  assert kept(0, 1.) == [True] * 4
  assert kept(2, 1.) == [True, True, False, False]
  assert kept(9, 1.) == [True] * 4
  assert kept(0, .5) == [True, False, False, False]
  assert kept(0, .6) == [True, True, False, False]
  assert kept(0, 1e-9) == [True, False, False, False]
  # Top-3 first: (.526, .316, .158), of which two hold .842.
  assert kept(3, .83) == [True, True, False, False]
  assert kept(3, .85) == [True, True, True, False]


def test_top_k_one_is_greedy():
  config = _config(max_response=8, top_k=1)
  np.testing.assert_array_equal(_run(config, seed=3)[0].tokens,
                                _run(config, greedy=True)[0].tokens)


def test_long_and_empty_prompts_are_named():
  with pytest.raises(config_lib.ConfigError, match='rollout.max_prompt=6'):
    prompts_lib.pad_prompts(['abcdefa'], TOKENIZER, 6)
  with pytest.raises(config_lib.ConfigError, match='empty prompt'):
    prompts_lib.pad_prompts([''], TOKENIZER, 6)


@pytest.mark.parametrize('response, drafts', [
    (90, 0),  # 96 columns are read as a whole
    (150, 0),  # 156 are read in four sizes
    (150, 3)])
def test_a_decoding_step_copies_no_cache(response, drafts):
  """Else a step costs layers x cache."""
  config = _config(max_response=response, draft=drafts)
  prompts, valid = prompts_lib.pad_prompts(PROMPTS * 4, TOKENIZER, 6)
  state = jax.eval_shape(functools.partial(
      sampler.prefill, config=config, ends=TOKENIZER.ends), _params(), prompts,
      valid, prng.identify(prompts, valid), jax.random.key(0))
  step = draft.speculate if config.rollout.draft else decode.extend
  loop = lambda params, state: jax.lax.fori_loop(
      0, 8, lambda _, s: step(params, s, config=config, ends=TOKENIZER.ends),
      state)
  shape = r'\d+,' + ','.join(map(str, state.cache[0].shape[1:]))
  def copies(function, *args, **donated):
    text = jax.jit(function, **donated).lower(*args).compile().as_text()
    assert re.search(rf'f32\[{shape}\]', text)
    return len(re.findall(rf'= f32\[{shape}\]\S* copy\(', text))
  assert copies(loop, _params(), state, donate_argnums=1) == 0
  # The count sees a copy where there must be one.
  assert copies(lambda c: (c, c.at[0].set(1.)), state.cache[0]) > 0


def test_the_cache_written_by_rows_is_the_scattered_one():
  """The form for TPU, and what it is chosen for."""
  rng = np.random.default_rng(0)
  cache, new = (tuple(rng.normal(size=(2, 8, 3, n, 5)).astype('float32')
                      for _ in range(2)) for n in (9, 2))
  columns = np.array([0, 7, 3, 3, 1, 6, 0, 5], np.int32)
  want = [c.copy() for c in cache]
  for row, at in enumerate(columns):
    for c, x in zip(want, new):
      c[:, row, :, at:at + 2] = x[:, row]
  for form in (transformer.write, transformer._by_rows):
    for c, w in zip(jax.jit(form)(cache, new, columns), want):
      np.testing.assert_array_equal(c, w)


def test_decoding_reads_every_column_in_use(tiny):
  """Greedy tokens across all sizes of the prefix are the full forward's."""
  config = _config(max_response=150)
  tokens, sampled = _run(config, greedy=True)
  assert tokens.valid[:, -1].any()  # a row comes to the last column
  scored = jax.jit(functools.partial(forward.score, config=config))(
      _params(), tokens)
  mask = tokens.valid[:, 6:]
  np.testing.assert_allclose(sampled[mask], np.asarray(scored.main)[mask],
                             atol=1e-5)
