"""Ways to train the MTP modules of a fixed policy, by how often drafts pass.

For each seed there is one policy (the config's warm-up, or its pretrained
weights) and one set of modules, new ones or those of the warm-up; each variant
trains these on the policy's own samples while everything else stays frozen. All
variants of a seed see the same samples and are measured on the same fresh ones,
so that differences are paired.

    DIR/policy/seed_S     the policy's warm-up
    DIR/seed_S.jsonl      what was measured: variant, updates, metrics
    DIR/study.json        the settings, which a resumed study must share
    DIR/drafting.{json,md}, DIR/cache (compiled programs)
"""

import contextlib
import copy
import dataclasses
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import (
  config_io,
  distributed,
  prng,
  sharding,
  train_step,
  tree,
  validate,
  warmup,
)
from mtp_rl.compare import grid
from mtp_rl.objectives import acceptance, logprobs
from mtp_rl.report import intervals, tables
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib

# With rollout.* and task.*, what the samples of a seed come from.
_SHARED = ('seed', 'warmup.batch', 'warmup.pool', 'warmup.pool_steps',
           'warmup.steps', 'warmup.data', 'warmup.train', 'warmup.init')


class Study(NamedTuple):
  """What is compared.

  Attributes:
    base: `config.Config`; its warm-up makes the policy, unless that is
      warmup.train=mtp. Modules are measured under it.
    variants: list of `grid.Variant`, how the modules are trained.
    seeds: list of ints.
    updates: sorted list of ints, after how many updates to measure.
    batches: batches of warmup.batch fresh samples to measure on.
    workdir: directory of the study.
    fresh: whether modules start untrained, or as the policy's warm-up left
      them.
  """
  base: config_lib.Config
  variants: list
  seeds: list
  updates: list
  batches: int
  workdir: str
  fresh: bool = True


def plan(base: config_lib.Config, text, seeds, updates, batches, workdir,
         fresh=True):
  """Return the `Study`, its settings checked.

  Args:
    base: see `Study`.
    text: variants as 'name:section.field=value,...;name2:...'; names of
      losses alone ('ce;kl') set warmup.mtp_loss.
    seeds, updates, batches, workdir, fresh: see `Study`.

  Raises:
    config.ConfigError: one sentence that names the setting and the fix.
  """
  alone = copy.deepcopy(base)
  alone.warmup = dataclasses.replace(
      base.warmup, train='mtp', data='samples', steps=max(updates), init='',
      mtp_coef=1.)
  losses = ('ce', *acceptance.LOSSES)
  parts = [x.strip() for x in text.split(';') if x.strip()]
  for x in parts:
    if ':' not in x and x not in losses:
      raise config_lib.ConfigError(
          f'--variants: {x!r} is none of {", ".join(losses)}; give its '
          'settings as name:section.field=value')
  variants = grid.free_variants(alone, ';'.join(
      f'{x}:warmup.mtp_loss={x}' if x in losses else x for x in parts))
  if not variants:
    raise config_lib.ConfigError('nothing to compare; set --variants')
  for v in variants:
    changed = [n for n in config_io.differences(alone, v.config)
               if n in _SHARED or n.startswith(('rollout.', 'task.'))]
    if changed:
      raise config_lib.ConfigError(
          f'variant {v.name} changes {", ".join(changed)}, but all variants '
          'train on the same samples; set it for all, as --config.FIELD=VALUE'
          ', or leave it out (--at says how many updates)')
  policy = copy.deepcopy(base)
  if base.warmup.train == 'mtp':
    policy.warmup.steps, policy.warmup.train = 0, 'all'
    policy.warmup.data = 'solutions'
  for config in (policy, *(v.config for v in variants)):
    validate.validate(config)
  return Study(policy, variants, seeds, sorted(updates), batches, workdir,
               fresh)


def _same_study(study):
  """Write study.json; raise ConfigError if it holds other settings."""
  path = os.path.join(study.workdir, 'study.json')
  mine = {'config': config_io.to_dict(study.base), 'updates': study.updates,
          'batches': study.batches, 'fresh': study.fresh, 'variants': {
              v.name: config_io.to_dict(v.config) for v in study.variants}}
  mine = json.loads(json.dumps(mine))
  if os.path.exists(path):
    found = config_io.read_json(path, 'remove it where the settings are those '
                                'of the study')
    changed = [k for k in mine if mine[k] != found.get(k)]
    if changed:
      raise config_lib.ConfigError(
          f'{study.workdir} holds a study that differs in '
          f'{", ".join(changed)}; choose another --workdir, or the same '
          'settings')
  metrics.write_json(path, mine)


