"""From prompts to a `Rollout`: sample, reward, score, advantages."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, prng, types
from mtp_rl.objectives import advantages as advantages_lib
from mtp_rl.objectives import logprobs
from mtp_rl.rollout import describe, judge
from mtp_rl.rollout import prompts as prompts_lib

_REDRAW = 2 ** 32  # redraw r takes the prompts of step + r * _REDRAW


class Actor(NamedTuple):
  """What `collect` needs to make rollouts.

  Attributes:
    config: `config.Config`.
    task: see `tasks.Task`.
    place: function that moves parameters to the sampler's layout; from
      `layout.make_place`.
    generate: function from `sampler.make_generate`, rl.group samples per
      prompt.
    score: function (params, `types.Tokens`) -> `logprobs.LogProbs` of NumPy
      arrays.
    score_main: the same of the main head alone.
    key: PRNG key of the stream; see `prng`.
  """
  config: config_lib.Config
  task: Any
  place: Callable
  generate: Callable
  score: Callable
  score_main: Callable
  key: jax.Array


class Rollout(NamedTuple):
  """The completions of one RL step: B rows, those of a prompt adjacent.

  Attributes:
    batch: `types.RolloutBatch` of NumPy arrays, the same in every process.
    examples: list of B `types.Example`, the problem of each row.
    rewards: float32 [B], without the overlong penalty.
    metrics: dict of numbers.
    scores: `logprobs.LogProbs` of the rows before the update.
  """
  batch: types.RolloutBatch
  examples: list
  rewards: np.ndarray
  metrics: dict
  scores: Any = None

  def sample(self, row, tokenizer):
    """Return a row as a dict: prompt, completion, answer, reward."""
    example, columns = self.examples[row], self.batch.mask.shape[1]
    return {'prompt': example.prompt,
            'completion': tokenizer.decode(self.batch.tokens[row, -columns:]),
            'answer': example.answer, 'reward': float(self.rewards[row])}


class _Draw(NamedTuple):
  """The completions (rows) of one draw, or of several draws concatenated.

  Attributes:
    tokens: int32 [B, T].
    valid: bool [B, T].
    sampled: float32 [B, S], log-probs as the sampler computed them.
    rewards: float32 [B], without the overlong penalty.
    examples: object [B], the `types.Example` of each row.
    costs: float64 [draws, 4], seconds to generate, seconds to reward, tokens
      generated, and rewards that were not finite.
    counts: int32 [draws, 3 + drafts], see `decode.SamplingState`.
    seconds: list of draws, see `sampler.Drawn`.
  """
  tokens: np.ndarray
  valid: np.ndarray
  sampled: np.ndarray
  rewards: np.ndarray
  examples: np.ndarray
  costs: np.ndarray
  counts: np.ndarray
  seconds: list


def _draw(actor, placed, step, redraw):
  """Return a `_Draw` of P groups; redraw 0 is the first draw of a step."""
  start = time.perf_counter()
  config, task = actor.config, actor.task
  asked = task.prompts(step + redraw * _REDRAW, config.rl.prompts)
  prompts, prompt_valid = prompts_lib.pad_prompts(
      [e.prompt for e in asked], task.tokenizer, config.rollout.max_prompt)
  key = prng.fold(actor.key, *([step, redraw] if redraw else [step]))
  examples = [e for e in asked for _ in range(config.rl.group)]
  with judge.Judge(task, examples) as judging:
    drawn = actor.generate(placed, prompts, prompt_valid, key, judging.take)
    generated = time.perf_counter()
    rows = drawn.rows
    rewards, bad = advantages_lib.finite_rewards(judging.rewards(
        rows.tokens[:, -config.rollout.max_response:]))
  made = rows.valid[:, -config.rollout.max_response:].sum()
  costs = (generated - start, time.perf_counter() - generated, made, bad)
  column = np.empty(len(examples), object)
  column[:] = examples
  return _Draw(rows.tokens, rows.valid, drawn.logprobs, rewards, column,
               np.asarray([costs]), drawn.counts[None], [drawn.seconds])


def _draw_batch(actor, placed, step):
  """Return a `_Draw` of P groups, varied ones if possible, and metrics.

  DAPO's dynamic sampling (Yu et al. 2025): further prompts are drawn, at most
  rl.dynamic_sampling times, until P groups have raw rewards that differ. If
  too few do, groups of equal rewards fill the batch; a metric counts them.
  """
  r = actor.config.rl
  drawn = _draw(actor, placed, step, 0)
  if not r.dynamic_sampling:
    return drawn, {}
  redraws = 0
  varied = advantages_lib.varied_groups(drawn.rewards, r.group)
  while varied.sum() < r.prompts and redraws < r.dynamic_sampling:
    redraws += 1
    more = _draw(actor, placed, step, redraws)
    drawn = _Draw(*map(np.concatenate, zip(drawn[:-1], more)),
                  drawn.seconds + more.seconds)
    varied = advantages_lib.varied_groups(drawn.rewards, r.group)
  chosen = advantages_lib.choose_groups(varied, r.prompts)
  rows = (chosen[:, None] * r.group + np.arange(r.group)).reshape(-1)
  metrics = {'rollout/redraws': redraws,
             'rollout/groups_dropped': len(varied) - r.prompts,
             'rollout/groups_uniform': (~varied[chosen]).sum(),
             'reward/drawn_mean': drawn.rewards.mean()}
  return _Draw(*(x[rows] for x in drawn[:-3]), *drawn[-3:]), metrics


def collect(actor: Actor, params, reference_params, step):
  """Return the `Rollout` of an RL step, ready for the updates.

  Args:
    actor: `Actor`.
    params: the policy.
    reference_params: parameters of the KL penalty's reference, or None.
    step: RL step; prompts and samples depend on it and the seed alone.
  """
  config, task = actor.config, actor.task
  failures = task.counts()
  start = time.perf_counter()
  placed = actor.place(params)
  placing = time.perf_counter() - start
  drawn, metrics = _draw_batch(actor, placed, step)
  # Per-step counts, so resuming does not change them.
  failures = distributed.total({f'reward/{name}': n - failures[name]
                                for name, n in task.counts().items()})
  placed = None  # free the sampler's copy before scoring
  start = time.perf_counter()
  batch, old, shaping = _batch(actor, params, reference_params, drawn)
  if config.rl.overlong_buffer:
    metrics['reward/overlong_mean'] = shaping.mean()
  generating, rewarding, made, bad = drawn.costs.sum(0)
  metrics |= {
      'timing_s/reshard': placing,
      'timing_s/rollout': generating,
      'timing_s/reward': rewarding,
      'timing_s/score': time.perf_counter() - start,
      'rollout/tokens_per_s': made / generating,
      'reward/not_finite': int(bad), **failures,
      **describe.drafting(drawn.counts.sum(0)),
      **describe.seconds(drawn.seconds),
      **describe.batch_metrics(batch, old, drawn.rewards, config.rl.group,
                               task.tokenizer.ends)}
  return Rollout(batch, list(drawn.examples), drawn.rewards, metrics, old)


def rewards(actor: Actor, params, step):
  """Return the raw rewards of an RL step's first draw, float32 [B].

  None is chosen by rl.dynamic_sampling. The arguments are those of `collect`.
  """
  return _draw(actor, actor.place(params), step, 0).rewards


def _old(actor, params, rows, sampled):
  """Return the `logprobs.LogProbs` of the policy before the updates.

  Where rl.old_logprobs=rollout and nobody asks for the modules', they are the
  sampler's own, which spares a forward pass.
  """
  m = actor.config.mtp
  if actor.config.rl.old_logprobs == 'scored' or (
      m.reference == 'mtp_old' and m.modules):
    return actor.score(params, rows)
  unread = np.zeros((*sampled.shape, config_lib.depths(m)), np.float32)
  return logprobs.LogProbs(sampled, unread)


def _batch(actor, params, reference_params, drawn):
  """Return a draw's `types.RolloutBatch`, old log-probs, overlong penalty."""
  config = actor.config
  rows = types.Tokens(drawn.tokens, drawn.valid)
  old = _old(actor, params, rows, drawn.sampled)
  main = old.main if config.rl.old_logprobs == 'scored' else drawn.sampled
  reference = main
  if reference_params is not None:
    reference = actor.score_main(reference_params, rows).main
  mask = rows.valid[:, -config.rollout.max_response:]
  # Metrics use the raw rewards, advantages the ones with the penalty.
  shaping = advantages_lib.overlong_penalty(
      mask.sum(1), config.rollout.max_response, config.rl.overlong_buffer,
      config.rl.overlong_penalty)
  advantages = advantages_lib.group_advantages(
      drawn.rewards + shaping, config.rl.group, config.rl.advantage)
  batch = types.RolloutBatch(
      rows.tokens, rows.valid, mask,
      np.broadcast_to(advantages[:, None], mask.shape).astype(np.float32),
      main, old.mtp, drawn.sampled, reference)
  return batch, old, shaping
