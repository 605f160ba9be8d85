"""The programs of a run, compiled ahead of time for accelerators not at hand.

The memory that the compiler reports is what a chip would need, and the program
what a chip would run; aot/targets.py has the chips.
"""

import dataclasses
import functools
import itertools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import (
  forward,
  prng,
  regimes,
  sharding,
  tokenizers,
  train_step,
  tree,
  types,
  validate,
)
from mtp_rl.aot import hlo, targets
from mtp_rl.report import tables
from mtp_rl.rollout import decode, draft, layout, sampler, slots
from mtp_rl.run import metrics

GIB = targets.GIB


class Row(NamedTuple):
  """What one program needs on one chip.

  Attributes:
    name: of the program.
    tokens: number of tokens that one call reads, on all chips together.
    error: None, or why it could not be compiled.
    seconds: of compilation.
    arguments, temporaries: bytes.
    beside: bytes of the run's state that stay on the chip without being
      arguments of the program.
    peak: bytes of everything on the chip.
    summary: `hlo.Summary`.
    bounds: dict of lower bounds on the seconds of a call, by the chip's FLOP/s,
      memory bandwidth and links.
  """
  name: str
  tokens: int
  error: str | None
  seconds: float
  arguments: float = math.nan
  temporaries: float = math.nan
  beside: float = math.nan
  peak: float = math.nan
  summary: hlo.Summary | None = None
  bounds: dict | None = None


def _batch(config: config_lib.Config, mesh):
  """Return an abstract minibatch in its shards."""
  rows = config.rl.prompts // config.rl.minibatches * config.rl.group
  r, s = config.rollout.max_prompt, config.rollout.max_response
  packed = config.rl.pack  # at worst as many rows; all columns are scored
  scored = r + s if packed else s
  put = lambda shape, dtype: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh))
  logp = put((rows, scored), jnp.float32)
  ahead = put((rows, scored, config_lib.depths(config.mtp)), jnp.float32)
  return types.RolloutBatch(
      put((rows, r + s), jnp.int32),
      put((rows, r + s), bool), put((rows, scored), bool), logp, logp,
      ahead, logp, logp,
      put((rows, r + s), jnp.int32) if packed else None)


