"""The variants of a config that a comparison trains: presets and free ones.

The variants of a group differ only in what is compared; each is compared with
the group's `rl_only` and `detach`. Presets:

    table1  the regimes of the paper's main table, DAPO and GSPO
    table2  regime policy with fixed lambdas against OCC, DAPO
    trace   OCC with each estimator of lambda, DAPO
    pareto  what acceptance of drafts costs in reward: each loss of theta at
            fixed lambdas and at the lambda that J can afford, DAPO; psi
            follows the KL

Every preset but pareto, which has 'separate' alone, runs under two readings of
clipping (`CLIPS`): 'paper' is L_RL + lambda L_MTP under one joint clip, lambda
unbounded, dual clip 10; 'separate' clips theta and psi apart, psi has its own
loss, dual clip 3.
"""

import copy
import re
from typing import NamedTuple

from mtp_rl import config as config_lib
from mtp_rl import config_io, validate
from mtp_rl import estimators as estimators_lib

PRESETS = ('table1', 'table2', 'trace', 'pareto')
CLIPS = ('paper', 'separate')
OBJECTIVES = {'table1': ('dapo', 'gspo'), 'table2': ('dapo',),
              'trace': ('dapo',), 'pareto': ('dapo',)}
FIXED = (.1, .2, .5, 1.)  # the paper's fixed lambdas (table2)
# The paper does not give the lambda of its CE column. E[c] = 0 there, so only
# the penalty lambda^2 v^2 is left; with .1 it would be lost in the variation
# between seeds, so we take 1.
CE_COEF, POLICY_COEF = 1., .1
# Lambdas of pareto, by theta's loss.
PARETO = {'ce': (.1, .3), 'kl': (.3, 1.), 'tv': (1., 3.), 'policy': (.3,)}
# Names of a comparison's own folders, which no variant may take.
RESERVED = ('warmup', 'configs', 'cache', 'figures')
# What all variants share, because the warm-up is trained with it. One that
# changes warmup.* has a warm-up of its own, under all its own settings.
_SHARED = ('seed', 'model.', 'task.', 'mesh.', 'mtp.modules', 'mtp.unroll',
           'mtp.kind', 'mtp.concat', 'mtp.hidden', 'mtp.lora_', 'mtp.fresh',
           'mtp.layout', 'rollout.max_',
           'warmup.init')


class Variant(NamedTuple):
  """One column of a comparison.

  Attributes:
    name: unique, the directory of its runs.
    group: name of the group of variants that it is compared within.
    label: its name within the group.
    config: `config.Config`, complete except for seed and warmup.init.
  """
  name: str
  group: str
  label: str
  config: config_lib.Config


def _clip(config: config_lib.Config, kind):
  """Set a reading of clipping, one of `CLIPS`, on a config."""
  ppo = config.rl.loss == 'ppo'  # the other losses have no dual clip
  if kind == 'paper':
    config_lib.preset(config, 'paper')
  else:
    config.optim.clip_mode, config.mtp.psi_loss = 'separate', 'ce'
  config.rl.dual_clip = (10. if kind == 'paper' else 3.) if ppo else 0.


def _columns(preset, estimators, coef):
  """Return the (label, overrides) of one group of a preset."""
  def fixed(regime, value):
    return f'{regime}-{value:g}', {'mtp.regime': regime, 'mtp.coef': value}

  columns = [(r, {'mtp.regime': r}) for r in ('rl_only', 'detach')]
  if preset == 'table1':
    columns += [fixed('ce', CE_COEF if coef is None else coef),
                fixed('policy', POLICY_COEF if coef is None else coef)]
  elif preset == 'table2':
    columns += [fixed('policy', value) for value in FIXED]
  elif preset == 'pareto':
    return columns + [
        (f'{loss}-{value:g}', {'mtp.regime': 'fixed', 'mtp.theta_loss': loss,
                               'mtp.coef': value})
        for loss, values in PARETO.items() for value in values] + [
            (f'{loss}-{e}', {'mtp.regime': 'occ', 'mtp.theta_loss': loss,
                             'occ.estimator': e})
            for e in estimators for loss in PARETO]
  columns = [(n, o | {'occ.estimator': 'logprob'}) for n, o in columns]
  return columns + [(f'occ-{e}', {'mtp.regime': 'occ', 'occ.estimator': e})
                    for e in estimators]


