"""Where an update's time goes: the update with one part left out at a time.

    python -m benchmarks.ablation [--rounds=20] [--cores=1]

One process, pinned to cores; every round times each variant once, in turn. A
variant's results are wrong; only its time matters, and the difference to the
whole update is the time of the part left out. FLOPs are counted as in
`benchmarks.step` and compared with the matmul peak of the same process.
"""

import os
import statistics
import sys
import time
from unittest import mock

from absl import app, flags, logging

from benchmarks import step
from mtp_rl.compare import jobs

# --rounds and --cores are those of benchmarks.step.


def _variants():
  """Return {variant: patches that leave its part out}."""
  import jax.numpy as jnp
  from flax import linen as nn

  from mtp_rl.models import attention, transformer
  from mtp_rl.objectives import logprobs

  def no_attention(query, key, value, rows, kind='plain'):
    del rows, kind
    wide = lambda x: jnp.repeat(x, query.shape[2] // x.shape[2], 2)
    return wide(value) + 0 * query + 0 * wide(key)  # all projections stay

  def no_softmax(self, states, detach=False):
    del detach
    flat = states.reshape(-1, states.shape[-1])
    out = transformer.matmul(flat, self.matrix, jnp.float32)
    return out.reshape(*states.shape[:-1], -1)

  return {
      'whole': (),
      'attention (scores, softmax, values)': (
          mock.patch.object(attention, 'attend', no_attention),),
      'RoPE': (mock.patch.object(transformer, 'rotate', lambda x, *_: x),),
      'silu': (mock.patch.object(nn, 'silu', lambda x: x),),
      'log-softmax of the head': (mock.patch.object(
          logprobs._Vocabulary, 'log_softmax', no_softmax),),
  }


def _compiled(patches, mesh, batch):
  """Return a compiled update under patches, and its state in a list."""
  import contextlib

  import jax

  from mtp_rl import train_step
  config = step._config(*step.REGIMES['policy'])
  with contextlib.ExitStack() as stack:
    for patch in patches:
      stack.enter_context(patch)
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))
    compiled = steps.update.lower(state, batch).compile()
  state, _ = jax.block_until_ready(compiled(state, batch))
  return compiled, [state]


def main(unused_argv):
  """Time the variants and print a table."""
  logging.set_verbosity(logging.WARNING)
  cores = sorted(os.sched_getaffinity(0))[-flags.FLAGS.cores:]
  os.sched_setaffinity(0, cores)
  import jax
  import numpy as np

  from mtp_rl import config as config_lib
  from mtp_rl import sharding
  mesh = sharding.make_mesh(config_lib.Mesh())
  batch = step._batch(np.random.default_rng(0))
  with jax.set_mesh(mesh):
    peak = step.matmul_peak()
    runs = {name: _compiled(patches, mesh, batch)
            for name, patches in _variants().items()}
    seconds = {name: [] for name in runs}
    for _ in range(flags.FLAGS.rounds):
      for name, (compiled, state) in runs.items():
        start = time.perf_counter()
        state[0], _ = jax.block_until_ready(compiled(state[0], batch))
        seconds[name].append(time.perf_counter() - start)
    flops = step.update_flops(runs['whole'][1][0].params,
                              step._config(*step.REGIMES['policy']), step.ROWS)
  whole = statistics.median(seconds['whole'])
  print(f'whole: {whole * 1e3:.0f} ms, {flops / whole / 1e9:.0f} of '
        f'{peak:.0f} GFLOP/s ({100 * flops / whole / 1e9 / peak:.0f} %)')
  for name, times in list(seconds.items())[1:]:
    share = statistics.median(
        1 - a / b for a, b in zip(times, seconds['whole']))
    print(f'{name:40s} {100 * share:5.1f} % of the time')


if __name__ == '__main__':
  if 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = jobs.MALLOC
    os.execv(sys.executable, [sys.executable, '-m', 'benchmarks.ablation',
                              *sys.argv[1:]])
  app.run(main)