def update(step, state, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of `Steps.update` or `Steps.hold`."""
  batch = _batch(config, mesh)
  return step.lower(state, batch), math.prod(batch.tokens.shape)


def score(steps, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of the log-probs of one minibatch of samples."""
  batch = _batch(dataclasses.replace(
      config, rl=dataclasses.replace(config.rl, pack=False)), mesh)
  return steps.score.lower(steps.abstract.params, batch.rows), math.prod(
      batch.tokens.shape)


def _placed(state, config: config_lib.Config, mesh):
  """Return the shardings of a `decode.SamplingState` or `sampler.Prompts`."""
  rows = sharding.batch_sharding(mesh)
  cache = NamedSharding(mesh, P(None, sharding.BATCH, 'tensor'
                                if config.model.n_kv_heads
                                % mesh.shape['tensor'] == 0 else None))
  heads = lambda pair: jax.tree.map(lambda _: cache, pair)
  out = jax.tree.map(lambda _: rows, state)._replace(
      cache=heads(state.cache), ahead=heads(state.ahead))
  return out._replace(counts=NamedSharding(mesh, P())) if hasattr(
      state, 'counts') else out


def rollout(name, params, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of a part of the sampler.

  'prefill' reads all prompts of an RL step and, without rollout.slots, copies
  their caches to the samples; 'decode' is one step of all samples (with
  rollout.draft it drafts and verifies), 'window' the steps that rollout.slots
  rows take together, 'rollout' the whole loop without slots. `params` are
  abstract, in the sampling layout.
  """
  ends, group = tokenizers.CharTokenizer('').ends, config.rl.group
  fixed = dict(config=config, ends=ends)
  mesh = layout.sampling_mesh(config, mesh)
  rows = sharding.batch_sharding(mesh)
  shape = config.rl.prompts, config.rollout.max_prompt
  put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  asked = (put(shape, jnp.int32), put(shape, bool),
           put((shape[0], 2), jnp.uint32),
           jax.eval_shape(lambda: jax.random.key(0)))
  prefill = lambda *args: sampler.prefill(*args, group=group, **fixed)
  with jax.set_mesh(mesh):
    if name == 'window':
      return _window(params, asked, config, ends, mesh)
    if name == 'prefill' and config.rollout.slots:
      read = functools.partial(sampler.read, config=config)
      return jax.jit(read).lower(params, *asked[:2]), math.prod(shape)
    state = jax.eval_shape(prefill, params, *asked)
    placed = _placed(state, config, mesh)
    if name == 'prefill':
      return jax.jit(prefill, out_shardings=placed).lower(
          params, *asked), math.prod(shape)
    if name == 'decode':
      step = draft.speculate if config.rollout.draft else decode.extend
      one = lambda params, state: step(params, state, **fixed)
      return jax.jit(one, out_shardings=placed, donate_argnums=1).lower(
          params, _with(state, placed)), shape[0] * group
    every = lambda *args: sampler.generate(*args, group=group, **fixed)
    return jax.jit(every, out_shardings=sampler.Drawn(
        rows, rows, placed.counts)).lower(params, *asked), math.prod(shape) + (
            shape[0] * group * config.rollout.max_response)


def _with(tree_, shardings):
  """Return a tree's ShapeDtypeStructs with shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=s), tree_, shardings)


def _waiting(params, config: config_lib.Config, mesh):
  """Return the bytes of the prompts that `slots` keeps during a window."""
  mesh = layout.sampling_mesh(config, mesh)
  shape = config.rl.prompts, config.rollout.max_prompt
  with jax.set_mesh(mesh):
    seen = jax.eval_shape(
        functools.partial(sampler.read, config=config), params,
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, bool))
  placed = _placed(seen._replace(logits=None), config, mesh)
  return _shard_bytes(_with(seen._replace(logits=None), placed))


def _window(params, asked, config: config_lib.Config, ends, mesh):
  """Return (lowered, tokens) of a window of `slots`; see `rollout`."""
  devices, group = sharding.batch_size(mesh), config.rl.group
  count = min(config.rollout.slots, config.rl.prompts * group)
  count -= count % devices
  drafts = bool(sampler.with_drafts(config, count).rollout.draft)

  def empty(params, prompts, valid, names, key):
    seen = sampler.read(params, prompts, valid, config=config)
    keys = prng.row_keys(key, names, group)
    return slots.empty(seen, keys, count, drafts, config)

  state = jax.eval_shape(empty, params, *asked)
  run = functools.partial(slots.window, config=config, ends=ends, greedy=False,
                          drafts=drafts)
  return jax.jit(run, donate_argnums=1).lower(params, _with(
      state, _placed(state, config, mesh))), count * slots.STEPS


SAMPLING = ('prefill', 'decode', 'window', 'rollout')


def resolve(name, config: config_lib.Config):
  """Return the config that a program's name stands for.

  Args:
    name: see experiments/compile_for.py.
    config: `config.Config`.

  Raises:
    config.ConfigError: there is no such program, or not under this config.
  """
  if name == 'reshard' and not (config.rollout.tensor or config.rollout.expert):
    raise config_lib.ConfigError(
        'program reshard moves parameters to the sampling layout, but '
        'rollout.tensor=0; set it, or leave the program out')
  if name == 'window' and not config.rollout.slots:
    raise config_lib.ConfigError(
        'program window is of the sampler with slots, but rollout.slots=0; '
        'set it, or leave the program out')
  if name == 'hold' and not regimes.holds(config):
    raise config_lib.ConfigError(
        'program hold is the update of minibatches that keep lambda, but '
        'all measure it, or none; set occ.measure and an estimator that reads '
        'gradients, or leave the program out')
  if name in (*SAMPLING, 'reshard', 'score', 'hold'):
    return config
  regime, _, estimator = name.partition(':')
  if regime not in regimes.REGIMES:
    raise config_lib.ConfigError(
        f'program {name!r} is unknown; choose a regime '
        f'({", ".join(regimes.REGIMES)}), occ:ESTIMATOR, '
        f'{", ".join(SAMPLING)}, score, reshard or hold')
  if regime != 'occ' and not estimator:
    estimator = 'logprob'  # the config's estimator is for its own regime
  config = dataclasses.replace(
      config, mtp=dataclasses.replace(config.mtp, regime=regime),
      occ=dataclasses.replace(
          config.occ, estimator=estimator or config.occ.estimator))
  validate.validate(config)
  return config


def _shard_bytes(tree_):
  """Return the bytes of a tree of ShapeDtypeStructs on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree_))


def state_bytes(config: config_lib.Config, mesh):
  """Return the bytes of a run's state on one device."""
  return _shard_bytes(train_step.make(config, mesh).abstract)


def program(name, config: config_lib.Config, mesh):
  """Return a program's lowered, tokens, params, beside; see `compile_row`."""
  steps = train_step.make(config, mesh)
  state, params = steps.abstract, steps.abstract.params
  resident = _shard_bytes(state) + (
      _shard_bytes(params) if config.rl.kl_coef else 0)
  if name in SAMPLING:
    read = layout.abstract(params, config, mesh)
    beside = resident - (_shard_bytes(params) if read is params else 0)
    if name == 'window':
      beside += _waiting(read, config, mesh)
    return *rollout(name, read, config, mesh), read, beside
  if name == 'reshard':
    move = layout.mover(params, config, mesh)
    return move.lower(params), 0, params, resident - _shard_bytes(params)
  if name == 'score':
    return *score(steps, config, mesh), params, (
        resident - _shard_bytes(params))
  step = steps.hold if name == 'hold' else steps.update
  return *update(step, state, config, mesh), params, (
      resident - _shard_bytes(state))


def compile_all(config: config_lib.Config, topology, programs):
  """Compile the programs of a config for a slice; yield a `Row` each.

  Args:
    config: `config.Config`, model.vocab_size set.
    topology: such as 'v5p:4x4x4' or 'h100:1x8x8'.
    programs: names; see experiments/compile_for.py.

  Raises:
    config.ConfigError: the config does not suit the slice.
  """
  validate.validate(config)
  if not config.model.vocab_size:
    raise config_lib.ConfigError(
        'model.vocab_size=0 stands for the tokenizer\'s, which is not read '
        'here; set model.vocab_size')
  configs = [resolve(name, config) for name in programs]
  mesh = sharding.make_mesh(config.mesh, targets.devices(topology))
  for name, used in zip(programs, configs):
    with jax.set_mesh(mesh):
      found = program(name, used, mesh)
    yield compile_row(name, *found, topology, config.model.vocab_size)


def _known_shapes(params, vocab_size):
  """Return the sizes of a vocabulary axis, and `hlo.folded` parameters.

  Both include the sizes of the whole array and those on one device, in every
  combination of axes.
  """
  vocabularies, known = {vocab_size}, set()
  for x in jax.tree.leaves(params):
    axes = list(zip(x.shape, x.sharding.shard_shape(x.shape)))
    vocabularies |= {local for whole, local in axes if whole == vocab_size}
    known |= set(map(hlo.folded, itertools.product(*axes)))
  return vocabularies, known


def compile_row(name, lowered, tokens, params, beside, topology, vocab_size):
  """Compile a program and return its `Row`.

  Args:
    name: of the program.
    lowered: from `update`, `score` or `rollout`.
    tokens: number of tokens that it reads.
    params: abstract parameters that it reads.
    beside: see `Row`.
    topology: see `compile_all`.
    vocab_size: V.
  """
  target = targets.chip(topology)
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=targets.options(topology))
  except jax.errors.JaxRuntimeError as e:
    first = next((line for line in str(e).splitlines() if line.strip()), '')
    return Row(name, tokens, first[:300], time.perf_counter() - start)
  seconds = time.perf_counter() - start
  m = compiled.memory_analysis()
  try:
    summary = hlo.summarise(compiled.as_text(),
                            *_known_shapes(params, vocab_size))
  except jax.errors.JaxRuntimeError as e:  # libtpu is newer than jaxlib
    return Row(name, tokens, f'compiled, but its text cannot be read: {e}'[
        :300], seconds)
  moved = (m.argument_size_in_bytes + m.output_size_in_bytes
           - m.alias_size_in_bytes)
  peak = (moved + m.temp_size_in_bytes + m.generated_code_size_in_bytes
          + beside)
  bounds = {'FLOP/s': summary.flops / target.flops,
            'memory': moved / target.bandwidth,
            'links': sum(summary.collectives.values()) / target.links}
  return Row(name, tokens, None, seconds, m.argument_size_in_bytes,
             m.temp_size_in_bytes, beside, peak, summary, bounds)


