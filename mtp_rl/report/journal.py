"""What a run leaves for people: samples, tokens, figures, its page.

No error here ends a run: it becomes a sentence.
"""

import contextlib
import json
import os
import sys
import time

import jax
import numpy as np

from mtp_rl import distributed, sharding, tree
from mtp_rl.evaluation import held_out
from mtp_rl.report import page, run_figures, style
from mtp_rl.rollout import token_rows
from mtp_rl.run import metrics
from mtp_rl.run import workdir as workdir_lib

_SHARE = .02  # of a run's time that its page, and its figures, may take
_GUESS_S = 1.5  # of drawing the figures for the first time


@contextlib.contextmanager
def _spoken(what, workdir):
  """Say what could not be written, and go on."""
  try:
    yield
  except Exception as e:  # whatever it is, training matters more
    print(f'\n{what} could not be written ({type(e).__name__}: {e}); the run '
          'goes on, and python -m experiments.report '
          f'--workdir={workdir} tries again', file=sys.stderr, flush=True)


class _Share:
  """Bounds what a repeated work takes of the time since its start."""

  def __init__(self, guess_s=0.):
    self._began, self._spent, self._last = time.perf_counter(), 0., guess_s

  def spend(self, work):
    """Call a function, unless `_SHARE` of the time does not suffice for it."""
    start = time.perf_counter()
    if self._spent + self._last <= _SHARE * (start - self._began):
      work()
      self._last = time.perf_counter() - start
      self._spent += self._last


class Journal:
  """Notes of the RL phase; every process calls its methods."""

  def __init__(self, run: workdir_lib.Run, functions, start):
    """Drop what was noted after the step that the run resumes from.

    Args:
      run: `workdir.Run`.
      functions: `trainer.Functions`.
      start: the last step that is kept; None: none.
    """
    self._run, self._functions = run, functions
    self._page, self._figures = _Share(), _Share(_GUESS_S)
    for name in ('samples.jsonl', 'tokens.jsonl'):
      metrics.keep_until(run.path(name), start)

  def _score(self, params, rows):
    """Return the `LogProbs` of rows, as many as a minibatch has."""
    placed = distributed.put(rows, sharding.batch_sharding(self._run.mesh))
    return distributed.fetch(self._functions.steps.score(params, placed))

  def _append(self, name, rows):
    """Append rows, or none of them where the disk is full."""
    if not distributed.is_writer():
      return
    path, lines = self._run.path(name), [
        json.dumps(r, allow_nan=False) + '\n' for r in rows]
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
      with open(path, 'a', encoding='utf-8') as f:
        f.writelines(lines)
    except OSError:
      os.truncate(path, size)  # else the next row would join a half one
      raise

  def examine(self, step, params):
    """Return held-out scores, and note the first problems token by token.

    The problems are the same at every evaluation.
    """
    seen = []
    means = held_out.means(self._functions.examiner, params,
                           lambda *batch: seen.append(batch))
    for scored, rows in seen:
      count = max(1, token_rows.HELD_OUT // len(seen))
      self._note_held_out(step, params, scored[:count], rows)
    return means

  def _note_held_out(self, step, params, scored, rows):
    config = self._run.config
    size = config.rl.prompts * config.rl.group // config.rl.minibatches
    scored = scored[:size]
    # As many rows as a minibatch has, so that nothing is compiled for them.
    rows = jax.tree.map(
        lambda x: np.resize(x[:len(scored)], (size, *x.shape[1:])), rows)
    scores = self._score(params, rows)
    with _spoken('tokens.jsonl', self._run.workdir):
      self._append('tokens.jsonl', [
          {'step': step, 'kind': 'held_out', 'set': r['set'],
           'row': r['problem'], 'prompt': r['prompt'], 'answer': r['answer'],
           'extracted': r['extracted'], 'reward': r['reward'],
           **self._row(i, rows, scores)} for i, r in enumerate(scored)])

  def _row(self, index, rows, scores, more=None):
    return token_rows.row(index, rows, scores, self._run.task.tokenizer,
                          self._run.config.rollout.max_response, more)

  def rollout(self, step, rollout, params):
    """Note samples of a step, and some of them token by token.

    Args:
      step: RL step.
      rollout: `experience.Rollout`.
      params: after the updates of the step.
    """
    r, task = self._run.config.rl, self._run.task
    first = lambda x: tree.cut(x, r.minibatches)[0]
    batch, before = first(rollout.batch), first(rollout.scores)
    after = self._score(params, batch.rows)
    with _spoken('tokens.jsonl', self._run.workdir):
      self._append('samples.jsonl', [
          {'step': step, **rollout.sample(i * r.group, task.tokenizer)}
          for i in range(min(4, r.prompts))])
      more = token_rows.updates(batch, after, self._run.config)
      rewards = rollout.rewards[:len(batch.mask)]
      rows = []
      for i in token_rows.contrasting(rewards, r.group):
        sample = rollout.sample(i, task.tokenizer)
        text = sample.pop('completion')
        rows.append({'step': step, 'kind': 'rollout', 'row': i, **sample,
                     'extracted': task.extract(text),
                     **self._row(i, batch.rows, before, more)})
      self._append('tokens.jsonl', rows)

  def draw(self):
    """Write the page and draw the figures, where time allows; see `_Share`.

    Drawing takes a second, which is much in a run of a minute; the page reads
    all tokens noted so far, which are many after a day.
    """
    self._page.spend(lambda: write_page(self._run, 'running'))
    self._figures.spend(lambda: draw_figures(self._run))


def write_page(run: workdir_lib.Run, status):
  """Write report.html; status: see `page.payload`."""
  if distributed.is_writer():
    with _spoken('report.html', run.workdir):
      page.write_run(run.workdir, status)


def draw_figures(run: workdir_lib.Run):
  """Draw the figures of a run from its files."""
  if distributed.is_writer():
    with _spoken('figures', run.workdir):
      read = lambda name: metrics.read(run.path(name))
      run_figures.draw_all(read('metrics.jsonl'), read('samples.jsonl'),
                           run.path('figures'), style.title(run.config),
                           page.warm_rows(run.workdir, run.config))
