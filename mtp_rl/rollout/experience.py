"""From prompts to a RolloutBatch: sample, reward, score, advantages."""

import time

import jax
import numpy as np

from mtp_rl import types
from mtp_rl.objectives import advantages as advantages_lib
from mtp_rl.objectives import logprobs
from mtp_rl.rollout import sampler


def collect(params, reference_params, step, *, task, config, generate, score,
            key):
  """Return one rollout, ready for the updates, and what was seen.

  Args:
    params: the policy.
    reference_params: of the KL penalty, or None.
    step: RL step; the prompts and samples are functions of it and the seed.
    task: see `tasks.Task`.
    config: `config.Config`.
    generate: see `evaluate.make_generate`.
    score: see `train_step.Steps`.
    key: PRNG key of the run.

  Returns:
    `types.RolloutBatch` of NumPy arrays, a dict of metrics, and a list of
    dicts (prompt, completion, answer, reward), one a completion.
  """
  start = time.perf_counter()
  g, s = config.rl.group, config.rollout.max_response
  examples = task.prompts(step, config.rl.prompts)
  prompts, prompt_valid = sampler.pad_prompts(
      [e.prompt for e in examples], task.tokenizer, config.rollout.max_prompt)
  tokens, sampled = generate(params, prompts, prompt_valid,
                             jax.random.fold_in(key, step))
  tokens = jax.tree.map(np.asarray, tokens)
  sampled = np.asarray(sampled)
  generated = time.perf_counter()

  texts = [task.tokenizer.decode(row) for row in tokens.tokens[:, -s:]]
  repeated = [e for e in examples for _ in range(g)]
  failed = task.counts()
  rewards = np.asarray(task.rewards(repeated, texts), np.float32)
  # Of this step alone: a resumed run counts as an uninterrupted one does.
  failed = {f'reward/{name}': n - failed[name]
            for name, n in task.counts().items()}
  rewarded = time.perf_counter()

  old = jax.tree.map(np.asarray, score(params, *tokens))
  reference = old.main
  if reference_params is not None:
    reference = np.asarray(score(reference_params, *tokens).main)
  mask = tokens.valid[:, -s:]
  advantages = np.asarray(advantages_lib.group_advantages(
      rewards, g, config.rl.advantage))
  batch = types.RolloutBatch(
      tokens.tokens, tokens.valid, mask,
      np.broadcast_to(advantages[:, None], mask.shape).astype(np.float32),
      old.main, old.heads, sampled, reference)
  metrics = {
      'timing_s/rollout': generated - start,
      'timing_s/reward': rewarded - generated,
      'timing_s/score': time.perf_counter() - rewarded,
      'rollout/tokens_per_s': mask.sum() / (generated - start),
      **failed,
      **describe(batch, old, rewards, g, task.tokenizer.ends)}
  rows = [{'prompt': e.prompt, 'completion': t, 'answer': e.answer,
           'reward': float(r)} for e, t, r in zip(repeated, texts, rewards)]
  return batch, metrics, rows


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
  spread = rewards.reshape(-1, group).std(1)
  tokens = max(mask.sum(), 1)
  out = {
      'reward/mean': rewards.mean(), 'reward/std': rewards.std(),
      'reward/varied_groups': (spread > 0).mean(),
      'response_length/mean': length.mean(),
      'response_length/max': length.max(),
      # The last column is an EOS, or the completion was cut off.
      'response_length/clip_ratio': (
          full & ~np.isin(batch.tokens[:, -1], ends.eos)).mean(),
      'actor/entropy': (old.entropy * mask).sum() / tokens,
      'rollout/logprob_gap_max': np.abs(
          (old.main - batch.sampler) * mask).max()}
  heads = old.heads.shape[-1]
  if heads:
    seen = np.asarray(logprobs.head_mask(batch.valid, mask.shape[1], heads))
    for k in range(heads):
      count = max(seen[..., k].sum(), 1)
      mean = lambda x: (x[..., k] * seen[..., k]).sum() / count
      out[f'mtp_{k + 1}/accept_top1'] = mean(old.top1)
      out[f'mtp_{k + 1}/accept_expected'] = mean(old.overlap)
  return out
