"""From prompts to a RolloutBatch: sample, reward, score, advantages."""

import time
from typing import NamedTuple

import jax
import numpy as np

from mtp_rl import distributed, types
from mtp_rl.models import moe
from mtp_rl.objectives import advantages as advantages_lib
from mtp_rl.objectives import logprobs
from mtp_rl.rollout import sampler

_REDRAW = 2 ** 32  # prompts of redraw r are those of step + r * _REDRAW


class _Drawn(NamedTuple):
  """Groups of one or more draws; rows are completions.

  Attributes:
    tokens: int32 [B, T].
    valid: bool [B, T].
    sampled: float32 [B, S], log-probs as the sampler computed them.
    rewards: float32 [B], raw.
    rows: int32 [B], position in `examples`.
  """
  tokens: np.ndarray
  valid: np.ndarray
  sampled: np.ndarray
  rewards: np.ndarray
  rows: np.ndarray


def _draw(params, step, redraw, *, task, config, generate, key, examples,
          costs):
  """Return one draw of P groups; appends its examples and costs."""
  start = time.perf_counter()
  g = config.rl.group
  some = task.prompts(step + redraw * _REDRAW, config.rl.prompts)
  prompts, prompt_valid = sampler.pad_prompts(
      [e.prompt for e in some], task.tokenizer, config.rollout.max_prompt)
  key = jax.random.fold_in(key, step)
  if redraw:
    key = jax.random.fold_in(key, redraw)
  tokens, sampled = distributed.fetch(
      generate(params, prompts, prompt_valid, key))
  generated = time.perf_counter()
  response = tokens.tokens[:, -config.rollout.max_response:]
  repeated = [e for e in some for _ in range(g)]
  rewards = distributed.split(lambda mine: task.rewards(
      repeated[mine], [task.tokenizer.decode(row) for row in response[mine]]),
                              len(repeated)).astype(np.float32)
  costs.append((generated - start, time.perf_counter() - generated,
                tokens.valid[:, -config.rollout.max_response:].sum()))
  rows = np.arange(len(repeated), dtype=np.int32) + len(examples)
  examples += repeated
  return _Drawn(tokens.tokens, tokens.valid, sampled, rewards, rows)


def _draw_batch(draw, config):
  """Return P groups, redrawn for varied ones, and metrics of the drawing.

  DAPO's dynamic sampling (Yu et al. 2025): prompts are drawn again, at most
  rl.dynamic_sampling times, until P groups have raw rewards that differ; where
  they do not suffice, uniform groups fill the batch and are counted.
  """
  g, wanted, most = (config.rl.group, config.rl.prompts,
                     config.rl.dynamic_sampling)
  drawn = draw(0)
  if not most:
    return drawn, {}
  redraws = 0
  varied = advantages_lib.varied_groups(drawn.rewards, g)
  while varied.sum() < wanted and redraws < most:
    redraws += 1
    drawn = _Drawn(*map(np.concatenate, zip(drawn, draw(redraws))))
    varied = advantages_lib.varied_groups(drawn.rewards, g)
  chosen = advantages_lib.choose_groups(varied, wanted)
  rows = (chosen[:, None] * g + np.arange(g)).reshape(-1)
  return _Drawn(*(x[rows] for x in drawn)), {
      'rollout/redraws': redraws,
      'rollout/groups_dropped': len(varied) - wanted,
      'rollout/groups_uniform': (~varied[chosen]).sum(),
      'reward/drawn_mean': drawn.rewards.mean()}


