"""Drafts: the tokens of plain decoding, or exactly its distribution."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mtp_rl import config as config_lib
from mtp_rl import forward, prng, types
from mtp_rl.rollout import decode, describe, draft, sampler
from mtp_rl.rollout import prompts as prompts_lib
from tests import conftest, sampler_test

TOKENIZER = sampler_test.TOKENIZER
V, GROUP = sampler_test.V, 8


def _config(mtp, model=None, **rollout):
  return conftest.tiny_config(
      model=dict(vocab_size=V) | (model or {}), mtp=mtp,
      rollout=dict(max_response=11) | rollout)


def _params(config):
  """Parameters whose modules agree with the main head now and then."""
  params = sampler_test._sharp(config)
  for depth in params['mtp'].values():  # the token ahead shows in the state
    if 'proj' in depth:
      depth['proj']['kernel'] = jnp.eye(*depth['proj']['kernel'].shape) + .1 * (
          depth['proj']['kernel'])
  return params


MOE = dict(experts=4, experts_per_token=2, expert_ff=16, dense_layers=1)


@pytest.mark.parametrize('mtp, drafts, model, rollout, greedy', [
    (dict(modules=1), 1, {}, {}, False),
    (dict(modules=2), 2, {}, dict(top_k=4, temperature=.8), False),
    # One module, three times, that drafts the first tokens of the vocabulary.
    (dict(modules=1), 3, {}, dict(top_p=.8, draft_vocab=V - 3), False),
    conftest.long(dict(modules=3), 3, {}, {}, True),
    conftest.long(dict(modules=2, kind='parallel'), 3, {}, {}, False),
    conftest.long(dict(modules=1, unroll=2, hidden='pre_norm',
                       concat='emb_h'), 2, {}, dict(max_response=150), False),
    conftest.long(dict(modules=1), 2, dict(window=3), {}, False),
    conftest.long(dict(modules=1), 2, MOE, {}, False)])
def test_coupled_drafts_change_no_token(mtp, drafts, model, rollout, greedy):
  """Ragged prompts, ends inside drafts, rows that fill the last column."""
  config = _config(dict(regime='detach') | mtp, model, **rollout)
  params = _params(config)
  run = functools.partial(sampler_test._generate, params, group=GROUP,
                          greedy=greedy)
  plain = run(config)
  config.rollout.draft = drafts
  got = run(config)
  np.testing.assert_array_equal(got.rows.tokens, plain.rows.tokens)
  np.testing.assert_array_equal(got.rows.valid, plain.rows.valid)
  np.testing.assert_allclose(got.logprobs, plain.logprobs, atol=1e-5)
  valid = got.rows.valid[:, 6:]
  assert valid[:, -1].any() and (greedy or model or not valid[:, -1].all())
  forwards, tokens, drafted, *accepted = got.counts.tolist()
  assert plain.counts[1] == tokens == valid.sum() - len(valid)
  assert drafted == forwards and plain.counts[2] == 0
  assert accepted == sorted(accepted, reverse=True) and accepted[0] > 0
  assert forwards < tokens  # some drafts were accepted
  # A row that ends with an accepted draft draws no token behind it.
  assert sum(accepted) <= tokens <= forwards + sum(accepted)


def test_drafts_behind_the_end_of_a_row_do_not_count():
  """Three rows accept all, one was done; they draw 3, 2, 1 and no tokens."""
  before = SimpleNamespace(
      column=jnp.array([4, 4, 4, 4]), counts=jnp.array([5, 7, 5, 2, 1]),
      done=jnp.array([False, False, False, True]))
  after = SimpleNamespace(column=jnp.array([7, 6, 5, 4]))
  yes = jnp.ones(4, bool)
  counts = decode.count_forward(before, after, yes, yes)
  # 3 rows, 6 tokens; draft 1 of all three, draft 2 of the first two.
  assert counts.tolist() == [5 + 3, 7 + 6, 5 + 3, 2 + 3, 1 + 2]


def test_drafts_are_what_the_modules_score():
  """The modules' logits while decoding are those of the whole sequence."""
  config = _config(dict(modules=2, regime='detach'), draft=2, max_response=9)
  params = _params(config)
  prompts, valid = prompts_lib.pad_prompts(sampler_test.PROMPTS, TOKENIZER, 6)
  fixed = dict(config=config, ends=TOKENIZER.ends)
  state = jax.jit(functools.partial(sampler.prefill, **fixed))(
      params, prompts, valid, prng.identify(prompts, valid),
      jax.random.key(3))
  choose = lambda logits, place: decode.choose(
      logits, state.keys, place, config.rollout, False)[0]

  @jax.jit
  def proposed(state):
    drafts, logits, _ = draft.propose(params, state, choose, config=config)
    return drafts, jax.nn.log_softmax(logits)

  step = jax.jit(functools.partial(draft.speculate, params, **fixed))
  compared = 0
  for _ in range(3):
    drafts, logq = map(np.asarray, proposed(state))
    for row in range(len(prompts)):
      end = int(state.column[row]) + 1
      if state.done[row] or end + 2 > 15:
        continue
      line = np.asarray(state.tokens)[row:row + 1, :15].copy()
      line[0, end:end + 2] = drafts[row]
      there = np.asarray(sampler_test_there(state, row, end + 2))
      scored = forward.score(params, types.Tokens(line, there), config=config)
      for k in range(2):
        want = np.asarray(scored.mtp)[0, end + k - 6, k]
        np.testing.assert_allclose(logq[row, k, drafts[row, k]], want,
                                   atol=1e-4)
        compared += 1
    state = step(state)
  assert compared >= 8


