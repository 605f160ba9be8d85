"""Which variants of a config are compared: presets, and free ones.

A group holds variants that differ in nothing but what is compared; within it
each is held against the group's `rl_only` and `detach`. Presets:

    table1  the regimes of the paper's main table, DAPO and GSPO
    table2  fixed lambda of regime policy against OCC, DAPO
    trace   OCC with each estimator of lambda, DAPO

Every preset runs under two readings of clipping (`CLIPS`): 'paper' is
L_RL + lambda L_MTP under one joint clip, lambda unbounded, dual clip 10;
'separate' clips theta and psi apart, psi has its own loss, dual clip 3.
"""

import copy
import re
from typing import NamedTuple

from mtp_rl import config as config_lib
from mtp_rl import validate

PRESETS = ('table1', 'table2', 'trace')
CLIPS = ('paper', 'separate')
OBJECTIVES = {'table1': ('dapo', 'gspo'), 'table2': ('dapo',),
              'trace': ('dapo',)}
FIXED = (.1, .2, .5, 1.)  # the paper's fixed lambdas (table2)
# The paper does not give lambda of its CE column. E[c] = 0 there, so only the
# penalty lambda^2 v^2 is left, and at .1 it drowns between seeds: we take 1.
CE_COEF, POLICY_COEF = 1., .1
# Names that a comparison keeps for itself in its workdir.
RESERVED = ('warmup', 'configs', 'cache', 'figures')
# What all variants share, because the warm-up is trained with it.
_SHARED = ('seed', 'model.', 'task.', 'warmup.', 'mesh.', 'mtp.heads',
           'mtp.kind', 'mtp.concat', 'mtp.hidden', 'rollout.max_')


class Variant(NamedTuple):
  """One column of a comparison.

  Attributes:
    name: unique, the directory of its runs.
    group: of the variants that it is compared with.
    label: its name within the group.
    config: complete but for the seed and the warm-up's place.
  """
  name: str
  group: str
  label: str
  config: config_lib.Config


def assign(config, name, text):
  """Set the field `section.field` of a config from text, or from a value.

  Raises:
    config.ConfigError: the field does not exist, or the text is no such value.
  """
  section, _, field = name.rpartition('.')
  try:
    owner = getattr(config, section) if section else config
    old = getattr(owner, field)
    if hasattr(old, '__dataclass_fields__'):
      raise AttributeError
  except AttributeError:
    raise config_lib.ConfigError(
        f'config field {name!r} does not exist; mtp_rl/config.py lists '
        'them') from None
  try:
    if isinstance(old, bool) and isinstance(text, str):
      value = {'true': True, 'false': False}[text.lower()]
    else:
      value = type(old)(text)
  except (ValueError, KeyError):
    raise config_lib.ConfigError(
        f'{name}={text!r} is no {type(old).__name__}') from None
  setattr(owner, field, value)


def _clip(config, kind):
  ppo = config.rl.loss == 'ppo'  # the others have no dual clip
  if kind == 'paper':
    config_lib.preset(config, 'paper')
  else:
    config.optim.clip_mode, config.mtp.head_loss = 'separate', 'ce'
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
  columns = [(n, o | {'occ.estimator': 'logprob'}) for n, o in columns]
  return columns + [(f'occ-{e}', {'mtp.regime': 'occ', 'occ.estimator': e})
                    for e in estimators]


def preset_variants(base, preset, clips=CLIPS, estimators=None, coef=None,
                    objectives=None):
  """Return the list of `Variant` of a preset.

  Args:
    base: `config.Config`, not changed.
    preset: one of `PRESETS`.
    clips: some of `CLIPS`.
    estimators: of OCC; None takes logprob, and every one for 'trace'.
    coef: lambda of regimes ce and policy in table1; None takes `CE_COEF` and
      `POLICY_COEF`.
    objectives: presets of config.py; None takes `OBJECTIVES`.

  Raises:
    config.ConfigError: a name is unknown.
  """
  if estimators is None:
    estimators = config_lib.TRAINABLE if preset == 'trace' else ('logprob',)
  _known('preset', [preset], PRESETS)
  _known('clips', clips, CLIPS)
  _known('estimators', estimators, config_lib.TRAINABLE)
  out = []
  for objective in objectives or OBJECTIVES[preset]:
    for kind in clips:
      group = f'{objective}-{kind}'
      for label, overrides in _columns(preset, estimators, coef):
        config = config_lib.preset(copy.deepcopy(base), objective)
        _clip(config, kind)
        for name, value in overrides.items():
          assign(config, name, value)
        out.append(Variant(f'{group}-{label}', group, label, config))
  return out


def _known(flag, names, choices):
  for name in names:
    if name not in choices:
      raise config_lib.ConfigError(
          f'--{flag}: {name!r} is none of {", ".join(choices)}')


def free_variants(base, text):
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
      assign(config, field.strip(), value.strip())
    out.append(Variant(name, 'variants', name, config))
  return out


def check(base, variants, overridden=()):
  """Drop repeated variants; refuse what cannot be compared, or cannot run.

  Args:
    base: the config that all variants start from.
    variants: list of `Variant`.
    overridden: dotted fields that the user set for all of them.

  Returns:
    the variants, each once.

  Raises:
    config.ConfigError: one sentence that names the variant and the mend.
  """
  kept = {}
  for variant in variants:
    changed = config_lib.differences(base, variant.config)
    lost = [n for n in overridden if n in changed]
    if lost:
      raise config_lib.ConfigError(
          f'--config.{lost[0]} is overruled by variant {variant.name}; leave '
          'it out, or write the variants with --variants')
    unlike = [n for n in changed if n.startswith(_SHARED)]
    if unlike:
      raise config_lib.ConfigError(
          f'variant {variant.name} changes {", ".join(unlike)}, but all '
          'variants share one warm-up a seed; make that a comparison of its '
          'own')
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
