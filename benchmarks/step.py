"""Update time of each regime over Detach, rollout tokens/s, GFLOP/s.

    python -m benchmarks.step [--rounds=20] [--cores=1] [--head_chunk=16]

One process, pinned to cores; every round times each regime once, in turn, and
divides by the time of Detach in the same round. The matmul peak is measured in
the same process. Run it on an idle machine.
"""

import contextlib
import json
import os
import statistics
import sys
import time

from absl import app, flags, logging

from mtp_rl.compare import jobs

_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Timed rounds.', lower_bound=20)
_CORES = flags.DEFINE_integer('cores', 1, 'CPU cores to pin to.', lower_bound=1)
_OUT = flags.DEFINE_string('out', '', 'JSON file for the table.')
_CHUNK = flags.DEFINE_integer('head_chunk', 16, 'model.head_chunk.',
                              lower_bound=0)
_ONLY = flags.DEFINE_list('only', [], 'Rows to time in addition to detach.')

V, R, S, ROWS = 64, 16, 32, 128
# name -> regime, estimator, psi's loss ('theta': the paper's L_RL + l L_MTP).
REGIMES = {
    'detach': ('detach', 'logprob', 'ce'),
    'rl_only': ('rl_only', 'logprob', 'ce'),
    'ce': ('ce', 'logprob', 'theta'),
    'policy': ('policy', 'logprob', 'theta'),
    'occ': ('occ', 'logprob', 'theta'),
    'occ_authors': ('occ_authors', 'logprob', 'theta'),
    'policy own loss': ('policy', 'logprob', 'policy'),
    'occ own loss': ('occ', 'logprob', 'policy'),
    'policy own ce': ('policy', 'logprob', 'ce'),
    'occ own ce': ('occ', 'logprob', 'ce'),
    'occ readout': ('occ', 'readout', 'theta'),
    'occ exact': ('occ', 'exact', 'theta'),
    'occ preconditioned': ('occ', 'preconditioned', 'theta'),
    'occ cross_fitted': ('occ', 'cross_fitted', 'theta'),
    'occ affordable': ('occ', 'affordable', 'theta'),
    'occ trust_region': ('occ', 'trust_region', 'theta'),
    'occ curvature': ('occ', 'curvature', 'theta'),
    'occ gac': ('occ', 'gac', 'theta'),
    'occ pcr': ('occ', 'pcr', 'theta'),
    'occ exact 1 of 8': ('occ', 'exact', 'theta'),  # see `_HELD`
    'occ cross_fitted 1 of 8': ('occ', 'cross_fitted', 'theta'),
    'occ trust_region 1 of 8': ('occ', 'trust_region', 'theta'),
    'detach unchecked': ('detach', 'logprob', 'ce'),  # see `_unchecked`
}
# occ.measure=1 of 8 minibatches, which measures L eta as well: the mean of a
# step's updates.
_HELD = ' 1 of 8'


@contextlib.contextmanager
def _unchecked():
  """Trace updates without the check that they are finite: bad ones pass."""
  from unittest import mock

  from mtp_rl import train_step, tree
  def all_pass(before, after, loss, gradient, metrics, limit):
    del before, loss, limit
    return after, metrics | {
        'grad_norm/theta': tree.norm(tree.theta(gradient)),
        'grad_norm/psi': tree.norm(tree.psi(gradient)),
        'skipped_updates': after.skipped.total,
        'skipped_in_a_row': after.skipped.in_a_row}
  with mock.patch.object(train_step, '_unless_bad', all_pass):
    yield


def _config(regime, estimator, psi_loss, measure=0):
  from mtp_rl import config as config_lib
  from mtp_rl import validate
  config = config_lib.Config(
      model=config_lib.Model(d_model=128, n_layers=4, n_heads=4, n_kv_heads=4,
                             d_ff=512, vocab_size=V,
                             head_chunk=_CHUNK.value),
      mtp=config_lib.MTP(regime=regime, psi_loss=psi_loss),
      occ=config_lib.OCC(estimator=estimator, measure=measure,
                         probe_every=1 if measure else 4),
      rl=config_lib.RL(prompts=32, group=8, minibatches=2),
      rollout=config_lib.Rollout(max_prompt=R, max_response=S))
  validate.validate(config)
  return config


def _batch(rng):
  import numpy as np

  from mtp_rl import types
  tokens = rng.integers(3, V, (ROWS, R + S)).astype(np.int32)
  logp = lambda *shape: (rng.normal(size=shape) * .1 - 4).astype(np.float32)
  return types.RolloutBatch(
      tokens, np.ones((ROWS, R + S), bool), np.ones((ROWS, S), bool),
      rng.normal(size=(ROWS, S)).astype(np.float32), logp(ROWS, S),
      logp(ROWS, S, 1), logp(ROWS, S), logp(ROWS, S))