class _Modules(NamedTuple):
  """The jitted steps, shared by the seeds: they do not depend on one.

  Attributes:
    updates: dict variant's name -> `train_step.Steps`.
    score: function (params, `types.Tokens`) -> `logprobs.LogProbs`.
  """
  updates: dict
  score: object


def _modules(study, run):
  rows = {v.name: config_lib.with_vocabulary(v.config,
                                             run.config.model.vocab_size)
          for v in study.variants}
  updates = {name: train_step.make(c, run.mesh, 'warmup')
             for name, c in rows.items()}
  scored = train_step.make(run.config, run.mesh, 'warmup')
  for name, steps in updates.items():
    mine, theirs = (jax.tree.structure(tree.psi(s.abstract.params))
                    for s in (steps, scored))
    if mine != theirs:
      raise config_lib.ConfigError(
          f'variant {name} has other MTP modules than the config that all are '
          'measured under; set mtp.modules and mtp.kind with --config')
  return _Modules(updates, scored.score)


def measure(score, params, batches, mesh, depths):
  """Return `acceptance.metrics` of modules on batches, a dict of floats.

  Args:
    score: see `train_step.Steps`.
    params: the model's parameters.
    batches: list of `types.Tokens`, NumPy arrays.
    mesh: the device mesh.
    depths: K.
  """
  placed = sharding.batch_sharding(mesh)
  seen = [distributed.fetch(score(params, distributed.put(b, placed)))
          for b in batches]
  join = lambda f: np.concatenate([f(x) for x in seen])
  overlap = join(lambda x: x.overlap)
  mask = np.concatenate([np.asarray(logprobs.mtp_mask(
      b.valid, overlap.shape[1], depths)) for b in batches])
  found = acceptance.metrics(join(lambda x: x.top1), overlap, mask)
  return {k: float(v) for k, v in found.items()}


def _train(study, run, modules, variant, policy, samples, held_out):
  """Yield (updates, metrics) of one variant and seed."""
  steps = modules.updates[variant.name]
  state = steps.init(prng.key(run.key, prng.Stream.PARAMETERS))
  # The update donates its state, and the policy serves the next variant.
  start = jax.tree.map(jnp.copy, policy)
  if study.fresh:
    start |= tree.psi(state.params)
  state = state._replace(params=start)
  rows = sharding.batch_sharding(run.mesh)
  depths = config_lib.depths(run.config.mtp)
  with metrics.progress(run.config, study.updates[-1], 0,
                        f'seed {run.config.seed}, {variant.name}') as bar:
    for step in range(1, study.updates[-1] + 1):
      batch = distributed.put(samples.batch(policy, step), rows)
      state, _ = steps.update(state, batch)
      bar.update()
      if step in study.updates:
        yield step, measure(modules.score, state.params, held_out, run.mesh,
                            depths)


