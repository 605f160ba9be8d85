r"""What sampling costs: a step, a rollout, slots, drafts; how exact it is.

    python -m benchmarks.rollout [--out=FILE.json] [--rounds=20] [--cores=1] \
        [--parts=decode,tokens,slots,speculation,flips]

Random weights, float32, one process pinned to cores; every round times each
case of a part once, in turn, and medians are printed.

    decode       one step (one token in every row) at SmolLM2-135M's shape with
                 a full cache: {'decode_ms': {'B,U': ms}}, batch B, U columns
    tokens       whole rollouts that never end early: {'tokens_per_s'}; 'tiny'
                 is d 128, 4 layers, V 256, 16 + 32 tokens, 'smol' SmolLM2-135M
                 with 32 + 32
    slots        256 rows of 'tiny' whose lengths are nearly geometric, a
                 quarter of the longest (128) in the mean: {'slots_speedup'}, 32
                 slots over all rows at once, and what it was measured with
    speculation  three drafts by one module at SmolLM2-135M's shape, 32 + 16
                 tokens, by rows:
                 {'speculation': {rows: {'speedup', 'accepted'}}}, and with
                 'draft_vocab' the same with rollout.draft_vocab=8192. How often
                 drafts pass is set, not learned: see `_agreeing`.
    flips        how often rounding changes a draw: rows of 'tiny' (2048 of 128
                 tokens) that differ from those drawn all at once, by the type
                 of the model's activations: {'flips': {dtype: {case: rows}}};
                 counted, not timed
"""

import functools
import json
import os
import statistics
import sys
import time

from absl import app, flags, logging

BATCHES, COLUMNS, PROMPT = (1, 4, 16), (96, 288, 992), 32
ROWS, DRAFTS, FREQUENT = (1, 2, 4, 8, 16), 3, 8192
TEMPERATURE = 45.  # at which about nine first drafts in ten pass
PARTS = ('decode', 'tokens', 'slots', 'speculation', 'flips')
_PARTS = flags.DEFINE_list('parts', list(PARTS), 'Parts to time.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Of each case.', lower_bound=20)
_CORES = flags.DEFINE_integer('cores', 1, 'To run on.', lower_bound=1)
flags.register_validator(
    'parts', lambda parts: set(parts) <= set(PARTS),
    f'--parts takes some of {",".join(PARTS)}')


def _config(size, prompt, response, mtp=False, **rollout):
  """Return the config of 'tiny' or 'smol'."""
  from mtp_rl import config as config_lib
  from mtp_rl.models import presets
  model = presets.model('smollm2_135m')[0] if size == 'smol' else (
      config_lib.Model(vocab_size=256, d_model=128, n_layers=4, n_heads=4,
                       n_kv_heads=2, d_ff=384))
  return config_lib.Config(
      model=model, rollout=config_lib.Rollout(
          max_prompt=prompt, max_response=response, **rollout),
      mtp=config_lib.MTP(modules=1, regime='detach') if mtp else
      config_lib.MTP(modules=0, regime='rl_only'))


def _params(config):
  import jax

  from mtp_rl import forward
  return jax.jit(lambda key: forward.init(config, key))(jax.random.key(0))


def _ends(*eos):
  from mtp_rl import tokenizers
  return tokenizers.Ends(0, eos or (-1,))  # no token is -1: rows never end


def _prompts(rows, columns):
  import numpy as np
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 250, (rows, columns)).astype(np.int32)
  return tokens, tokens > 0