def matmul_peak(size=2048, repeats=12):
  """Return the best GFLOP/s of a float32 matmul in this process."""
  import jax
  import jax.numpy as jnp
  f, x = jax.jit(lambda x: x @ x), jnp.ones((size, size))
  f(x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    f(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size ** 3 / min(seconds) / 1e9


def update_flops(params, config, rows, scores=1.):
  """Return the FLOPs of forward and backward, without recomputation.

  6 per weight of a matmul and token (the output head on S of T columns, once
  for the main head and once per MTP module), and 12 T D per token and block for
  attention, times the share of its T x T scores that is computed.

  Args:
    params: the model's parameters (those of frozen modules do not count).
    config: `config.Config`.
    rows: sequences of a minibatch.
    scores: that share.
  """
  import jax
  response = config.rollout.max_response
  columns = config.rollout.max_prompt + response
  modules = config.mtp.modules * (config.mtp.regime != 'rl_only')
  weights = sum(
      x.size for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
      if 'kernel' in str(path[-1]) and (modules or 'mtp' not in str(path[0])))
  m = config.model
  blocks = m.n_layers + modules
  head = m.vocab_size * m.d_model * (1 + modules) * response / columns
  return rows * columns * (6 * (weights + head) +
                           12 * scores * columns * m.d_model * blocks)


def _sampler_rate(config, params, mesh):
  """Return the sampler's tokens/s at batch 1, 16 and 128."""
  import jax
  import numpy as np

  from mtp_rl import tokenizers
  from mtp_rl.rollout import sampler
  out = {}
  abstract = jax.tree.map(lambda x: x, params)
  for prompts, group in ((1, 1), (2, 8), (16, 8)):
    f = sampler.make_generate(config, mesh, abstract,
                              tokenizers.CharTokenizer('').ends, group)
    tokens = np.full((prompts, R), 5, np.int32)
    seconds = []
    for i in range(8):
      start = time.perf_counter()
      rows = f(params, tokens, tokens > 0, jax.random.key(i)).rows
      count = int(rows.valid[:, R:].sum())
      seconds.append((time.perf_counter() - start) / count)
    out[prompts * group] = 1 / statistics.median(seconds[1:])
  return out


def _report(seconds, flops, peak, rates):
  base = seconds['detach']
  print(f'{"regime":24s} {"ms":>8s} {"/ detach":>9s} {"quartiles":>15s} '
        f'{"GFLOP/s":>8s} {"of peak":>8s}')
  rows = {}
  for name, times in seconds.items():
    ratios = [a / b for a, b in zip(times, base)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ms, rate = statistics.median(times) * 1e3, None
    if name in flops:
      rate = flops[name] / ms / 1e6
    rows[name] = {'ms': ms, 'over_detach': middle, 'quartiles': [low, high],
                  'gflops': rate}
    tail = f'{rate:8.0f} {100 * rate / peak:7.0f}%' if rate else ''
    print(f'{name:24s} {ms:8.1f} {middle:9.3f} {low:7.3f}-{high:.3f}  {tail}')
  print(f'float32 matmul peak {peak:.0f} GFLOP/s; sampler ' + ', '.join(
      f'{rate:.0f} tokens/s at batch {b}' for b, rate in rates.items()))
  return {'rounds': len(base), 'peak_gflops': peak, 'regimes': rows,
          'sampler_tokens_per_s': rates}


def main(unused_argv):
  """Time, print the table, and write it where --out says."""
  logging.set_verbosity(logging.WARNING)
  cores = sorted(os.sched_getaffinity(0))[-_CORES.value:]
  os.sched_setaffinity(0, cores)
  import jax
  import numpy as np

  from mtp_rl import config as config_lib
  from mtp_rl import sharding, train_step
  mesh = sharding.make_mesh(config_lib.Mesh())
  batch = _batch(np.random.default_rng(0))
  wanted = set(_ONLY.value) | {'detach'} if _ONLY.value else set(REGIMES)
  runs, flops, seconds = {}, {}, {}
  with jax.set_mesh(mesh):
    peak = matmul_peak()
    for name in (n for n in REGIMES if n in wanted):
      config = _config(*REGIMES[name], measure=int(name.endswith(_HELD)))
      steps = train_step.make(config, mesh)
      state = steps.init(jax.random.key(0))
      start = time.perf_counter()
      with (_unchecked() if name.endswith('unchecked')
            else contextlib.nullcontext()):  # traced at the first call
        state, _ = jax.block_until_ready(steps.update(state, batch))
      if steps.hold:
        state, _ = jax.block_until_ready(steps.hold(state, batch))
      print(f'compiled {name} in {time.perf_counter() - start:.0f} s',
            file=sys.stderr, flush=True)
      runs[name], seconds[name] = [steps, state], []
      if REGIMES[name][1] != 'curvature':
        flops[name] = update_flops(state.params, config, ROWS)
    rates = _sampler_rate(_config(*REGIMES['detach']), runs['detach'][1].params,
                          mesh)
    for _ in range(_ROUNDS.value):
      for name, run in runs.items():
        taken = []
        for f in filter(None, (run[0].update, run[0].hold)):
          start = time.perf_counter()
          run[1], _ = jax.block_until_ready(f(run[1], batch))
          taken.append(time.perf_counter() - start)
        seconds[name].append((taken[0] + 7 * taken[-1]) / 8)
  result = _report(seconds, flops, peak, rates)
  if _OUT.value:
    with open(_OUT.value, 'w', encoding='utf-8') as f:
      json.dump({'cores': len(cores), **result}, f, indent=2)


if __name__ == '__main__':
  if 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = jobs.MALLOC
    os.execv(sys.executable, [sys.executable, '-m', 'benchmarks.step',
                              *sys.argv[1:]])
  app.run(main)