def fits(row, target):
  """Return whether a program could run on the `targets.Chip`."""
  return row.error is None and row.peak <= target.memory


def describe(row, target):
  """Return a `Row` as text, a few lines."""
  if row.error:
    return f'{row.name}: not compiled ({row.seconds:.0f} s): {row.error}'
  s = row.summary
  size, kind, where = s.largest
  lines = [
      f'{row.name}: compiled in {row.seconds:.0f} s, '
      f'{row.peak / GIB:.2f} of {target.memory / GIB:.0f} GiB, '
      + ('fits' if fits(row, target) else 'DOES NOT FIT'),
      f'  largest array: {size / GIB:.2f} GiB {kind} {where}']
  size, kind, where = s.vocabulary or (0, 'none', '')
  lines.append(f'  largest with a vocabulary axis, parameters aside: '
               f'{size / GIB:.2f} GiB {kind} {where}'.rstrip())
  return '\n'.join(lines)


def table(rows, config: config_lib.Config, topology):
  """Return the table of all rows, in Markdown."""
  params = jax.eval_shape(lambda: forward.init(config, jax.random.key(0)))
  size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
  g = lambda x: f'{x / GIB:.2f}'
  lines = []
  for row in rows:
    start = [row.name, str(row.tokens), f'{row.seconds:.0f}']
    if row.error:
      lines.append([*start, row.error] + [''] * 6)
      continue
    moved = ', '.join(f'{k} {g(v)}' for k, v in sorted(
        row.summary.collectives.items())) or '0'
    slowest = max(row.bounds, key=row.bounds.get)
    lines.append([*start, g(row.arguments), g(row.temporaries), g(row.beside),
                  g(row.peak), f'{row.summary.flops / 1e15:.4f}', moved,
                  f'{row.bounds[slowest]:.4f} ({slowest})'])
  return (f'{topology}, mesh {dataclasses.asdict(config.mesh)}: '
          f'{size(params):,} parameters, {size(tree.psi(params)):,} of them in '
          'MTP modules; numbers of one chip\n\n' + tables.markdown(
              ['program', 'tokens', 'compile s', 'arguments GiB',
               'temporaries GiB', 'beside GiB', 'peak GiB', 'PFLOP',
               'collectives GiB', 'at least, s'], lines))


def to_dict(row, target):
  """Return a `Row` as JSON-ready values."""
  return metrics.to_json(row._asdict() | {'fits': fits(row, target)})
