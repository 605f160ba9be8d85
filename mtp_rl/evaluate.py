"""Greedy accuracy, avg@k, pass@k and maj@k on held-out problems."""

import collections
import functools
import math

import jax
import numpy as np

from mtp_rl import distributed, sharding
from mtp_rl.rollout import layout, sampler


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

  Prompts are NumPy arrays, the same in every process, or on devices already.

  Args:
    config: `config.Config`.
    vocab_size: V.
    mesh: the device mesh of training.
    abstract: its parameters as ShapeDtypeStructs with shardings; those that
      are passed must lie as `layout.make_place` puts them.
    ends: `tokenizers.Ends`.
    group: samples a prompt.
    greedy: take the most likely token instead of sampling.
  """
  shardings = jax.tree.map(lambda x: x.sharding,
                           layout.abstract(abstract, config, mesh))
  mesh, trained = layout.sampling_mesh(config, mesh), mesh
  rows = sharding.batch_sharding(mesh)
  jitted = jax.jit(
      functools.partial(sampler.generate, config=config, vocab_size=vocab_size,
                        ends=ends, group=group, greedy=greedy),
      in_shardings=(shardings, rows, rows, None), out_shardings=(rows, rows))

  def generate(params, prompts, valid, key):
    if mesh is not trained:  # a key belongs to the mesh that it was made on
      key = np.asarray(jax.random.key_data(key))
    with jax.set_mesh(mesh):
      if mesh is not trained:
        key = jax.random.wrap_key_data(key)
      return jitted(params, *distributed.put((prompts, valid), rows), key)

  return generate


def complete(generate, params, examples, size, key, task, config):
  """Return the completions (a list of G texts) of every example, in order.

  Args:
    generate: from `make_generate`.
    params: the model's parameters.
    examples: at most `size`; filled up by repetition.
    size: prompts of a generation, one shape for all batches of a set.
    key: PRNG key.
    task: see `tasks.Task`.
    config: `config.Config`.
  """
  some = [e.prompt for e in examples]
  filled = some + some[:1] * (size - len(some))
  prompts, valid = sampler.pad_prompts(filled, task.tokenizer,
                                       config.rollout.max_prompt)
  tokens, _ = generate(params, prompts, valid, key)
  response = distributed.fetch(tokens.tokens)[:, config.rollout.max_prompt:]
  group = response.shape[0] // size
  texts = [task.tokenizer.decode(row) for row in response]
  return [texts[i * group:(i + 1) * group] for i in range(len(some))]


def _batch_size(examples, config):
  """Return the prompts of a generation: a multiple of 8 and of the devices."""
  size = min(config.eval.batch, -(-len(examples) // 8) * 8)
  devices = sharding.batch_devices(layout.sampling_config(config).mesh)
  return -(-size // devices) * devices


def _score(name, mode, start, examples, texts, task):
  """Return one dict a completion, rewarded."""
  asked = [e for e, group in zip(examples, texts) for _ in group]
  given = [t for group in texts for t in group]
  rewards = iter(distributed.split(
      lambda mine: task.rewards(asked[mine], given[mine]), len(asked)))
  return [{'set': name, 'mode': mode, 'problem': start + i, 'sample': j,
           'prompt': e.prompt, 'answer': e.answer, 'completion': t,
           'extracted': task.extract(t), 'reward': float(next(rewards))}
          for i, (e, group) in enumerate(zip(examples, texts))
          for j, t in enumerate(group)]


def measure(params, task, generate_greedy, generate, config, key, log=None):
  """Score every held-out set, problem by problem.

  Args:
    params: the model's parameters, in the sampler's layout.
    task: see `tasks.Task`.
    generate_greedy: from `make_generate`, one greedy completion.
    generate: from `make_generate`, eval.samples a prompt; None: greedy only.
    config: `config.Config`.
    key: PRNG key of the samples.
    log: None, or what keeps a row a completion: `get(set, mode, problems, k)`
      returns the rows of some problems or None, `add(rows)` keeps them.

  Returns:
    dict of 'val/<set>/{greedy,avg@k,pass@k,maj@k}' (pass@k also for the powers
    of two below k), float arrays [problems].
  """
  out = {}
  for name, examples in task.held_out().items():
    passes = [('greedy', generate_greedy, 1)]
    if generate is not None:
      passes.append(('sample', generate, config.eval.samples))
    size = _batch_size(examples, config)
    for mode, function, k in passes:
      rows = []
      for start in range(0, len(examples), size):
        some = examples[start:start + size]
        seen = log and log.get(name, mode, range(start, start + len(some)), k)
        if not distributed.all_of(seen):
          texts = complete(function, params, some, size,
                           jax.random.fold_in(key, start), task, config)
          seen = _score(name, mode, start, some, texts, task)
          if log:
            log.add(seen)
        rows += seen
      out |= summarise(name, mode, rows, len(rows) // len(examples))
  return out


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