def _step(batch, columns, params):
  """Return a function () -> seconds of one step in the last column."""
  import jax
  import numpy as np

  from mtp_rl import prng
  from mtp_rl.rollout import decode, layout, sampler
  fixed = dict(config=_config('smol', PROMPT, columns - PROMPT), ends=_ends())
  prompts, valid = _prompts(batch, PROMPT)
  state = jax.jit(functools.partial(sampler.prefill, **fixed))(
      params, prompts, valid, prng.identify(prompts, valid),
      jax.random.key(0))
  last, alive = np.full(batch, columns - 2, np.int32), np.zeros(batch, bool)
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('x',))
  step = jax.jit(functools.partial(decode.extend, **fixed), donate_argnums=1,
                 compiler_options=layout.compiler_options(mesh))
  kept = [state]

  def run():
    state = kept.pop()._replace(column=last, done=alive)
    start = time.perf_counter()
    state = jax.block_until_ready(step(params, state))
    kept.append(state)
    return time.perf_counter() - start
  return run


def _rollout(config, rows, params, ends, seen=None):
  """Return a function () -> seconds of one rollout; `seen` gets the last."""
  import jax

  from mtp_rl import sharding, train_step
  from mtp_rl.rollout import slots
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    abstract = train_step.make(config, mesh).abstract.params
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding,
                                                 abstract))
  generate = slots.make_generate(config, mesh, abstract, ends, group=1)
  prompts, valid = _prompts(rows, config.rollout.max_prompt)

  def run():
    start = time.perf_counter()
    drawn = generate(params, prompts, valid, jax.random.key(1))
    if seen is not None:
      seen['drawn'] = drawn
    return time.perf_counter() - start
  return run


def _agreeing(params, share):
  """Make the module agree with the main head for part of the vocabulary.

  The trunk's blocks add nothing, so that its state is the last token's
  embedding; the module's projection picks the embedding of the token ahead, and
  its block adds nothing. Then both heads see the same, but for the last part of
  the channels, which the module misses. Tokens beyond the first FREQUENT are
  drawn seldom. Matmuls take the time that they take.
  """
  import jax
  import jax.numpy as jnp

  def silence(path, x):
    name = jax.tree_util.keystr(path)
    return jnp.zeros_like(x) if "['out']" in name or "['down']" in name else x

  params = jax.tree_util.tree_map_with_path(silence, params)
  module = params['mtp'][next(iter(params['mtp']))]
  kernel = module['proj']['kernel']  # [2 D, D]: the state, the embedding
  d = kernel.shape[1]
  module['proj']['kernel'] = jnp.zeros_like(kernel).at[d:].set(
      jnp.diag(1. * (jnp.arange(d) < share * d)).astype(kernel.dtype))
  table = params['embed']['embedding']
  rare = jnp.arange(len(table)) >= FREQUENT
  params['embed']['embedding'] = table / jnp.std(table) * jnp.where(
      rare, .1, 1.)[:, None]
  return params


def _medians(part, cases):
  """Return {name: median seconds} of cases timed in turn."""
  for run in cases.values():
    run()  # compiles
  seen = {name: [] for name in cases}
  for i in range(_ROUNDS.value):
    for name, run in cases.items():
      seen[name].append(run())
    print(f'\r{part}: round {i + 1} of {_ROUNDS.value}', end='',
          file=sys.stderr)
  print(file=sys.stderr)
  return {name: statistics.median(x) for name, x in seen.items()}


def _decode():
  params = _params(_config('smol', PROMPT, 64))
  ms = {name: 1e3 * s for name, s in _medians('decode', {
      f'{b},{u}': _step(b, u, params) for b in BATCHES
      for u in COLUMNS}).items()}
  print('batch ' + ''.join(f'{u:>10d}' for u in COLUMNS) + '  columns')
  for b in BATCHES:
    print(f'{b:<6d}' + ''.join(f'{ms[f"{b},{u}"]:>7.1f} ms' for u in COLUMNS))
  return {'decode_ms': ms}


def _tokens():
  cases, made = {}, {}
  for size, prompt, rows in (('tiny', 16, (1, 16, 128)), ('smol', 32, (1, 16))):
    config = _config(size, prompt, 32)
    params = _params(config)
    for n in rows:
      cases[f'{size},{n}'] = _rollout(config, n, params, _ends())
      made[f'{size},{n}'] = 32 * n
  out = {name: made[name] / s for name, s in _medians('tokens', cases).items()}
  for name, rate in out.items():
    print(f'{name:10s}{rate:>10.0f} tokens/s')
  return {'tokens_per_s': out}


