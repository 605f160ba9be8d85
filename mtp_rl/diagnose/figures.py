"""The figures of a diagnosis, drawn from its summaries alone."""

import os

import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from mtp_rl.diagnose import measure

_BLUE, _ORANGE, _GREEN, _GREY = '#2060a8', '#d8702a', '#3a8f5c', '#909090'
_COLOURS = ('#c03030', '#e08a1e', '#14a0a8', '#2060a8', '#8a55b0', '#111111',
            '#e060b0', '#707070')
_MARKERS = 'osD^vPX*'


def _new(columns, title, width=3.8, height=3.4, rows=1, extra=0., **kw):
  figure = mpl_figure.Figure(figsize=(width * columns + extra, height * rows),
                             layout='constrained')
  figure.suptitle(title, fontsize=10)
  return figure, figure.subplots(rows, columns, squeeze=False, **kw).ravel()


def _bars(axis, x, intervals, **style):
  """Draw means with their intervals where these exist."""
  mean = np.asarray([i.mean for i in intervals])
  half = [0. if i.low is None else i.high - i.mean for i in intervals]
  axis.errorbar(x, mean, half, capsize=2, lw=1.1, ms=4, **style)


def _steps(axis, steps):
  """Label positions 0..n-1 with the checkpoints' steps."""
  axis.set_xticks(range(len(steps)), list(map(str, steps)))
  axis.set_xlim(-.6, len(steps) - .4)
  axis.set_xlabel('RL step of the checkpoint')
  axis.axhline(0, color=_GREY, lw=.7, zorder=0)
  axis.grid(alpha=.25, axis='y')


def alignment(found, directory, title):
  """Draw same-batch against de-biased alignment, a panel a scope."""
  figure, axes = _new(3, title, sharey=True)
  names = {'all': 'all of theta', 'trunk': 'trunk (blocks)',
           'readout': 'readout (embedding, norm, output)'}
  x = np.arange(len(found))
  for axis, scope in zip(axes, measure.SCOPES):
    pick = lambda kind: [s['alignment'][scope][kind] for s in found]
    _bars(axis, x - .06, pick('same'), color=_ORANGE, marker='o',
          label='same batch')
    _bars(axis, x + .06, pick('cross'), color=_BLUE, marker='s',
          label='de-biased (disjoint prompts)')
    _steps(axis, [s['step'] for s in found])
    axis.set_title(names[scope], fontsize=9)
  axes[0].set_ylabel('c / (||g_RL|| ||g_MTP||)')
  axes[0].legend(frameon=False, fontsize=8)
  figure.savefig(os.path.join(directory, 'alignment.png'), dpi=110)


def coefficients(found, directory, title):
  """Draw every estimator's lambda, with the held-out best as a band."""
  columns = len(found)
  figure, (axis,) = _new(1, title, width=max(5.2, 1.7 * columns), height=4.4,
                         extra=2.)
  for i, s in enumerate(found):
    best, ends = s['best'], (i - .42, i + .42)
    if best.low is not None:
      axis.fill_between(ends, best.low, best.high, color=_GREEN, alpha=.18,
                        lw=0, label='its 95 % interval' if not i else None)
    axis.plot(ends, [best.mean] * 2, color=_GREEN, lw=1.6,
              label='held-out best' if not i else None)
  names = list(found[0]['estimators'])
  for j, name in enumerate(names):
    x = np.arange(columns) + .7 * (j / (len(names) - 1) - .5)
    _bars(axis, x, [s['estimators'][name]['lam'] for s in found], ls='none',
          color=_COLOURS[j], marker=_MARKERS[j], label=name)
  _steps(axis, [s['step'] for s in found])
  axis.set_ylabel('lambda (bounded), mean and 95 % interval')
  axis.legend(frameon=False, fontsize=8, loc='center left',
              bbox_to_anchor=(1.01, .5))
  figure.savefig(os.path.join(directory, 'lambda.png'), dpi=110)


def curves(found, directory, title):
  """Draw predicted and achieved Delta(lambda), a panel a checkpoint."""
  columns = min(3, len(found))
  figure, axes = _new(columns, title, width=4.2, height=3.2,
                      rows=-(-len(found) // columns), extra=1.8)
  forms = (('same', 'paper, c of one batch', _ORANGE, '--'),
           ('cross', 'cross-fitted', _BLUE, '-.'),
           ('curvature', 'curvature, c of one batch', '#8a55b0', ':'))
  for axis, s in zip(axes, found):
    grid, achieved = s['curve']['grid'], s['curve']['achieved']
    mean = np.asarray([a.mean for a in achieved])
    edges = [mean]
    if achieved[0].low is not None:
      low, high = (np.asarray([getattr(a, k) for a in achieved])
                   for k in ('low', 'high'))
      axis.fill_between(grid, low, high, color='black', alpha=.12, lw=0,
                        label='its 95 % interval')
      edges += [low, high]
    axis.plot(grid, mean, color='black', lw=1.6, marker='o', ms=2.5,
              label='achieved on held-out rollouts')
    for form, label, colour, dash in forms:
      axis.plot(grid, s['curve'][form], dash, color=colour, lw=1.4,
                label=label)
    axis.axvline(s['best'].mean, color=_GREEN, lw=1, label='held-out best')
    _frame(axis, np.concatenate(edges), [s['curve'][f[0]] for f in forms])
    axis.set_title(f'step {s["step"]}', fontsize=9)
    axis.set_xlabel('lambda')
  for axis in axes[len(found):]:
    axis.set_axis_off()
  for axis in axes[::columns]:
    axis.set_ylabel('Delta of J owed to MTP')
  figure.legend(*axes[0].get_legend_handles_labels(), frameon=False,
                fontsize=8, loc='outside right center')
  figure.savefig(os.path.join(directory, 'curves.png'), dpi=110)


def _frame(axis, achieved, predicted):
  """Limit y to what was achieved, and as much again of the predictions."""
  low, high = achieved.min(), achieved.max()
  room = (high - low) or 1e-9
  axis.set_ylim(max(low - room, min(low, np.min(predicted))) - .05 * room,
                min(high + room, max(high, np.max(predicted))) + .05 * room)
  axis.axhline(0, color=_GREY, lw=.7, zorder=0)
  axis.axvline(0, color=_GREY, lw=.7, zorder=0)
  axis.grid(alpha=.25)
  axis.yaxis.set_major_formatter(ticker.ScalarFormatter(useMathText=True))
  axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))


def draw_all(summaries, directory, title):
  """Draw the three figures of a diagnosis into a directory.

  Args:
    summaries: list of `summary.summarise`, at least one with rollouts.
    directory: where the PNG files go.
    title: one line above each figure.
  """
  found = [s for s in summaries if s['rollouts']]
  alignment(found, directory, title)
  coefficients(found, directory, title)
  curves(found, directory, title)
