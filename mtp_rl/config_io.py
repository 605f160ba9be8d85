"""Configs as text: JSON, `section.field=value`, and names of older versions."""

import dataclasses
import functools
import json

from mtp_rl import config as config_lib

ConfigError = config_lib.ConfigError

# Old name of a field -> its new name, which the error on an old one gives.
RENAMED = {
    'mtp.heads': 'mtp.modules', 'mtp.head_loss': 'mtp.psi_loss',
    'mtp.head_coef': 'mtp.psi_coef', 'occ.heads': 'occ.solver',
    'occ.pieces': 'occ.disjoint_parts', 'optim.warmup': 'optim.ramp',
    'mesh.model': 'mesh.tensor', 'rollout.model': 'rollout.tensor'}


def to_dict(config: config_lib.Config):
  """Return config as nested plain dicts (JSON-ready)."""
  return dataclasses.asdict(config)


def from_dict(values):
  """Return the `config.Config` that `to_dict` wrote.

  Raises:
    ConfigError: a section or field does not exist in this version; a renamed
      field is named with its new name.
  """
  out = config_lib.Config()
  for section, value in values.items():
    if not hasattr(out, section):
      raise ConfigError(f'config section {section!r} does not exist')
    if isinstance(value, dict):
      for field in value:
        refuse_renamed(f'{section}.{field}')
    if dataclasses.is_dataclass(getattr(out, section)):
      try:
        value = type(getattr(out, section))(**value)
      except TypeError as e:
        raise ConfigError(f'config section {section!r}: {e}') from e
    setattr(out, section, value)
  return out


def refuse_renamed(name):
  """Raise ConfigError with the new name where `section.field` is an old one."""
  if name in RENAMED:
    raise ConfigError(f'config field {name} is now called {RENAMED[name]}; '
                      'use that name')


def assign(config: config_lib.Config, name, text):
  """Set the field `section.field` of a config from text, or from a value.

  Raises:
    ConfigError: the field does not exist, or the text does not fit its type.
  """
  refuse_renamed(name)
  section, _, field = name.rpartition('.')
  try:
    owner = getattr(config, section) if section else config
    old = getattr(owner, field)
    if dataclasses.is_dataclass(old):
      raise AttributeError
  except AttributeError:
    raise ConfigError(f'config field {name!r} does not exist; '
                      'mtp_rl/config.py lists them') from None
  try:
    if isinstance(old, bool) and isinstance(text, str):
      value = {'true': True, 'false': False}[text.lower()]
    else:
      value = type(old)(text)
  except (ValueError, KeyError):
    raise ConfigError(f'{name}={text!r} is no {type(old).__name__}') from None
  setattr(owner, field, value)


def field(config: config_lib.Config, name):
  """Return the value of a dotted name, `section.field` or `field`."""
  section, _, last = name.rpartition('.')
  return getattr(getattr(config, section) if section else config, last)


def read_json(path, fix):
  """Return the value in a JSON file.

  Raises:
    ConfigError: it cannot be read; the message ends with the words of `fix`.
  """
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except (OSError, ValueError, RecursionError) as e:
    raise ConfigError(f'{path} cannot be read ({e}); {fix}') from e


def load(path):
  """Read the config.json of a workdir; raises ConfigError with the fix.

  task.allow_eval is False: a workdir may come from elsewhere, so only the
  command itself can allow what it allows.
  """
  try:
    with open(path, encoding='utf-8') as f:
      config = from_dict(json.load(f))
    config.task.allow_eval = False
    return config
  except FileNotFoundError:
    raise ConfigError(f'{path} does not exist; name the workdir of a run of '
                      'experiments.train or experiments.pretrain') from None
  except ConfigError as e:
    raise ConfigError(f'{path} is of another version: {e}') from e
  # No UTF-8, no JSON, no dict, or nested too deeply.
  except (ValueError, AttributeError, RecursionError) as e:
    raise ConfigError(f'{path} is not a config written by this project: '
                      f'{e}') from e


def describe(config: config_lib.Config, names):
  """Return `section.field=value` of some fields, as text."""
  return ', '.join(f'{n}={functools.reduce(getattr, n.split("."), config)}'
                   for n in names)


def differences(a: config_lib.Config, b: config_lib.Config):
  """Return the dotted names of the fields in which two configs differ."""
  out = []
  for section, values in to_dict(a).items():
    other = getattr(b, section)
    if not isinstance(values, dict):
      out += [section] if values != other else []
      continue
    out += [f'{section}.{k}' for k, v in values.items()
            if v != getattr(other, k)]
  return out