def _samples(study, run):
  """Return the `warmup.Samples` of a seed, and batches that no update sees."""
  config = dataclasses.replace(run.config,
                               warmup=study.variants[0].config.warmup)
  w = config.warmup
  abstract = train_step.make(config, run.mesh, 'warmup').abstract.params
  samples = warmup.Samples(run._replace(config=config), abstract)
  first = (w.steps // w.pool_steps + 1) * w.pool_steps + 1
  return samples, [first + i * w.pool_steps for i in range(study.batches)]


def _seed(study, seed, missing, modules):
  """Train and measure variants of a seed; yield lists of rows, one each."""
  config = dataclasses.replace(study.base, seed=seed)
  where = os.path.join(study.workdir, 'policy', f'seed_{seed}')
  setup = workdir_lib.setup(config, where)
  with contextlib.closing(setup.task), jax.set_mesh(setup.mesh):
    policy = warmup.train(setup, lambda: False)
    if not modules:
      modules.append(_modules(study, setup))
    samples, places = _samples(study, setup)
    held_out = [samples.batch(policy, i) for i in places]
    for variant in missing:
      yield [{'variant': variant.name, 'seed': seed, 'updates': n, **found}
             for n, found in _train(study, setup, modules[0], variant, policy,
                                    samples, held_out)]


def run(study: Study, note=lambda text: None):
  """Train and measure what is missing; return all rows, a list of dicts.

  Args:
    study: `Study`.
    note: function (text) that reports progress.

  Raises:
    config.ConfigError: the workdir cannot be used.
  """
  checkpoint.prepare_workdir(study.workdir)
  _same_study(study)
  out, modules = [], []
  for seed in study.seeds:
    path = os.path.join(study.workdir, f'seed_{seed}.jsonl')
    rows = metrics.read(path)
    there = {r['variant'] for r in rows}
    missing = [v for v in study.variants if v.name not in there]
    for more in _seed(study, seed, missing, modules) if missing else ():
      rows += more
      with open(path + '.part', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(r) + '\n' for r in rows)
      os.replace(path + '.part', path)
      note(f'seed {seed}, {more[-1]["variant"]}: '
           f'{1 + more[-1]["mtp/accept_length"]:.3f} tokens a forward')
    out += rows
  return out


def _columns(depths):
  """Return {title: function of a row of metrics} of the tables."""
  out = {f'depth {k}': lambda r, k=k: r[f'mtp_{k}/accept_expected']
         for k in range(1, depths + 1)}
  out |= {f'first {k}': lambda r, k=k: r[f'mtp_{k}/accept_cumulative']
          for k in range(2, depths + 1)}
  return out | {'tokens a forward': lambda r: 1 + r['mtp/accept_length']}


def summarise(study: Study, rows):
  """Return a list of dicts: means and paired differences over the seeds.

  Args:
    study: `Study`; differences are to its first variant.
    rows: list from `run`.
  """
  columns = _columns(config_lib.depths(study.base.mtp))
  values = lambda name, updates, get: {
      r['seed']: get(r) for r in rows
      if r['variant'] == name and r['updates'] == updates}
  out, first = [], study.variants[0].name
  for updates in study.updates:
    for name in (v.name for v in study.variants):
      out.append({'variant': name, 'updates': updates, 'mean': {
          c: intervals.interval(values(name, updates, get).values())
          for c, get in columns.items()}})
      if name != first:
        out[-1]['minus_first'] = {c: intervals.paired(
            values(name, updates, get), values(first, updates, get))
                                  for c, get in columns.items()}
  return out


def _cell(x, signed=False):
  if x is None:
    return ''
  text = f'{x.mean:+.3f}' if signed else f'{x.mean:.3f}'
  if x.low is None:
    return text
  told = signed and intervals.told(x)
  half = (x.high - x.low) / 2
  return f'{"**" * told}{text}{"**" * told} ± {half:.3f}'.replace('-', '−')  # noqa: RUF001


def write_report(study: Study, rows):
  """Write drafting.json and drafting.md; return the text."""
  found = summarise(study, rows)
  first, out = study.variants[0].name, []
  for updates in study.updates:
    mine = [x for x in found if x['updates'] == updates]
    titles = list(mine[0]['mean'])
    out.append(f'After {updates} updates, {len(study.seeds)} seeds:\n\n'
               + tables.markdown(['variant', *titles], [
                   [x['variant'], *[_cell(x['mean'][t]) for t in titles]]
                   for x in mine]))
    lines = [[x['variant'], *[_cell(x['minus_first'][t], True)
                              for t in titles]]
             for x in mine if 'minus_first' in x]
    if lines:
      out.append(tables.markdown([f'minus {first}', *titles], lines))
  text = ('Share of drafts accepted by rejection sampling, ± half of a 95 % '
          't-interval over seeds; differences are paired by seed, bold where '
          '0 lies outside (by chance that happens to one in 20).\n\n'
          + '\n'.join(out))
  metrics.write_json(os.path.join(study.workdir, 'drafting.json'),
                     {'summary': metrics.to_json(found), 'rows': rows})
  with open(os.path.join(study.workdir, 'drafting.md'), 'w',
            encoding='utf-8') as f:
    f.write(text)
  return text
