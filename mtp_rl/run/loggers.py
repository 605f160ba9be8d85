"""Where the rows of a run go beside its JSONL files: run.loggers names them.

The thread that trains writes. The JSONL file has a row first, so a logger that
a resume finds behind it, or that is new, catches up from there.
"""

import csv
import importlib.util
import io
import json
import os
import secrets
import sys
import time

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from mtp_rl import config as config_lib

_FLUSH_S = 10.  # seconds that events may stay in memory


def names(text):
  """Return the loggers of a text like 'tensorboard,csv', without repeats.

  Raises:
    config.ConfigError: one is unknown.
  """
  found = list(dict.fromkeys(x.strip() for x in text.split(',') if x.strip()))
  unknown = [x for x in found if x not in LOGGERS]
  if unknown:
    raise config_lib.ConfigError(
        f'run.loggers={text} names {", ".join(unknown)}; choose from '
        f'{", ".join(LOGGERS)}, separated by commas')
  return found


def check(text):
  """Refuse loggers whose package is not there.

  Raises:
    config.ConfigError: one sentence that says how to install it.
  """
  if 'wandb' in names(text) and importlib.util.find_spec('wandb') is None:
    raise config_lib.ConfigError(
        f'run.loggers={text} needs the package wandb; pip install -e '
        "'.[wandb]' (or pip install wandb), or leave it out")


def start(text, path, events_dir, resume_step, rows):
  """Return the loggers of a phase, which have caught up with its rows.

  Each has write(row), flush() and close().

  Args:
    text: run.loggers.
    path: the JSONL file.
    events_dir: see `TensorBoard`; its last part is the phase.
    resume_step: the last step that is kept; None: none.
    rows: what the JSONL file has.

  Raises:
    config.ConfigError: a logger cannot start.
  """
  check(text)
  return [LOGGERS[n](path, events_dir, resume_step, rows) for n in names(text)]


def _replace(path, text):
  with open(path + '.part', 'w', encoding='utf-8', newline='') as f:
    f.write(text)
  os.replace(path + '.part', path)


class TensorBoard:
  """TensorBoard's events of one phase, in a directory of its own.

  Not tensorboardX's SummaryWriter: that has a queue, which blocks for ever
  once its thread has met a full disk.
  """

  def __init__(self, path, events_dir, resume_step, rows):
    """Begin a file of events; see `start`."""
    del path, rows
    os.makedirs(events_dir, exist_ok=True)
    # Readers take the files in the order of their names.
    number = len(os.listdir(events_dir))
    self._writer = event_file_writer.EventsWriter(
        os.path.join(events_dir, f'{number:06d}'))
    self._flushed = time.monotonic()
    if number:  # readers drop what earlier files have from this step on
      self._writer.write_event(event_pb2.Event(
          wall_time=time.time(),
          step=0 if resume_step is None else resume_step + 1,
          session_log=event_pb2.SessionLog(
              status=event_pb2.SessionLog.START)))

  def write(self, row):
    """Write one row."""
    values = [v for name, x in row.items() if name != 'step' and x is not None
              for v in summary.scalar(name, x).value]
    self._writer.write_event(event_pb2.Event(
        wall_time=time.time(), step=row['step'],
        summary=summary_pb2.Summary(value=values)))
    if time.monotonic() - self._flushed > _FLUSH_S:
      self.flush()

  def flush(self):
    """Put all events on disk."""
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self):
    """Flush and close the file."""
    self._writer.close()


class Csv:
  """The JSONL file as a table NAME.csv: a column a metric, empty where none.

  A start writes it anew from the JSONL file. A row with a metric that no row
  before had adds a column: the first line names them all.
  """

  def __init__(self, path, events_dir, resume_step, rows):
    """Write the table of the rows that there are; see `start`."""
    del events_dir, resume_step
    self._path = path.removesuffix('.jsonl') + '.csv'
    self._columns = list(dict.fromkeys(['step', *(k for r in rows for k in r)]))
    _replace(self._path, self._text([dict(zip(self._columns, self._columns)),
                                     *rows]))
    self._file = open(self._path, 'a', encoding='utf-8', newline='')

  def _text(self, rows):
    out = io.StringIO()
    csv.DictWriter(out, self._columns, lineterminator='\n').writerows(rows)
    return out.getvalue()

  def _add(self, names):
    """Write the table anew with further columns."""
    self._file.close()
    with open(self._path, encoding='utf-8', newline='') as f:
      lines = [dict(zip(self._columns, line)) for line in csv.reader(f)]
    self._columns += names
    lines[0] |= zip(names, names)
    _replace(self._path, self._text(lines))
    self._file = open(self._path, 'a', encoding='utf-8', newline='')

  def write(self, row):
    """Write one row."""
    if new := [name for name in row if name not in self._columns]:
      self._add(new)
    self._file.write(self._text([row]))
    self._file.flush()

  def flush(self):
    """Put all rows on disk."""
    os.fsync(self._file.fileno())

  def close(self):
    """Close the file."""
    self._file.close()