def sampler_test_there(state, row, end):
  """bool [1, 15]: the row's tokens up to column `end`."""
  prompt = np.asarray(state.prompt)[row]
  return np.concatenate([prompt, np.arange(6, 15) < end])[None]


def test_rejection_by_hand():
  """p = (.5, .3, .2), q = (.2, .2, .6): 2 is kept with chance 1/3, and the
  residual is (.3, .1, 0) / .4."""
  p = jnp.log(jnp.asarray([.5, .3, .2]))
  q = jnp.log(jnp.asarray([.2, .2, .6]))
  target = jnp.broadcast_to(p, (1, 2, 3))
  def run(token, uniform, gumbel=(0., 0., 0.)):
    noise = jnp.broadcast_to(jnp.asarray(gumbel), (1, 2, 3))
    tokens, kept = draft.reject(target, q[None, None], jnp.asarray([[token]]),
                                jnp.asarray([[uniform]]), noise)
    return tokens[0].tolist(), bool(kept[0, 0])
  assert run(0, .99) == ([0, 0], True)  # p > q: always kept; then p's argmax
  assert run(2, .33) == ([2, 0], True)
  assert run(2, .34) == ([0, 0], False)
  # log(3) = 1.0986 is what the noise must overcome between 0 and 1 ...
  assert run(2, .9, (0., 1.09, 9.))[0][0] == 0
  assert run(2, .9, (0., 1.11, 9.))[0][0] == 1  # ... and 2 never comes