def preset_variants(base: config_lib.Config, preset, clips=CLIPS,
                    estimators=None, coef=None, objectives=None):
  """Return the list of `Variant` of a preset.

  Args:
    base: `config.Config`, not changed.
    preset: one of `PRESETS`.
    clips: some of `CLIPS`.
    estimators: of OCC; None takes logprob, every one for 'trace', and
      affordable for 'pareto'.
    coef: lambda of regimes ce and policy in table1; None takes `CE_COEF` and
      `POLICY_COEF`.
    objectives: presets of config.py; None takes `OBJECTIVES`.

  Raises:
    config.ConfigError: a name is unknown.
  """
  if estimators is None and preset == 'pareto':
    estimators = ('affordable',)
  elif estimators is None:
    estimators = (tuple(estimators_lib.ESTIMATORS) if preset == 'trace'
                  else ('logprob',))
  _known('preset', [preset], PRESETS)
  _known('clips', clips, CLIPS)
  _known('estimators', estimators, estimators_lib.ESTIMATORS)
  out = []
  for objective in objectives or OBJECTIVES[preset]:
    for kind in CLIPS[1:] if preset == 'pareto' else clips:
      group = f'{objective}-{kind}'
      for label, overrides in _columns(preset, estimators, coef):
        config = config_lib.preset(copy.deepcopy(base), objective)
        _clip(config, kind)
        if preset == 'pareto':
          config.mtp.psi_loss = 'kl'
        for name, value in overrides.items():
          config_io.assign(config, name, value)
        out.append(Variant(f'{group}-{label}', group, label, config))
  return out


def _known(flag, names, choices):
  for name in names:
    if name not in choices:
      raise config_lib.ConfigError(
          f'--{flag}: {name!r} is none of {", ".join(choices)}')


def free_variants(base: config_lib.Config, text):
  """Return the variants of 'name:section.field=value,...;name2:...'.

  Raises:
    config.ConfigError: text is not of that form, or a field does not exist.
  """
  out = []
  for part in filter(None, (p.strip() for p in text.split(';'))):
    name, _, settings = part.partition(':')
    if not re.fullmatch(r'[A-Za-z0-9_.+-]*[A-Za-z0-9]', name):
      raise config_lib.ConfigError(
          f'--variants: {name!r} cannot name a directory; write '
          'name:section.field=value,section.field=value;name2:...')
    config = copy.deepcopy(base)
    for setting in filter(None, settings.split(',')):
      field, equals, value = setting.partition('=')
      if not equals:
        raise config_lib.ConfigError(
            f'--variants: {setting!r} of {name} is no section.field=value')
      config_io.assign(config, field.strip(), value.strip())
    out.append(Variant(name, 'variants', name, config))
  return out


def own_warmup(base: config_lib.Config, variant: Variant):
  """Return the warmup.* fields that a variant changes."""
  return [n for n in config_io.differences(base, variant.config)
          if n.startswith('warmup.')]


def check(base: config_lib.Config, variants, overridden=()):
  """Drop repeated variants; refuse those that cannot be compared or run.

  Args:
    base: the config that all variants start from.
    variants: list of `Variant`.
    overridden: dotted fields that the user set for all of them.

  Returns:
    list of the variants, without repetition.

  Raises:
    config.ConfigError: one sentence that names the variant and the fix.
  """
  kept = {}
  for variant in variants:
    changed = config_io.differences(base, variant.config)
    lost = [n for n in overridden if n in changed]
    if lost:
      raise config_lib.ConfigError(
          f'--config.{lost[0]} is overruled by variant {variant.name}; leave '
          'it out, or define the variants with --variants')
    unlike = [n for n in changed if n.startswith(_SHARED)]
    if unlike:
      raise config_lib.ConfigError(
          f'variant {variant.name} changes {", ".join(unlike)}, which all '
          'variants of a comparison share; compare that separately')
    if base.warmup.init and own_warmup(base, variant):
      raise config_lib.ConfigError(
          f'variant {variant.name} changes '
          f'{", ".join(own_warmup(base, variant))}, but --config.warmup.init '
          'gives all of them one that is complete; leave --config.warmup.init '
          'out')
    if variant.name in RESERVED:
      raise config_lib.ConfigError(
          f'a variant cannot be called {variant.name}; choose another name')
    try:
      validate.validate(variant.config)
    except config_lib.ConfigError as e:
      raise config_lib.ConfigError(f'variant {variant.name}: {e}') from e
    same = kept.setdefault(variant.name, variant)
    if same.config != variant.config:
      raise config_lib.ConfigError(
          f'two variants are called {variant.name}; rename one')
  if not kept:
    raise config_lib.ConfigError('nothing to compare; set --preset or '
                                 '--variants')
  return list(kept.values())
