"""Greedy accuracy, avg@k, pass@k and maj@k on held-out problems."""

import collections
import functools
import math

import jax
import numpy as np

from mtp_rl import sharding
from mtp_rl.rollout import sampler

BATCH = 128  # prompts of one generation


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

  Empty answers do not vote; 0.0 where no answer votes.
  """
  votes = collections.Counter(a for a in answers if a)
  if not votes:
    return 0.
  top = max(votes.values())
  best = [a for a, n in votes.items() if n == top]
  value = dict(zip(answers, rewards))
  return sum(value[a] for a in best) / len(best)


def make_generate(config, vocab_size, mesh, abstract, ends, group,
                  greedy=False):
  """Return the jitted (params, prompts, valid, key) -> Tokens, log-probs.

  Args:
    config: `config.Config`.
    vocab_size: V.
    mesh: the device mesh.
    abstract: parameters as ShapeDtypeStructs with shardings.
    ends: `tokenizers.Ends`.
    group: samples a prompt.
    greedy: take the most likely token instead of sampling.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  rows = sharding.batch_sharding(mesh)
  return jax.jit(
      functools.partial(sampler.generate, config=config, vocab_size=vocab_size,
                        ends=ends, group=group, greedy=greedy),
      in_shardings=(shardings, rows, rows, None), out_shardings=(rows, rows))


def complete(generate, params, examples, key, task, config):
  """Return the completions (a list of G texts) of every example, in order.

  Prompts go in batches of one shape; the last is filled up by repetition.
  """
  size = min(BATCH, -(-len(examples) // 8) * 8)
  devices = config.mesh.data * config.mesh.fsdp
  size = -(-size // devices) * devices
  out = []
  for start in range(0, len(examples), size):
    some = [e.prompt for e in examples[start:start + size]]
    filled = some + some[:1] * (size - len(some))
    prompts, valid = sampler.pad_prompts(filled, task.tokenizer,
                                         config.rollout.max_prompt)
    tokens, _ = generate(params, prompts, valid, jax.random.fold_in(key, start))
    response = np.asarray(tokens.tokens)[:, config.rollout.max_prompt:]
    group = response.shape[0] // size
    texts = [task.tokenizer.decode(row) for row in response]
    out += [texts[i * group:(i + 1) * group] for i in range(len(some))]
  return out


def evaluate(params, task, generate_greedy, generate, config, key, rows=None):
  """Score every held-out set.

  Args:
    params: the model's parameters.
    task: see `tasks.Task`.
    generate_greedy: from `make_generate`, one greedy completion.
    generate: from `make_generate`, k samples a prompt; None: greedy only.
    config: `config.Config`.
    key: PRNG key of the samples.
    rows: list that receives one dict a completion, or None.

  Returns:
    dict of 'val/<set>/{greedy,avg@k,pass@k,maj@k}' (pass@k also for the powers
    of two below k).
  """
  metrics = {}
  for name, examples in task.held_out().items():
    passes = [('greedy', generate_greedy)]
    if generate is not None:
      passes.append(('sample', generate))
    for mode, function in passes:
      texts = complete(function, params, examples, key, task, config)
      k = len(texts[0])
      flat = task.rewards([e for e in examples for _ in range(k)],
                          [t for group in texts for t in group])
      rewards = np.asarray(flat).reshape(len(examples), k)
      if rows is not None:
        rows += [{'set': name, 'mode': mode, 'prompt': e.prompt,
                  'answer': e.answer, 'completion': t, 'reward': float(r)}
                 for e, group, some in zip(examples, texts, rewards)
                 for t, r in zip(group, some)]
      if mode == 'greedy':
        metrics[f'val/{name}/greedy'] = float(rewards.mean())
        continue
      metrics[f'val/{name}/avg@{k}'] = float(rewards.mean())
      right = (rewards >= 1).sum(1).tolist()
      for j in sorted({2 ** i for i in range(k.bit_length())} | {k}):
        if j <= k:
          metrics[f'val/{name}/pass@{j}'] = float(np.mean(
              [pass_at_k(c, k, j) for c in right]))
      answers = [[task.extract(t) for t in group] for group in texts]
      metrics[f'val/{name}/maj@{k}'] = float(np.mean(
          [majority(a, r) for a, r in zip(answers, rewards.tolist())]))
  return metrics
