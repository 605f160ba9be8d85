"""pass@k, maj@k and the evaluation loop."""

import itertools

import jax
import numpy as np
import pytest

from mtp_rl import tasks
from mtp_rl.evaluation import held_out
from mtp_rl.report import intervals
from mtp_rl.rollout import sampler
from tests import conftest


@pytest.mark.parametrize('correct, samples, k', [
    (0, 4, 2), (4, 4, 1), (2, 5, 1), (2, 5, 3), (1, 6, 6)])
def test_pass_at_k_is_the_mean_over_all_draws(correct, samples, k):
  marks = [1] * correct + [0] * (samples - correct)
  draws = [any(d) for d in itertools.combinations(marks, k)]
  np.testing.assert_allclose(held_out.pass_at_k(correct, samples, k),
                             np.mean(draws))


def test_pass_at_k_needs_k_samples():
  with pytest.raises(ValueError, match='pass@5'):
    held_out.pass_at_k(1, 4, 5)


@pytest.mark.parametrize('answers, rewards, expected', [
    (['7', '7', '3'], [1, 1, 0], 1.), (['7', '3', '3'], [1, 0, 0], 0.),
    (['7', '3'], [1, 0], .5), (['', '', '7'], [0, 0, 1], 1.),
    (['', ''], [0, 0], 0.)])
def test_majority(answers, rewards, expected):
  assert held_out.majority(answers, rewards) == expected


def test_every_problem_is_scored_once_whatever_the_batch():
  config = conftest.tiny_config(task=dict(held_out=11),
                                eval=dict(batch=4, samples=3))
  task = tasks.make(config)
  examples = task.held_out()['arithmetic']
  assert len(examples) == 11
  batches = []

  def oracle(group, wrong):
    """A generator that solves all problems but the first `wrong`."""
    answers = {e.prompt: (e.solution if i >= wrong else 'x')
               for i, e in enumerate(examples)}
    def generate(unused_params, prompts, valid, unused_key):
      batches.append(len(prompts))
      width = config.rollout.max_prompt + config.rollout.max_response
      tokens = np.zeros((len(prompts) * group, width), np.int32)
      for row, ids in enumerate(np.repeat(prompts, group, 0)):
        text = answers[task.tokenizer.decode(ids[valid[row // group]])]
        out = task.tokenizer.encode(text) + [1]
        tokens[row, 6:6 + len(out)] = out
      return sampler.Drawn(tasks.types.Tokens(tokens, tokens > 0), None, None)
    return generate

  log = _Log()
  examiner = lambda several: held_out.Examiner(
      config, task, lambda params: params, oracle(1, 3), several,
      jax.random.key(0))
  measure = lambda several: {
      k: v.mean() for k, v in held_out.measure(
          examiner(several), None, log).items()}
  got = measure(oracle(3, 1))
  np.testing.assert_allclose(got['val/arithmetic/greedy'], 8 / 11)
  for name in ('avg@3', 'pass@1', 'pass@2', 'pass@3', 'maj@3'):
    np.testing.assert_allclose(got[f'val/arithmetic/{name}'], 10 / 11)
  assert set(batches) == {4} and len(batches) == 6
  assert len(log.rows) == 11 + 33
  assert [r['prompt'] for r in log.rows[:11]] == [e.prompt for e in examples]
  # What the log knows is not sampled again: here all but the last batch.
  log.rows = log.rows[:-9]
  assert measure(oracle(3, 1)) == got and len(batches) == 7


def test_the_samples_do_not_depend_on_the_devices(monkeypatch):
  config = conftest.tiny_config(task=dict(held_out=11), eval=dict(batch=4))
  task = tasks.make(config)
  used = []

  def generate(unused_params, prompts, unused_valid, key):
    used.append((len(prompts), jax.random.key_data(key).tolist(),
                 prompts[0].tolist()))
    return sampler.Drawn(tasks.types.Tokens(np.zeros(
        (len(prompts), 6 + config.rollout.max_response), np.int32), None),
                         None, None)

  examiner = held_out.Examiner(config, task, lambda params: params, generate,
                               None, jax.random.key(0))
  seen = []
  for devices in 1, 3:
    monkeypatch.setattr(held_out.sharding, 'batch_devices', lambda _: devices)
    used.clear()
    held_out.measure(examiner, None)
    seen.append([use[1:] for use in used])
    assert {use[0] for use in used} == {4 if devices == 1 else 6}
  assert seen[0] == seen[1] and len(seen[0]) == 3


class _Log:
  """Rows in memory, as `held_out.measure` keeps them."""

  def __init__(self):
    self.rows = []

  def get(self, name, mode, problems, k):
    """Return the rows of some problems, or None."""
    found = [r for r in self.rows if r['set'] == name and r['mode'] == mode
             and r['problem'] in problems]
    return found if len(found) == k * len(problems) else None

  def add(self, rows):
    """Keep rows."""
    self.rows += rows


def test_the_bootstrap_interval_of_a_mean():
  # 100 problems, half solved: the mean's deviation is .05, so .5 -+ .098.
  low, high = intervals.bootstrap([0, 1] * 50)
  assert abs(low - .402) < .015 and abs(high - .598) < .015
  assert intervals.bootstrap([0, 1] * 50) == (low, high)
  uneven = np.arange(50) ** .5
  assert intervals.bootstrap(uneven, 1) != intervals.bootstrap(uneven, 2)
  assert intervals.bootstrap([.25] * 9) == (.25, .25)