def test_rejection_has_the_exact_distribution():
  """Chi-square of the first two drawn tokens over 120,000 rows."""
  rng = np.random.default_rng(0)
  size, n = 4, 120_000
  p, q = rng.dirichlet(np.ones(size), (2, size + 1))
  # The distribution of a token depends on the one before it; row `size` is
  # that of the first.
  keys = jax.random.split(jax.random.key(1), n)

  @jax.jit
  def run(keys):
    noise = lambda which, shape: jax.vmap(lambda key: jax.random.gumbel(
        jax.random.fold_in(key, which), shape))(keys)
    first = jnp.full((n,), size)
    d1 = jnp.argmax(jnp.log(q)[first] + noise(0, (size,)), -1)
    d2 = jnp.argmax(jnp.log(q)[d1] + noise(1, (size,)), -1)
    proposal = jnp.stack([jnp.log(q)[first], jnp.log(q)[d1]], 1)
    target = jnp.stack([jnp.log(p)[first], jnp.log(p)[d1], jnp.log(p)[d2]], 1)
    uniform = jnp.exp(-jnp.exp(-noise(2, (2,))))
    tokens, kept = draft.reject(target, proposal, jnp.stack([d1, d2], 1),
                                uniform, noise(3, (3, size)))
    # Where the first draft is rejected, the second token is drawn as usual.
    later = jnp.argmax(jnp.log(p)[tokens[:, 0]] + noise(4, (size,)), -1)
    return tokens[:, 0], jnp.where(kept[:, 0], tokens[:, 1], later), kept

  one, two, kept = map(np.asarray, run(keys))
  from scipy import stats
  seen = np.bincount(one * size + two, minlength=size * size)
  expected = (p[size][:, None] * p[:size]).reshape(-1) * n
  assert stats.chisquare(seen, expected / expected.sum() * n).pvalue > 1e-3
  want = np.minimum(p[size], q[size]).sum()
  assert abs(kept[:, 0].mean() - want) < 4 * (want * (1 - want) / n) ** .5


@pytest.mark.parametrize('rollout', [
    {}, dict(top_k=3, temperature=2.), conftest.long(dict(draft_vocab=V // 2))])
def test_rejection_in_the_sampler_draws_from_the_model(rollout):
  """Counts of the first three tokens of 6,000 samples, with and without."""
  config = _config(dict(modules=1, regime='detach'), max_response=3, **rollout)
  params = _params(config)
  run = functools.partial(sampler_test._generate, params, texts=['ab'],
                          group=6000)
  count = lambda drawn: np.bincount(
      drawn.rows.tokens[:, 6:] @ np.array([V * V, V, 1]), minlength=V ** 3)
  plain = count(run(config))
  config.rollout.draft, config.rollout.verify = 2, 'rejection'
  got = run(config, seed=5)
  from scipy import stats
  both = np.stack([plain, count(got)])
  common = both[:, both.sum(0) >= 20]
  assert common.shape[1] >= 5
  assert stats.chi2_contingency(common).pvalue > 1e-3
  assert got.counts[3] > (100 if config.rollout.draft_vocab else 1000)


def test_a_token_keeps_its_noise_in_a_smaller_vocabulary():
  keys, places = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 1), int)
  small, large = (decode.noise(keys, places, (n,), prng.Draw.TOKEN)
                  for n in (5, 49))
  np.testing.assert_array_equal(small, large[..., :5])


def test_drafts_in_vain_are_said_once(caplog):
  logging.get_absl_logger().propagate = True
  for accepted in ([300, 200], [3, 0], [2, 0]):
    row = describe.drafting(np.array([400, 500, 300, *accepted]))
  said = [r.getMessage() for r in caplog.records]
  assert len(said) == 1 and 'of 300 first drafts 3 were accepted' in said[0]
  assert row == {'rollout/tokens_per_forward': 1.25, 'rollout/draft_share': .75,
                 'rollout/accepted_1': 2 / 300, 'rollout/accepted_2': 0}


@pytest.mark.parametrize('settings, words', [
    (dict(mtp=dict(modules=0, regime='rl_only')), 'mtp.modules'),
    (dict(rollout=dict(verify='always')), 'rollout.verify')])
def test_settings_that_cannot_draft_are_refused(settings, words):
  settings = dict(settings)
  rollout = dict(draft=2) | settings.pop('rollout', {})
  with pytest.raises(config_lib.ConfigError, match=words):
    conftest.tiny_config(rollout=rollout, **settings)


def test_many_rows_decode_without_drafts():
  config = _config(dict(regime='detach'), draft=2, draft_rows=8)
  assert sampler.with_drafts(config, 8).rollout.draft == 2
  assert sampler.with_drafts(config, 9).rollout.draft == 0
