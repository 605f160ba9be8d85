"""Dynamic sampling and overlong shaping of a rollout, with a made-up policy."""

import jax
import numpy as np
import pytest

from mtp_rl import tokenizers, types
from mtp_rl.objectives import logprobs
from mtp_rl.rollout import experience, sampler
from tests import conftest

R, S, P, G = 6, 6, 8, 4


class Digits:
  """A task whose prompts tell how many of the G samples are right.

  `plan[draw]` lists the right answers of each group of a draw.
  """

  def __init__(self, plan):
    self.tokenizer = tokenizers.CharTokenizer('0123456789xy')
    self._plan, self.asked = plan, []

  def prompts(self, step, count):
    """Return the groups of the draw that `step` stands for."""
    self.asked.append(step)
    draw = step // experience._REDRAW
    return [types.Example(f'{draw}{i}{n}', str(n))
            for i, n in enumerate(self._plan[draw][:count])]

  def rewards(self, examples, completions):
    """Return 1.0 for completions in x."""
    return [float('x' in c) for c in completions]

  def counts(self):
    """Return nothing."""
    return {}


def _generate(task):
  """Samples of a group: `n` of x (right), then y; sample j has j + 2."""
  def generate(unused_params, prompts, valid, unused_key, unused_finished):
    tokens = np.zeros((P * G, R + S), np.int32)
    there = np.zeros((P * G, R + S), bool)
    for row in range(P * G):
      i, j = divmod(row, G)
      tokens[row, :R], there[row, :R] = prompts[i], valid[i]
      right = int(task.tokenizer.decode(prompts[i])[-1])
      ids = task.tokenizer.encode(('x' if j < right else 'y') * (j + 2))
      tokens[row, R:R + len(ids)] = ids
      there[row, R:R + len(ids)] = True
    return sampler.Drawn(types.Tokens(tokens, there),
                         np.zeros((P * G, S), np.float32),
                         np.array([1, 1, 0]))
  return generate


def _actor(plan, mtp=None, **rl):
  config = conftest.tiny_config(rl=dict(prompts=P, group=G) | rl, mtp=mtp or {})
  task, full = Digits(plan), lambda x: np.full((P * G, S), x, np.float32)
  score = lambda *_: logprobs.LogProbs(full(-.5), *(
      np.zeros(shape, np.float32)
      for shape in ((P * G, S, 1), (P * G, S), (P * G, S, 1), (P * G, S, 1))))
  return experience.Actor(
      config, task, place=lambda params: params, generate=_generate(task),
      score=score, score_main=lambda *_: logprobs.LogProbs(full(-.7), None),
      key=jax.random.key(0))


def _collect(plan, step=5, mtp=None, **rl):
  actor = _actor(plan, mtp, **rl)
  reference = {} if actor.config.rl.kl_coef else None
  rollout = experience.collect(actor, None, reference, step)
  samples = [rollout.sample(i, actor.task.tokenizer) for i in range(P * G)]
  return actor.task, rollout.batch, rollout.metrics, samples


@pytest.mark.parametrize('mtp, scored', [
    ({}, False), (dict(reference='mtp_old'), True),
    (dict(reference='mtp_old', regime='rl_only'), True),  # diagnose reads them
    (dict(reference='mtp_old', modules=0, regime='rl_only'), False)])
def test_the_samplers_log_probs_spare_the_scoring(mtp, scored):
  _, batch, metrics, _ = _collect([[0, 1, 4, 2, 0, 0, 3, 4]], mtp=mtp,
                                  old_logprobs='rollout')
  np.testing.assert_array_equal(batch.old_main, batch.sampler)
  assert batch.old_mtp.shape == (P * G, S, mtp.get('modules', 1))
  assert ('actor/entropy' in metrics) == scored
  # The trainer's -.5 against the sampler's 0: a gap, where both are there.
  assert metrics.get('rollout/logprob_gap_max') == (.5 if scored else None)
  _, batch, metrics, _ = _collect([[0, 1, 4, 2, 0, 0, 3, 4]], mtp=mtp)
  assert (batch.old_main == -.5).all() and 'actor/entropy' in metrics


def test_the_reference_is_scored_by_the_main_head_alone():
  _, batch, _, _ = _collect([[0, 1, 4, 2, 0, 0, 3, 4]], kl_coef=.1)
  assert (batch.reference == -.7).all() and (batch.old_main == -.5).all()


