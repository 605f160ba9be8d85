r"""Update time and memory against sequence length, batch and vocabulary.

    python -m benchmarks.scaling --folder=DIR [--sweep_rounds=5] [--cores=1] \
        [--sweeps=length,batch,vocabulary]

One process, pinned to cores; the shapes of a sweep are timed in turn, round by
round. Memory is that of the compiled update's temporaries, without the state.
FLOPs are those of forward and backward without recomputation, with only the
attention scores that are computed (about 5/8 in blocks), and are compared with
the matmul peak of the same process. Writes DIR/scaling.json and
DIR/scaling.png.
"""

import json
import os
import statistics
import sys
import time

from absl import app, flags, logging

from benchmarks import step
from mtp_rl.compare import jobs

# --cores is that of benchmarks.step.
_OUT = flags.DEFINE_string('folder', None, 'Folder.', required=True)
_ROUNDS = flags.DEFINE_integer('sweep_rounds', 5, 'Timed rounds.',
                               lower_bound=3)
_SWEEPS = flags.DEFINE_list('sweeps', ['length', 'batch', 'vocabulary'],
                            'What to vary.')

# Sweep -> (rows, columns, vocabulary) of its updates. All lengths have the same
# number of tokens, so apart from attention time and memory should not change.
SWEEPS = {
    'length': [(8192 // t, t, 256) for t in (256, 512, 1024, 2048, 4096)],
    'batch': [(rows, 512, 256) for rows in (2, 4, 8, 16, 32)],
    'vocabulary': [(8, 512, v) for v in (256, 2048, 16384, 65536)],
}
ATTENTION = ('blocks', 'plain')
flags.register_validator(
    'sweeps', lambda names: set(names) <= set(SWEEPS),
    message=f'choose from {", ".join(SWEEPS)}')


def _config(rows, columns, vocab, attention):
  from mtp_rl import config as config_lib
  from mtp_rl import validate
  config = config_lib.Config(
      model=config_lib.Model(d_model=128, n_layers=4, n_heads=4, n_kv_heads=4,
                             d_ff=512, vocab_size=vocab,
                             attention=attention),
      rl=config_lib.RL(prompts=2 * rows, group=1, minibatches=2),
      rollout=config_lib.Rollout(max_prompt=columns // 4,
                                 max_response=columns - columns // 4))
  validate.validate(config)
  return config


def _batch(rows, columns, vocab):
  import numpy as np

  from mtp_rl import types
  rng = np.random.default_rng(0)
  answer = columns - columns // 4
  tokens = rng.integers(3, vocab, (rows, columns)).astype(np.int32)
  logp = lambda *shape: (rng.normal(size=shape) * .1 - 4).astype(np.float32)
  return types.RolloutBatch(
      tokens, np.ones((rows, columns), bool), np.ones((rows, answer), bool),
      rng.normal(size=(rows, answer)).astype(np.float32), logp(rows, answer),
      logp(rows, answer, 1), logp(rows, answer), logp(rows, answer))


def _scores(attention, columns):
  """Return the share of all T x T scores that a form computes."""
  from mtp_rl.models import attention as lib
  if attention == 'plain':
    return 1.
  n = -(-columns // lib.BLOCK)
  return sum((last - first) * last for first, last in lib._parts(n)) / n ** 2


def _prepare(shape, attention, mesh):
  """Return the row of a shape without its seconds, and how to run it."""
  import jax

  from mtp_rl import train_step
  rows, columns, vocab = shape
  config = _config(rows, columns, vocab, attention)
  steps = train_step.make(config, mesh)
  state, batch = steps.init(jax.random.key(0)), _batch(*shape)
  compiled = steps.update.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  state, _ = jax.block_until_ready(compiled(state, batch))
  row = {'rows': rows, 'columns': columns, 'vocabulary': vocab,
         'attention': attention,
         'temporary_mib': memory.temp_size_in_bytes / 2 ** 20,
         'logits_mib': rows * columns * vocab * 4 / 2 ** 20,
         'flops': step.update_flops(state.params, config, rows,
                                    _scores(attention, columns))}
  return row, compiled, [state], batch


def _sweep(shapes, attention, mesh):
  """Return a row of results for every shape of a sweep."""
  import jax
  runs = [_prepare(shape, attention, mesh) for shape in shapes]
  seconds = [[] for _ in runs]
  for _ in range(_ROUNDS.value):
    for (_, compiled, state, batch), times in zip(runs, seconds):
      start = time.perf_counter()
      state[0], _ = jax.block_until_ready(compiled(state[0], batch))
      times.append(time.perf_counter() - start)
  for (row, *_), times in zip(runs, seconds):
    row['seconds'] = statistics.median(times)
    row['gflops'] = row['flops'] / row['seconds'] / 1e9
  return [row for row, *_ in runs]


def _draw(results, path):
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  from matplotlib import ticker
  axis = {'length': ('columns', 'tokens a row (8192 in all)'),
          'batch': ('rows', 'rows of 512'),
          'vocabulary': ('vocabulary', 'vocabulary (8 rows of 512)')}
  done = list(dict.fromkeys(r['sweep'] for r in results['rows']))
  figure, axes = plt.subplots(2, len(done), figsize=(1 + 4 * len(done), 7),
                              layout='constrained', squeeze=False)
  for column, sweep in enumerate(done):
    key, label = axis[sweep]
    for attention in ATTENTION:
      rows = [r for r in results['rows']
              if r['sweep'] == sweep and r['attention'] == attention]
      x = [r[key] for r in rows]
      axes[0, column].plot(x, [r['seconds'] for r in rows], 'o-',
                           label=attention)
      axes[1, column].plot(x, [r['temporary_mib'] for r in rows], 'o-',
                           label=attention)
    if sweep == 'vocabulary':
      axes[1, column].plot(x, [r['logits_mib'] for r in rows], 'k:',
                           label='float32 logits of all tokens')
      axes[1, column].legend()
    for row in (0, 1):
      axes[row, column].set(xscale='log', yscale='log', xlabel=label)
      axes[row, column].set_xticks(x, x)
      axes[row, column].yaxis.set_major_locator(
          ticker.LogLocator(subs=(1, 2, 5)))
      axes[row, column].yaxis.set_major_formatter('{x:g}')
      axes[row, column].minorticks_off()
      axes[row, column].grid(alpha=.3)
  axes[0, 0].set_ylabel('seconds an update')
  axes[1, 0].set_ylabel('temporaries, MiB')
  axes[0, 0].legend()
  figure.suptitle('OCC update, d 128, 4 layers, float32, '
                  f'{results["cores"]} core(s), matmul peak '
                  f'{results["peak_gflops"]:.0f} GFLOP/s')
  figure.savefig(path, dpi=110)


def _save(results):
  os.makedirs(_OUT.value, exist_ok=True)
  with open(os.path.join(_OUT.value, 'scaling.json'), 'w',
            encoding='utf-8') as f:
    json.dump(results, f, indent=1)
  _draw(results, os.path.join(_OUT.value, 'scaling.png'))


def main(unused_argv):
  """Run the sweeps, print a table; JSON and figure after each."""
  logging.set_verbosity(logging.WARNING)
  cores = sorted(os.sched_getaffinity(0))[-flags.FLAGS.cores:]
  os.sched_setaffinity(0, cores)
  import jax

  from mtp_rl import config as config_lib
  from mtp_rl import sharding
  mesh, rows = sharding.make_mesh(config_lib.Mesh()), []
  with jax.set_mesh(mesh):
    peak = step.matmul_peak()
    print('sweep      attention  rows columns  vocab  seconds    MiB  GFLOP/s'
          '  of peak')
    for sweep in _SWEEPS.value:
      shapes = SWEEPS[sweep]
      for attention in ATTENTION:
        for row in _sweep(shapes, attention, mesh):
          rows.append({'sweep': sweep} | row)
          print(f'{sweep:10s} {attention:9s} {row["rows"]:5d} '
                f'{row["columns"]:7d} {row["vocabulary"]:6d} '
                f'{row["seconds"]:8.3f} {row["temporary_mib"]:6.0f} '
                f'{row["gflops"]:8.0f} {100 * row["gflops"] / peak:7.0f}%',
                flush=True)
      peak = max(peak, step.matmul_peak())
      _save({'cores': len(cores), 'peak_gflops': peak, 'rows': rows})


if __name__ == '__main__':
  if 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = jobs.MALLOC
    os.execv(sys.executable, [sys.executable, '-m', 'benchmarks.scaling',
                              *sys.argv[1:]])
  app.run(main)
