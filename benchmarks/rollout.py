r"""What a decoding step costs, by batch and length of the cache.

    python -m benchmarks.rollout [--out=FILE.json] [--rounds=20] [--cores=1]

Times one decoding step (one token in every row, SmolLM2-135M's shape, float32,
random weights) with a full cache. One process, pinned to cores; every round
times each case once, in turn, and the medians are printed. Writes
{'decode_ms': {'B,U': ms}} for batch B and U columns of the cache.
"""

import functools
import json
import os
import statistics
import sys
import time

from absl import app, flags, logging

BATCHES, COLUMNS, PROMPT = (1, 4, 16), (96, 288, 992), 32
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Of each case.', lower_bound=20)
_CORES = flags.DEFINE_integer('cores', 1, 'To run on.', lower_bound=1)


def _config(columns):
  from mtp_rl import config as config_lib
  from mtp_rl.models import presets
  model, _ = presets.model('smollm2_135m')
  return config_lib.Config(
      model=model, mtp=config_lib.MTP(modules=0, regime='rl_only'),
      rollout=config_lib.Rollout(max_prompt=PROMPT,
                                 max_response=columns - PROMPT))


def _case(batch, columns, params, ends):
  """Return a function () -> seconds of one step in the last column."""
  import jax
  import numpy as np

  from mtp_rl.rollout import decode, sampler
  config = _config(columns)
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, 1000, (batch, PROMPT)).astype(np.int32)
  state = jax.jit(functools.partial(
      sampler.prefill, config=config, ends=ends))(
          params, prompts, prompts > 0,
          sampler.identify(prompts, prompts > 0), jax.random.key(0))
  last, alive = np.full(batch, columns - 2, np.int32), np.zeros(batch, bool)
  step = jax.jit(
      functools.partial(decode.extend, config=config, ends=ends),
      donate_argnums=1)
  kept = [state]

  def run():
    state = kept.pop()._replace(column=last, done=alive)
    start = time.perf_counter()
    state = jax.block_until_ready(step(params, state))
    kept.append(state)
    return time.perf_counter() - start

  run()  # compiles
  return run


def main(argv):
  """Time all cases and print them."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected argument {argv[1]!r}')
  logging.set_verbosity(logging.WARNING)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])
  import jax

  from mtp_rl import forward, tokenizers
  params = jax.jit(lambda key: forward.init(_config(COLUMNS[0]), key))(
      jax.random.key(0))
  ends = tokenizers.CharTokenizer('').ends
  cases = {f'{b},{u}': _case(b, u, params, ends)
           for b in BATCHES for u in COLUMNS}
  seen = {name: [] for name in cases}
  for i in range(_ROUNDS.value):
    for name, run in cases.items():
      seen[name].append(run())
    print(f'\rround {i + 1} of {_ROUNDS.value}', end='', file=sys.stderr)
  print(file=sys.stderr)
  medians = {name: 1e3 * statistics.median(x) for name, x in seen.items()}
  print('batch ' + ''.join(f'{u:>10d}' for u in COLUMNS) + '  columns')
  for b in BATCHES:
    print(f'{b:<6d}' + ''.join(f'{medians[f"{b},{u}"]:>7.1f} ms'
                               for u in COLUMNS))
  if _OUT.value:
    with open(_OUT.value, 'w', encoding='utf-8') as f:
      json.dump({'decode_ms': medians}, f, indent=2)
      f.write('\n')


if __name__ == '__main__':
  app.run(main)