def collect(params, reference_params, step, *, task, config, place, generate,
            score, key):
  """Return one rollout, ready for the updates, and what was seen.

  Args:
    params: the policy.
    reference_params: of the KL penalty, or None.
    step: RL step; the prompts and samples are functions of it and the seed.
    task: see `tasks.Task`.
    config: `config.Config`.
    place: puts the parameters where the sampler reads them; see `layout`.
    generate: see `evaluate.make_generate`.
    score: (params, tokens, valid) -> `logprobs.LogProbs` of NumPy arrays.
    key: PRNG key of the run.

  Returns:
    `types.RolloutBatch` of NumPy arrays, the same in every process; a dict of
    metrics; and a function, row -> dict (prompt, completion, answer, reward).
  """
  g, s = config.rl.group, config.rollout.max_response
  examples, costs = [], []
  failed = task.counts()
  start = time.perf_counter()
  placed = place(params)
  placing = time.perf_counter() - start
  drawn, metrics = _draw_batch(
      lambda redraw: _draw(
          placed, step, redraw, task=task, config=config, generate=generate,
          key=key, examples=examples, costs=costs), config)
  # Of this step alone: a resumed run counts as an uninterrupted one does.
  failed = distributed.total({f'reward/{name}': n - failed[name]
                              for name, n in task.counts().items()})
  placed = None  # frees the sampler's copy before anything else is computed
  start = time.perf_counter()

  tokens = types.Tokens(drawn.tokens, drawn.valid)
  old = score(params, *tokens)
  reference = old.main
  if reference_params is not None:
    reference = score(reference_params, *tokens).main
  mask = tokens.valid[:, -s:]
  # Accuracy is of the raw rewards; what is learned from is shaped.
  shaping = advantages_lib.overlong_penalty(
      mask.sum(1), s, config.rl.overlong_buffer, config.rl.overlong_penalty)
  if config.rl.overlong_buffer:
    metrics['reward/overlong_mean'] = shaping.mean()
  advantages = np.asarray(advantages_lib.group_advantages(
      drawn.rewards + shaping, g, config.rl.advantage))
  batch = types.RolloutBatch(
      tokens.tokens, tokens.valid, mask,
      np.broadcast_to(advantages[:, None], mask.shape).astype(np.float32),
      old.main, old.heads, drawn.sampled, reference)
  generating, rewarding, made = np.sum(costs, 0)
  metrics |= {
      'timing_s/reshard': placing,
      'timing_s/rollout': generating,
      'timing_s/reward': rewarding,
      'timing_s/score': time.perf_counter() - start,
      'rollout/tokens_per_s': made / generating, **failed,
      **describe(batch, old, drawn.rewards, g, task.tokenizer.ends)}

  def show(row):
    example = examples[drawn.rows[row]]
    return {'prompt': example.prompt,
            'completion': task.tokenizer.decode(drawn.tokens[row, -s:]),
            'answer': example.answer, 'reward': float(drawn.rewards[row])}

  return batch, metrics, show


def describe(batch, old, rewards, group, ends):
  """Return the metrics of a rollout.

  Args:
    batch: `types.RolloutBatch`.
    old: `logprobs.LogProbs` with entropy and acceptance.
    rewards: float [B].
    group: G.
    ends: `tokenizers.Ends`.
  """
  mask, length = batch.mask, batch.mask.sum(1)
  full = mask.all(1)
  tokens = max(mask.sum(), 1)
  out = {
      'reward/mean': rewards.mean(), 'reward/std': rewards.std(),
      'reward/varied_groups': advantages_lib.varied_groups(
          rewards, group).mean(),
      'response_length/mean': length.mean(),
      'response_length/max': length.max(),
      # The last column is an EOS, or the completion was cut off.
      'response_length/clip_ratio': (
          full & ~np.isin(batch.tokens[:, -1], ends.eos)).mean(),
      'actor/entropy': (old.entropy * mask).sum() / tokens,
      'rollout/logprob_gap_max': np.abs(
          (old.main - batch.sampler) * mask).max()}
  if old.load is not None:
    out |= moe.balance(old.load)
  heads = old.heads.shape[-1]
  if heads:
    seen = np.asarray(logprobs.head_mask(batch.valid, mask.shape[1], heads))
    for k in range(heads):
      count = max(seen[..., k].sum(), 1)
      mean = lambda x: (x[..., k] * seen[..., k]).sum() / count
      out[f'mtp_{k + 1}/accept_top1'] = mean(old.top1)
      out[f'mtp_{k + 1}/accept_expected'] = mean(old.overlap)
  return out
