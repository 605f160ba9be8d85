"""Greedy accuracy, avg@k, pass@k and maj@k on held-out problems."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, prng, sharding
from mtp_rl.rollout import layout
from mtp_rl.rollout import prompts as prompts_lib


def pass_at_k(correct, samples, k):
  """Return the unbiased estimate of pass@k, 1 - C(n-c, k) / C(n, k).

  Source: Chen et al. 2021, arXiv 2107.03374.

  Args:
    correct: c, right answers among n.
    samples: n >= k.
    k: draws.
  """
  if not 0 < k <= samples:
    raise ValueError(f'pass@{k} needs 1 <= k <= {samples} samples')
  return 1. - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers, rewards):
  """Return the reward of the most frequent answer; ties split evenly.

  Empty answers do not vote; without any vote the reward is 0.0.
  """
  votes = collections.Counter(a for a in answers if a)
  if not votes:
    return 0.
  top = max(votes.values())
  best = [a for a, n in votes.items() if n == top]
  value = dict(zip(answers, rewards))
  return sum(value[a] for a in best) / len(best)


class Examiner(NamedTuple):
  """What `measure` needs to score parameters.

  Attributes:
    config: `config.Config`.
    task: see `tasks.Task`.
    place: function that moves parameters to the sampler's layout; from
      `layout.make_place`.
    greedy: from `sampler.make_generate`, one greedy completion per prompt.
    several: from `sampler.make_generate`, eval.samples completions per prompt;
      None: greedy alone.
    key: PRNG key of the stream; see `prng`.
  """
  config: config_lib.Config
  task: Any
  place: Callable
  greedy: Callable
  several: Callable | None
  key: jax.Array


def complete(examiner: Examiner, generate, placed, examples, size, key):
  """Return the completions (a list of G texts) of every example, in order.

  And the `types.Tokens` of size * G rows that they are.

  Args:
    examiner: `Examiner`.
    generate: its `greedy` or `several`.
    placed: parameters in the sampler's layout; see `Examiner.place`.
    examples: list of at most `size`; the first is repeated to fill the batch.
    size: prompts of one generation, the same for all batches of a set.
    key: PRNG key.
  """
  tokenizer, r = examiner.task.tokenizer, examiner.config.rollout
  some = [e.prompt for e in examples]
  filled = some + some[:1] * (size - len(some))
  prompts, valid = prompts_lib.pad_prompts(filled, tokenizer, r.max_prompt)
  rows = generate(placed, prompts, valid, key).rows
  response = rows.tokens[:, r.max_prompt:]
  group = response.shape[0] // size
  texts = [tokenizer.decode(row) for row in response]
  return [texts[i * group:(i + 1) * group] for i in range(len(some))], rows


def _batch_sizes(examples, config: config_lib.Config):
  """Return the problems of one generation, and its prompts.

  The samples of a problem depend on the first, which the devices do not change;
  prompts are a multiple of the devices.
  """
  count = min(config.eval.batch, -(-len(examples) // 8) * 8)
  devices = sharding.batch_devices(layout.sampling_config(config).mesh)
  return count, -(-count // devices) * devices


def _score(name, mode, start, examples, texts, task):
  """Return one dict for each completion, with its reward."""
  asked = [e for e, group in zip(examples, texts) for _ in group]
  given = [t for group in texts for t in group]
  rewards = distributed.split(
      lambda mine: task.rewards(asked[mine], given[mine]), len(asked))
  rewards = iter(np.where(np.isfinite(rewards), rewards, 0.))
  return [{'set': name, 'mode': mode, 'problem': start + i, 'sample': j,
           'prompt': e.prompt, 'answer': e.answer, 'completion': t,
           'extracted': task.extract(t), 'reward': float(next(rewards))}
          for i, (e, group) in enumerate(zip(examples, texts))
          for j, t in enumerate(group)]


def measure(examiner: Examiner, params, log=None, watch=None):
  """Score every held-out set, problem by problem.

  Args:
    examiner: `Examiner`.
    params: the model's parameters.
    log: None, or a `scoring.RowLog` of one row per completion:
      `get(set, mode, problems, k)` returns the rows of some problems or None,
      `add(rows)` stores rows.
    watch: None, or a function that is called with the greedy completions of
      each set's first batch: a list of dicts, one per problem (see `_score`),
      and the `types.Tokens` that begin with these rows.

  Returns:
    dict of 'val/<set>/{greedy,avg@k,pass@k,maj@k}' (pass@k also for the powers
    of two below k), float arrays [problems].
  """
  out, task = {}, examiner.task
  placed = examiner.place(params)
  for name, examples in task.held_out().items():
    passes = [('greedy', examiner.greedy, 1)]
    if examiner.several is not None:
      passes.append(('sample', examiner.several, examiner.config.eval.samples))
    count, size = _batch_sizes(examples, examiner.config)
    for mode, generate, k in passes:
      rows = []
      for start in range(0, len(examples), count):
        some = examples[start:start + count]
        seen = log and log.get(name, mode, range(start, start + len(some)), k)
        if not distributed.all_of(seen):
          texts, made = complete(examiner, generate, placed, some, size,
                                 prng.fold(examiner.key, start))
          seen = _score(name, mode, start, some, texts, task)
          if log:
            log.add(seen)
          if watch and mode == 'greedy' and not start:
            watch(seen, made)
        rows += seen
      out |= summarise(name, mode, rows, len(rows) // len(examples))
  return out


def means(examiner: Examiner, params, watch=None):
  """Return the mean of each score of `measure`, and the seconds it took."""
  start = time.perf_counter()
  values = {k: float(v.mean())
            for k, v in measure(examiner, params, watch=watch).items()}
  return values | {'timing_s/eval': time.perf_counter() - start}


def summarise(name, mode, rows, k):
  """Return the scores of a set's problems, arrays [N], from N * k rows."""
  rewards = np.asarray([r['reward'] for r in rows]).reshape(-1, k)
  if mode == 'greedy':
    return {f'val/{name}/greedy': rewards[:, 0]}
  out = {f'val/{name}/avg@{k}': rewards.mean(1)}
  right = (rewards >= 1).sum(1).tolist()
  for j in sorted({2 ** i for i in range(k.bit_length())} | {k}):
    if j <= k:
      out[f'val/{name}/pass@{j}'] = np.asarray(
          [pass_at_k(c, k, j) for c in right])
  answers = [[r['extracted'] for r in rows[i:i + k]]
             for i in range(0, len(rows), k)]
  out[f'val/{name}/maj@{k}'] = np.asarray(
      [majority(a, r) for a, r in zip(answers, rewards.tolist())])
  return out