def _slots():
  ends = _ends(*range(2, 10))  # 8 of 256 tokens, nearly equally likely
  params, seen = _params(_config('tiny', 16, 128)), {}
  seconds = _medians('slots', {
      n: _rollout(_config('tiny', 16, 128, slots=n), 256, params, ends, seen)
      for n in (32, 0)})
  lengths = seen['drawn'].rows.valid[:, 16:].sum(1)
  out = {'slots_speedup': seconds[0] / seconds[32],
         'slots': {'mean_length': float(lengths.mean()),
                   'longest': int(lengths.max()), 'rows': 256, 'slots': 32,
                   'tokens_per_s': float(lengths.sum() / seconds[32])}}
  print(f'slots: {out["slots_speedup"]:.2f} times all at once; lengths '
        f'{lengths.mean():.1f} in the mean, {lengths.max()} at most')
  return out


def _speculation():
  cases, seen = {}, {}
  shape = functools.partial(_config, 'smol', PROMPT, 16, mtp=True,
                            temperature=TEMPERATURE)
  params = _agreeing(_params(shape()), .9)
  for n in ROWS:
    for name, more in (('plain', {}), ('draft', dict(draft=DRAFTS)),
                       ('small', dict(draft=DRAFTS, draft_vocab=FREQUENT))):
      seen[n, name] = {}
      cases[n, name] = _rollout(
          shape(**more), n, params, _ends(), seen[n, name])
  seconds = _medians('speculation', cases)

  def one(n, name):
    forwards, _, _, *accepted = seen[n, name]['drawn'].counts.tolist()
    return {'speedup': seconds[n, 'plain'] / seconds[n, name],
            'accepted': [a / forwards for a in accepted]}

  out = {}
  for n in ROWS:
    out[str(n)] = one(n, 'draft') | {'draft_vocab': one(n, 'small')}
    print(f'{n:>2d} rows: {out[str(n)]["speedup"]:.2f} times as fast, '
          f'{out[str(n)]["draft_vocab"]["speedup"]:.2f} with a small draft '
          'vocabulary; accepted ' + ' '.join(
              f'{a:.2f}' for a in out[str(n)]['accepted']) + ' and ' + ' '.join(
                  f'{a:.2f}' for a in out[str(n)]['draft_vocab']['accepted']))
  return {'speculation': out}


def _flips():
  rows, out = 2048, {}
  cases = {'slots=64': dict(slots=64), 'slots=3': dict(slots=3),
           'slots=64, draft=3': dict(slots=64, draft=DRAFTS)}

  def drawn(dtype, **more):
    config, seen = _config('tiny', 16, 128, mtp=True, **more), {}
    config.model.dtype = dtype
    _rollout(config, rows, _params(config), _ends(), seen)()
    return seen['drawn'].rows.tokens

  for dtype in ('float32', 'bfloat16'):
    out[dtype], plain = {}, drawn(dtype)
    for name, more in cases.items():
      tokens = drawn(dtype, **more)
      out[dtype][name] = int((tokens != plain).any(1).sum())
      print(f'{dtype}, {name}: {out[dtype][name]} of {rows} rows differ',
            flush=True)
  return {'flips': out}


def main(argv):
  """Time the parts, print them, and write them as they come."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected argument {argv[1]!r}')
  logging.set_verbosity(logging.WARNING)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])
  out = {}
  for part in _PARTS.value:
    out |= {'decode': _decode, 'tokens': _tokens, 'slots': _slots,
            'speculation': _speculation, 'flips': _flips}[part]()
    if _OUT.value:
      with open(_OUT.value, 'w', encoding='utf-8') as f:
        json.dump(out, f, indent=2)
        f.write('\n')


if __name__ == '__main__':
  app.run(main)