def test_rewards_are_those_of_the_first_draw():
  actor = _actor([[0, 1, 4, 2, 0, 0, 3, 4], [2] * 8], dynamic_sampling=3)
  got = experience.rewards(actor, None, 5)
  assert actor.task.asked == [5]
  np.testing.assert_array_equal(got.reshape(P, G).sum(1),
                                [0, 1, 4, 2, 0, 0, 3, 4])


def _groups(rows):
  return [r['prompt'] for r in rows[::G]]


def test_without_dynamic_sampling_the_draw_is_the_batch():
  task, batch, metrics, rows = _collect([[0, 1, 4, 2, 0, 0, 3, 4]])
  assert task.asked == [5] and len(rows) == P * G
  assert 'rollout/redraws' not in metrics
  np.testing.assert_allclose(metrics['reward/mean'], 14 / 32)
  np.testing.assert_allclose(metrics['reward/varied_groups'], 3 / 8)
  assert not batch.advantages[:G].any() and batch.advantages[G:2 * G].any()


def test_redraws_until_the_groups_are_varied():
  plan = [[0, 1, 4, 2, 0, 0, 3, 4], [4, 4, 1, 1, 0, 0, 0, 0],
          [1, 2, 3, 2, 1, 2, 3, 0], [1] * 8]
  task, batch, metrics, rows = _collect(plan, dynamic_sampling=5)
  assert task.asked == [5, 5 + 2 ** 32, 5 + 2 ** 33]
  assert _groups(rows) == ['011', '032', '063', '121', '131', '201', '212',
                           '223']
  assert metrics['rollout/redraws'] == 2
  assert metrics['rollout/groups_dropped'] == 16
  assert metrics['rollout/groups_uniform'] == 0
  np.testing.assert_allclose(metrics['reward/mean'], 14 / 32)
  np.testing.assert_allclose(metrics['reward/drawn_mean'],
                             (14 + 10 + 14) / 96)
  # Tokens, texts and advantages are of the same rows.
  for row, seen in enumerate(rows):
    text = task.tokenizer.decode(batch.tokens[row, R:])
    assert text == seen['completion'] and ('x' in text) == seen['reward']
    assert (batch.advantages[row, 0] > 0) == ('x' in text)
    assert task.tokenizer.decode(batch.tokens[row, :R]) == seen['prompt']


def test_the_bound_is_kept_and_the_filling_said():
  plan = [[0] * 8, [1, 0, 4, 0, 0, 0, 0, 2]]
  task, batch, metrics, rows = _collect(plan, dynamic_sampling=1)
  assert len(task.asked) == 2 and batch.tokens.shape[0] == P * G
  assert _groups(rows)[:3] == ['101', '172', '000']
  assert metrics['rollout/groups_uniform'] == 6
  assert metrics['rollout/redraws'] == 1


@pytest.mark.parametrize('first', [[1, 2, 3, 1, 2, 3, 1, 2]])
def test_a_varied_draw_is_left_as_it_is(first):
  once = _collect([first])
  again = _collect([first, [9] * 8], dynamic_sampling=3)
  jax.tree.map(np.testing.assert_array_equal, once[1], again[1])
  assert once[3] == again[3] and again[2]['rollout/redraws'] == 0


def test_long_answers_lose_reward_but_not_accuracy():
  """Lengths 2 to 5 of 6 and a buffer of 4: losses 0, 1/4, 2/4, 3/4."""
  _, batch, metrics, rows = _collect(
      [[4] * 8], advantage='dr_grpo', overlong_buffer=4, overlong_penalty=1.)
  np.testing.assert_allclose(batch.advantages[:G, 0],
                             [.375, .125, -.125, -.375])
  np.testing.assert_allclose(metrics['reward/overlong_mean'], -.375)
  assert metrics['reward/mean'] == 1 and metrics['reward/varied_groups'] == 0
  assert all(r['reward'] == 1 for r in rows)


def test_raw_accuracy_decides_what_is_varied():
  _, _, metrics, _ = _collect([[4] * 8, [2] * 8], dynamic_sampling=3,
                              overlong_buffer=4)
  assert metrics['rollout/redraws'] == 1
  assert metrics['rollout/groups_uniform'] == 0
