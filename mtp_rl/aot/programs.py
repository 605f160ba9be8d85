"""The programs of a run, compiled ahead of time for a slice not at hand.

`libtpu` (extra `tpu`) compiles for any topology without a TPU; the memory that
it reports is what a chip would need, and the program what a chip would run.
"""

import dataclasses
import itertools
import math
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import (
  forward,
  regimes,
  sharding,
  tokenizers,
  train_step,
  tree,
  types,
  validate,
)
from mtp_rl.aot import hlo
from mtp_rl.report import tables
from mtp_rl.rollout import decode, draft, layout, sampler
from mtp_rl.run import metrics

GIB = 2 ** 30
# jaxlib cannot parse asynchronous SparseCore operations in a program's text,
# which is read here, so they are disabled.
OPTIONS = {'xla_tpu_offload_gather_to_sparsecore': 'false',
           'xla_tpu_enable_offloading_scatter_to_sparsecore': 'false'}


class Chip(NamedTuple):
  """One chip, from Google's public system-architecture pages.

  Attributes:
    flops: bfloat16 FLOP/s.
    memory: bytes of HBM.
    bandwidth: bytes/s of HBM.
    links: bytes/s of all inter-chip links together, one way.
  """
  flops: float
  memory: float
  bandwidth: float
  links: float


CHIPS = {
    'v4': Chip(275e12, 32 * GIB, 1.2e12, .3e12),
    'v5e': Chip(197e12, 16 * GIB, .82e12, .2e12),
    'v5p': Chip(459e12, 95 * GIB, 2.765e12, .6e12),
    'v6e': Chip(918e12, 32 * GIB, 1.64e12, .448e12)}


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


def chip(topology):
  """Return the `Chip` of a topology such as 'v5p:4x4x4'.

  Raises:
    config.ConfigError: its kind is not in the table.
  """
  kind = topology.split(':')[0]
  if kind not in CHIPS:
    raise config_lib.ConfigError(
        f'topology {topology!r} is of no known chip; choose '
        f'{", ".join(CHIPS)} and a shape, as in v5p:4x4x4')
  return CHIPS[kind]


def devices(topology):
  """Return the devices of a slice, which can be compiled for but not used.

  Raises:
    config.ConfigError: libtpu is not installed, or does not know the slice.
  """
  chip(topology)
  for name, value in (  # else libtpu asks the cloud where it runs
      ('TPU_SKIP_MDS_QUERY', '1'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
      ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_WORKER_ID', '0'),
      ('TPU_ACCELERATOR_TYPE', topology.split(':')[0] + '-8')):
    os.environ.setdefault(name, value)
  from jax.experimental import topologies
  try:
    return topologies.get_topology_desc(topology, 'tpu').devices
  except Exception as e:  # libtpu raises many kinds
    first = str(e).strip().split('\n')[0][:200]
    raise config_lib.ConfigError(
        f'topology {topology!r} cannot be described ({first}); install the '
        "extra with pip install -e '.[tpu]', and name a slice such as "
        'v5p:4x4x4') from e


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


def update(steps, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of one optimiser update of a config's regime."""
  batch = _batch(config, mesh)
  return steps.update.lower(steps.abstract, batch), math.prod(
      batch.tokens.shape)


def score(steps, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of the log-probs of one minibatch of samples."""
  batch = _batch(dataclasses.replace(
      config, rl=dataclasses.replace(config.rl, pack=False)), mesh)
  return steps.score.lower(steps.abstract.params, batch.rows), math.prod(
      batch.tokens.shape)


def rollout(name, params, config: config_lib.Config, mesh):
  """Return (lowered, tokens) of a part of the sampler.

  'prefill' reads all prompts of an RL step and copies their caches to the
  samples, 'decode' is one step of all samples (with rollout.draft it drafts
  and verifies), 'rollout' is the whole loop as in a run. `params` are abstract,
  in the sampling layout.
  """
  ends, group = tokenizers.CharTokenizer('').ends, config.rl.group
  fixed = dict(config=config, ends=ends)
  mesh = layout.sampling_mesh(config, mesh)
  rows = sharding.batch_sharding(mesh)
  shape = config.rl.prompts, config.rollout.max_prompt
  prompts = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
  valid = jax.ShapeDtypeStruct(shape, bool, sharding=rows)
  key = jax.eval_shape(lambda: jax.random.key(0))
  prefill = lambda *args: sampler.prefill(*args, group=group, **fixed)
  names = jax.ShapeDtypeStruct((shape[0], 2), jnp.uint32, sharding=rows)
  asked = prompts, valid, names, key
  state = jax.eval_shape(prefill, params, *asked)
  whole = NamedSharding(mesh, P())
  cache = NamedSharding(mesh, P(None, sharding.BATCH, 'tensor'
                                if config.model.n_kv_heads
                                % mesh.shape['tensor'] == 0 else None))
  heads = lambda pair: jax.tree.map(lambda _: cache, pair)
  placed = jax.tree.map(lambda _: rows, state)._replace(
      cache=heads(state.cache), ahead=heads(state.ahead), counts=whole)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, placed)
  step = draft.speculate if config.rollout.draft else decode.extend
  one = lambda params, state: step(params, state, **fixed)
  with jax.set_mesh(mesh):
    if name == 'prefill':
      return jax.jit(prefill, out_shardings=placed).lower(
          params, *asked), math.prod(shape)
    if name == 'decode':
      return jax.jit(one, out_shardings=placed, donate_argnums=1).lower(
          params, abstract), shape[0] * group
    every = lambda *args: sampler.generate(*args, group=group, **fixed)
    return jax.jit(every, out_shardings=sampler.Drawn(
        rows, rows, whole)).lower(params, *asked), math.prod(shape) + (
            shape[0] * group * config.rollout.max_response)


SAMPLING = ('prefill', 'decode', 'rollout')


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
  if name in (*SAMPLING, 'reshard', 'score'):
    return config
  regime, _, estimator = name.partition(':')
  if regime not in regimes.REGIMES:
    raise config_lib.ConfigError(
        f'program {name!r} is unknown; choose a regime '
        f'({", ".join(regimes.REGIMES)}), occ:ESTIMATOR, '
        f'{", ".join(SAMPLING)}, score or reshard')
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
    return *rollout(name, read, config, mesh), read, beside
  if name == 'reshard':
    move = layout.mover(params, config, mesh)
    return move.lower(params), 0, params, resident - _shard_bytes(params)
  if name == 'score':
    return *score(steps, config, mesh), params, (
        resident - _shard_bytes(params))
  return *update(steps, config, mesh), params, resident - _shard_bytes(state)


def compile_all(config: config_lib.Config, topology, programs):
  """Compile the programs of a config for a slice; yield a `Row` each.

  Args:
    config: `config.Config`, model.vocab_size set.
    topology: such as 'v5p:4x4x4'.
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
  mesh = sharding.make_mesh(config.mesh, devices(topology))
  for name, used in zip(programs, configs):
    with jax.set_mesh(mesh):
      found = program(name, used, mesh)
    yield compile_row(name, *found, chip(topology),
                      config.model.vocab_size)


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


def compile_row(name, lowered, tokens, params, beside, target, vocab_size):
  """Compile a program and return its `Row`.

  Args:
    name: of the program.
    lowered: from `update`, `score` or `rollout`.
    tokens: number of tokens that it reads.
    params: abstract parameters that it reads.
    beside: see `Row`.
    target: `Chip`.
    vocab_size: V.
  """
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=OPTIONS)
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
  """Return whether a program could run on the `Chip`."""
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