class WandB:
  """Weights & Biases: one run a workdir, whose id and last steps it keeps.

  A resumed run makes the steps after its checkpoint again, the same ones;
  those that were sent are not sent twice. What goes wrong after the start
  becomes a sentence: the run goes on, its rows are in the JSONL file.
  """

  def __init__(self, path, events_dir, resume_step, rows):
    """Go on with the workdir's run, or begin it; see `start`."""
    del resume_step
    self._phase, home = os.path.basename(events_dir), os.path.dirname(path)
    self._file = os.path.join(home, 'wandb.json')
    self._known = self._read()
    self._metrics = set()
    import wandb  # takes a second or more
    self._run = wandb.run
    if self._run is None or self._run.id != self._known['id']:
      self._run = self._begin(wandb, home)
    self._save()
    for row in rows:
      self.write(row)

  def _read(self):
    if not os.path.exists(self._file):
      return {'id': secrets.token_hex(4), 'last': {}}
    try:
      with open(self._file, encoding='utf-8') as f:
        known = json.load(f)
      if isinstance(known['id'], str) and all(
          isinstance(x, int) for x in known['last'].values()):
        return known
      raise ValueError('it has no id or no steps')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
      raise config_lib.ConfigError(
          f'{self._file} cannot be read ({e}); remove it, and a new run of '
          'wandb begins') from e

  def _begin(self, wandb, home):
    config = os.path.join(home, 'config.json')
    settings = {}
    if os.path.exists(config):
      with open(config, encoding='utf-8') as f:
        settings = json.load(f)
    try:
      return wandb.init(
          project=os.environ.get('WANDB_PROJECT', 'mtp_rl'),
          id=self._known['id'], resume='allow', dir=home, config=settings,
          name=os.path.basename(os.path.abspath(home)),
          reinit='finish_previous')
    except Exception as e:
      text = str(e).strip().split('\n')[0]
      raise config_lib.ConfigError(
          f'wandb could not start ({type(e).__name__}: {text}); log in with '
          'wandb login, set WANDB_MODE=offline, or take wandb out of '
          'run.loggers') from e

  def _save(self):
    _replace(self._file, json.dumps(self._known) + '\n')

  def write(self, row):
    """Send one row, if it was not sent before."""
    step, last = row['step'], self._known['last'].get(self._phase, -1)
    if self._run is None or step <= last:
      return
    # Names of both phases meet in one run, and their steps are not one count.
    prefix = 'warmup/' if self._phase == 'warmup' else ''
    named = {prefix + k.removeprefix(prefix): v for k, v in row.items()
             if v is not None}
    try:
      for name in named.keys() - self._metrics:
        if name != prefix + 'step':
          self._run.define_metric(name, step_metric=prefix + 'step')
      self._metrics |= named.keys()
      self._run.log(named)
    except Exception as e:  # whatever it is, training matters more
      self._run = None
      print(f'\nwandb gets no more rows ({type(e).__name__}: {e}); the run '
            'goes on, and after a resume wandb catches up', file=sys.stderr,
            flush=True)
      return
    self._known['last'][self._phase] = step
    self._save()

  def flush(self):
    """Do nothing: wandb's own process keeps what it was sent."""

  def close(self):
    """End the run of wandb with RL; the warm-up's goes on into RL."""
    if self._run is not None and self._phase != 'warmup':
      self._run.finish()


LOGGERS = {'tensorboard': TensorBoard, 'csv': Csv, 'wandb': WandB}
