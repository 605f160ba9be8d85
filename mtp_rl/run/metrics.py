"""Metrics to JSONL and TensorBoard; one JSON object per line, with 'step'.

Every process may call these functions; process 0 alone writes.
"""

import json
import math
import os
import sys

import numpy as np
import tensorboardX
import tqdm

from mtp_rl import config as config_lib
from mtp_rl import distributed

# Prefixes of metrics that differ between two otherwise equal runs.
VOLATILE = ('timing_s/', 'rollout/tokens_per_s')


def read(path):
  """Return the rows of a JSONL file; [] where there is none.

  A last line that a kill cut short is ignored.
  """
  rows = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      for line in f:
        try:
          rows.append(json.loads(line))
        except json.JSONDecodeError:
          break
  return rows


def to_json(x, digits=None):
  """Return x as JSON-ready values.

  Named tuples become dicts, arrays lists, NaN and infinities None.

  Args:
    x: numbers, arrays, texts, None, and dicts, lists and tuples of them.
    digits: significant digits of floats; None: all.
  """
  if hasattr(x, '_asdict'):
    x = x._asdict()
  if isinstance(x, dict):
    return {str(k): to_json(v, digits) for k, v in x.items()}
  if isinstance(x, (list, tuple)) or np.ndim(x):
    return [to_json(v, digits) for v in x]
  if x is None or isinstance(x, (str, bool)):
    return x
  x = np.asarray(x).item()
  if not isinstance(x, float):
    return x
  if not math.isfinite(x):
    return None
  return float(f'{x:.{digits}g}') if digits else x


def keep_until(path, step):
  """Drop the rows of a JSONL file after a step; None drops all of them."""
  if not distributed.is_writer():
    return
  kept = [r for r in read(path) if step is not None and r['step'] <= step]
  with open(path + '.part', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(r) + '\n' for r in kept)
  os.replace(path + '.part', path)


class Writer:
  """Appends rows; on resume, first drops the rows after the restored step."""

  def __init__(self, path, events_dir, resume_step):
    """Open the files.

    Args:
      path: the JSONL file.
      events_dir: directory of the TensorBoard events.
      resume_step: rows with a larger step are dropped; None drops all.
    """
    self._file = self._events = None
    if not distributed.is_writer():
      return
    keep_until(path, resume_step)
    self._file = open(path, 'a', encoding='utf-8')
    purge = None if resume_step is None else resume_step + 1
    self._events = tensorboardX.SummaryWriter(events_dir, purge_step=purge)

  def write(self, step, values):
    """Write one row, and return it."""
    row = {'step': int(step), **to_json(values)}
    if self._file is None:
      return row
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name != 'step' and value is not None:
        self._events.add_scalar(name, value, int(step))
    return row

  def close(self):
    """Flush and close both files."""
    if self._file is None:
      return
    self._file.close()
    self._events.close()


class _Bar(tqdm.tqdm):
  """A bar that says why its first step takes long."""

  def update(self, n=1):
    """Count steps; from the first on, nothing is compiled any more."""
    if not self.disable and self.postfix == _COMPILING:
      self.set_postfix_str('', refresh=False)
    return super().update(n)


_COMPILING = 'compiling (first step)'


def progress(config: config_lib.Config, total, start, name):
  """Return a progress bar on stderr, disabled unless run.progress is set."""
  bar = _Bar(total=total, initial=start, desc=name, file=sys.stderr,
             disable=not (config.run.progress and distributed.is_writer()),
             dynamic_ncols=True,
             mininterval=.2 if sys.stderr.isatty() else 10.)
  if not bar.disable:
    bar.set_postfix_str(_COMPILING)
  return bar


def write_json(path, values):
  """Write a JSON file atomically: a kill leaves the old file or the new one."""
  if not distributed.is_writer():
    return
  with open(path + '.part', 'w', encoding='utf-8') as f:
    json.dump(values, f, indent=2)
    f.write('\n')
  os.replace(path + '.part', path)
