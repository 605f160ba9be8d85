"""Metrics to JSONL and to loggers; one JSON object per line, with 'step'.

Every process may call these functions; process 0 alone writes.
"""

import json
import math
import os
import sys

import numpy as np
import tqdm

from mtp_rl import config as config_lib
from mtp_rl import distributed
from mtp_rl.run import loggers as loggers_lib

# Prefixes of metrics that differ between two otherwise equal runs.
VOLATILE = ('timing_s/', 'rollout/tokens_per_s')


def read(path, keys=()):
  """Return the rows of a JSONL file; [] where there is none.

  A last line that a kill cut short is left out.

  Args:
    path: the file.
    keys: names that every row has.

  Raises:
    config.ConfigError: a line is no such row.
  """
  return [row for row, _ in _lines(path, keys)]


def _lines(path, keys):
  """Return the rows of a file, each with its line as bytes."""
  out = []
  if not os.path.exists(path):
    return out
  with open(path, 'rb') as f:
    for number, line in enumerate(f, 1):
      try:
        row = json.loads(line.decode())
        if not (isinstance(row, dict) and all(k in row for k in keys)
                and isinstance(row.get('step', 0), int)):
          raise ValueError
      except (ValueError, RecursionError):
        if not line.endswith(b'\n'):
          break
        raise config_lib.ConfigError(
            f'{path} is damaged: its line {number} is no row of a run; restore '
            'the file, or remove that line (nothing has been changed)'
        ) from None
      out.append((row, line))
  return out


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


def note(text):
  """Print a sentence on stderr that says what was found, in process 0 alone."""
  if distributed.is_writer():
    print(text, file=sys.stderr, flush=True)


def keep_until(path, step, expected=()):
  """Drop the rows of a JSONL file after a step; None drops all of them.

  Args:
    path: the file.
    step: of the checkpoint that a run goes on from.
    expected: range of the steps that have rows; a note says which of those up
      to `step` are missing.

  Raises:
    config.ConfigError: in all processes, if the file is damaged.
  """
  with distributed.together():
    if distributed.is_writer():
      _keep_until(path, step, expected)


def _keep_until(path, step, expected):
  lines = _lines(path, ('step',))
  kept = [x for x in lines if step is not None and x[0]['step'] <= step]
  there = {row['step'] for row, _ in kept}
  missing = [] if step is None else [
      s for s in expected if s <= step and s not in there]
  if missing:
    note(f'{path} has no rows of {len(missing)} steps that were made, '
         f'{missing[0]} to {missing[-1]}; the run goes on, but these cannot be '
         'measured again, and curves and summary.json lack them')
  # A line that was cut at its very end is whole, but for the newline.
  text = b''.join(line.rstrip(b'\n') + b'\n' for _, line in kept)
  if os.path.exists(path) and os.path.getsize(path) == len(text):
    return
  with open(path + '.part', 'wb') as f:
    f.write(text)
  os.replace(path + '.part', path)


class Writer:
  """Appends rows; on resume, first drops the rows after the restored step."""

  def __init__(self, path, events_dir, resume_step, expected=(),
               loggers='tensorboard'):
    """Open the files.

    Args:
      path: the JSONL file.
      events_dir: directory of the phase's TensorBoard events.
      resume_step: rows with a larger step are dropped; None drops all.
      expected: see `keep_until`.
      loggers: run.loggers.

    Raises:
      config.ConfigError: the file is damaged, or a logger cannot start.
    """
    self._file, self._loggers = None, []
    keep_until(path, resume_step, expected)
    with distributed.together():
      if distributed.is_writer():
        self._loggers = loggers_lib.start(loggers, path, events_dir,
                                          resume_step, read(path))
        self._file = open(path, 'a', encoding='utf-8')

  def write(self, step, values):
    """Write one row, and return it.

    Raises:
      OSError: the disk is full or broken.
    """
    row = {'step': int(step), **to_json(values)}
    if self._file is None:
      return row
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for logger in self._loggers:
      logger.write(row)
    return row

  def flush(self):
    """Put all rows on disk; called before a checkpoint that counts on them."""
    if self._file is None:
      return
    os.fsync(self._file.fileno())
    for logger in self._loggers:
      logger.flush()

  def close(self):
    """Flush and close all files."""
    if self._file is None:
      return
    self._file.close()
    for logger in self._loggers:
      logger.close()


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


def postfix(row):
  """Return what the bar of the RL phase shows of a row of metrics, a dict."""
  out = {'reward': f'{row["reward/mean"]:.2f}'}
  if row['skipped_updates']:
    out['skipped'] = row['skipped_updates']
  for name, value in row.items():
    if name.endswith('/greedy') and value is not None:
      out['acc'] = f'{value:.2f}'
  if row.get('occ/lambda') is not None:
    out['lambda'] = f'{row["occ/lambda"]:+.3f}'
  out['tok/s'] = f'{row["rollout/tokens_per_s"]:.0f}'
  return out


def write_json(path, values):
  """Write a JSON file whole: a kill or power cut leaves the old or the new."""
  if not distributed.is_writer():
    return
  with open(path + '.part', 'w', encoding='utf-8') as f:
    json.dump(values, f, indent=2)
    f.write('\n')
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + '.part', path)
