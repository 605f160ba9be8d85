"""What a workdir holds, and whether it is whole. Uses no device.

Read are the settings, the rows of the JSONL files, every byte of the
checkpoints that have checksums, and how these fit together; figures, events,
evaluations and diagnoses are not.
"""

import contextlib
import itertools
import json
import os
from typing import NamedTuple

from mtp_rl import config as config_lib
from mtp_rl import config_io, tokenizers
from mtp_rl.run import checkpoint, owner

_ROWS = ('warmup.jsonl', 'metrics.jsonl', 'samples.jsonl', 'tokens.jsonl')


class Item(NamedTuple):
  """One file or folder of a workdir.

  Attributes:
    name: inside the workdir.
    good: whether it is whole.
    found: what it is, in words.
  """
  name: str
  good: bool
  found: str


def inspect(workdir):
  """Return the list of `Item` of a workdir.

  Raises:
    config.ConfigError: it is no workdir of a run.
  """
  if not os.path.exists(os.path.join(workdir, 'config.json')):
    raise config_lib.ConfigError(
        f'{workdir} has no config.json; name the workdir of a run')
  # A live run writes rows, then their checkpoint, then the summary; they are
  # read the other way round, so that each finds what it counts on.
  summary, done = _summary(workdir)
  kept, checkpoints = {}, []
  for phase in ('warmup', 'rl'):
    items, kept[phase] = _checkpoints(workdir, phase)
    checkpoints += items
  if done is not None and done not in kept['rl']:
    summary = summary._replace(good=False, found=f'{summary.found}, but there '
                               'is no good checkpoint of that step')
  out = []
  if holder := owner.describe(workdir):
    out.append(Item(owner.NAME, True, f'{holder.who}, '
                    + ('running' if holder.alive else 'gone')))
  out += [_config(workdir), _json(workdir, 'tokenizer.json', _tokenizer)]
  out += [_json(workdir, name) for name in ('published.json', 'data.json')
          if os.path.exists(os.path.join(workdir, name))]
  steps = {}
  for name in _ROWS:
    if os.path.exists(os.path.join(workdir, name)):
      item, steps[name] = _rows(workdir, name)
      out.append(item)
  out += checkpoints
  for phase, name in ('warmup', 'warmup.jsonl'), ('rl', 'metrics.jsonl'):
    # The rows of a checkpoint are written before it.
    last = max(steps.get(name, ()), default=0)
    if phase == 'rl' and kept[phase] and last < kept[phase][-1]:
      out.append(Item(name, False, f'ends at step {last}, but there is a '
                      f'checkpoint of step {kept[phase][-1]}'))
  return out + [summary] * (summary is not None)


def _config(workdir):
  try:
    config = config_io.load(os.path.join(workdir, 'config.json'))
  except (config_lib.ConfigError, OSError, ValueError) as e:
    return Item('config.json', False, str(e))
  return Item('config.json', True, f'{config.mtp.regime}, seed {config.seed}, '
              f'{config.warmup.steps} warm-up and {config.rl.steps} RL steps')


def _load(workdir, name):
  with open(os.path.join(workdir, name), encoding='utf-8') as f:
    return json.load(f)


def _tokenizer(values):
  return f'{tokenizers.from_dict(values).vocab_size} tokens'


def _json(workdir, name, describe=lambda values: 'JSON'):
  try:
    return Item(name, True, describe(_load(workdir, name)))
  except (OSError, ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as e:
    return Item(name, False, f'cannot be read ({type(e).__name__}: {e})')


def _step(line):
  """Return the step of a line of JSON; None where it is no row."""
  try:
    step = json.loads(line.decode())['step']
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return step if type(step) is int else None  # True is an int too


def _rows(workdir, name):
  """Return the `Item` of a JSONL file, and its steps."""
  with open(os.path.join(workdir, name), 'rb') as f:
    lines = f.read().split(b'\n')
  steps = [_step(line) for line in lines[:-1]]
  bad = [i for i, step in enumerate(steps, 1) if step is None]
  if bad:
    return Item(name, False, f'line {bad[0]} is no row'), []
  cut = ', and a last line that was cut off' if lines[-1] else ''
  if not steps:
    return Item(name, True, f'no row{cut}'), []
  falls = [b for a, b in itertools.pairwise(steps) if b < a]
  # The first that is missing; a damaged row may give any number as its step.
  missing = [a + 1 for a, b in itertools.pairwise([-1, *steps]) if b > a + 1]
  twice = [b for a, b in itertools.pairwise(steps) if a == b]
  if falls:
    return Item(name, False, f'step {falls[0]} comes after a later one'), steps
  if name == 'metrics.jsonl' and (missing or twice):
    said = 'is missing' if missing else 'is there twice'
    return Item(name, False, f'step {(missing or twice)[0]} {said}'), steps
  return Item(name, True, f'{len(steps)} rows, steps {steps[0]} to {steps[-1]}'
              + cut), steps


def _checkpoints(workdir, phase):
  """Return the `Item`s of a phase's checkpoints, and the good steps."""
  where = os.path.join(workdir, 'checkpoints', phase)
  saved = checkpoint.Checkpoints(where, keep=1)
  out, good = [], []
  for step in saved.steps():
    damage, size = saved.damage(step), _size(saved.path(step))
    if damage and not os.path.isdir(saved.path(step)):
      continue  # a live run has removed it
    if damage is None:
      good.append(step)
    found = f'{size / 2 ** 20:.1f} MiB' + (f', damaged: {damage}' if damage
                                          else '')
    out.append(Item(f'checkpoints/{phase}/{step}', damage is None, found))
  for name in sorted(os.listdir(where) if os.path.isdir(where) else ()):
    if name.isdecimal():
      continue
    found = ('damaged, set aside' if '.damaged' in name
             else 'unfinished, the next one that is written clears it')
    out.append(Item(f'checkpoints/{phase}/{name}', True, found))
  return out, good


def _size(folder):
  """Return the bytes of a folder's files; a live run may remove some."""
  total = 0
  for where, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.path.getsize(os.path.join(where, name))
  return total


def _summary(workdir):
  """Return the `Item` of summary.json, and the step of a complete run."""
  if not os.path.exists(os.path.join(workdir, 'summary.json')):
    return None, None
  try:
    values = _load(workdir, 'summary.json')
    status, step, steps = (values[k] for k in ('status', 'step', 'steps'))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    return Item('summary.json', False,
                f'cannot be read ({type(e).__name__}: {e})'), None
  return (Item('summary.json', True, f'{status} at step {step} of {steps}'),
          step if status == 'complete' else None)
