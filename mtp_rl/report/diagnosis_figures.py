"""The figures of a diagnosis, drawn from its summaries alone."""

import numpy as np
from matplotlib import ticker

from mtp_rl.report import style

_COLOURS = ('#c03030', '#e08a1e', '#14a0a8', '#2060a8', '#8a55b0', '#111111',
            '#e060b0', '#707070')
_MARKERS = 'osD^vPX'  # one fewer: no estimator repeats another's pair


def _bars(axis, x, intervals, **style):
  """Draw means, with their intervals if they have any."""
  mean = np.asarray([i.mean for i in intervals])
  half = [0. if i.low is None else i.high - i.mean for i in intervals]
  axis.errorbar(x, mean, half, capsize=2, lw=1.1, ms=4, **style)


def _steps(axis, steps):
  """Label positions 0..n-1 with the checkpoints' steps."""
  axis.set_xticks(range(len(steps)), list(map(str, steps)))
  axis.set_xlim(-.6, len(steps) - .4)
  axis.set_xlabel('RL step of the checkpoint')
  axis.axhline(0, color=style.GREY, lw=.7, zorder=0)
  axis.grid(alpha=.25, axis='y')


def alignment(found, directory, title):
  """Draw same-batch against de-biased alignment, a panel per scope."""
  figure, axes = style.new(1, 3, (11.4, 3.4), title, sharey=True)
  axes = axes.ravel()
  names = {'all': 'all of theta', 'trunk': 'trunk (blocks)',
           'readout': 'readout (embedding, norm, output)'}
  x = np.arange(len(found))
  for axis, scope in zip(axes, names):
    pick = lambda kind: [s['alignment'][scope][kind] for s in found]
    _bars(axis, x - .06, pick('same'), color=style.ORANGE, marker='o',
          label='same batch')
    _bars(axis, x + .06, pick('cross'), color=style.BLUE, marker='s',
          label='de-biased (disjoint prompts)')
    _steps(axis, [s['step'] for s in found])
    axis.set_title(names[scope], fontsize=9)
  axes[0].set_ylabel('c / (||g_RL|| ||g_MTP||)')
  axes[0].legend(frameon=False, fontsize=8)
  style.save(figure, directory, 'alignment')


def coefficients(found, directory, title):
  """Draw every estimator's lambda, with the held-out best as a band."""
  columns = len(found)
  figure, ((axis,),) = style.new(
      1, 1, (max(5.2, 1.7 * columns) + 2., 4.4), title)
  for i, s in enumerate(found):
    best, ends = s['best'], (i - .42, i + .42)
    if best.low is not None:
      axis.fill_between(ends, best.low, best.high, color=style.GREEN, alpha=.18,
                        lw=0, label='its 95 % interval' if not i else None)
    axis.plot(ends, [best.mean] * 2, color=style.GREEN, lw=1.6,
              label='held-out best' if not i else None)
  names = list(found[0]['estimators'])
  for j, name in enumerate(names):
    x = np.arange(columns) + .7 * (j / (len(names) - 1) - .5)
    _bars(axis, x, [s['estimators'][name]['lam'] for s in found], ls='none',
          color=_COLOURS[j % len(_COLOURS)],
          marker=_MARKERS[j % len(_MARKERS)], label=name)
  _steps(axis, [s['step'] for s in found])
  axis.set_ylabel('lambda (bounded), mean and 95 % interval')
  axis.legend(frameon=False, fontsize=8, loc='center left',
              bbox_to_anchor=(1.01, .5))
  style.save(figure, directory, 'lambda')


def curves(found, directory, title):
  """Draw predicted and achieved Delta(lambda), a panel per checkpoint."""
  columns = min(3, len(found))
  rows = -(-len(found) // columns)
  figure, axes = style.new(rows, columns, (4.2 * columns + 1.8, 3.2 * rows),
                           title)
  axes = axes.ravel()
  forms = (('same', 'paper, c of one batch', style.ORANGE, '--'),
           ('cross', 'cross-fitted', style.BLUE, '-.'),
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
    axis.axvline(s['best'].mean, color=style.GREEN, lw=1, label='held-out best')
    _frame(axis, np.concatenate(edges), [s['curve'][f[0]] for f in forms])
    axis.set_title(f'step {s["step"]}', fontsize=9)
    axis.set_xlabel('lambda')
  for axis in axes[len(found):]:
    axis.set_axis_off()
  for axis in axes[::columns]:
    axis.set_ylabel('Delta of J due to MTP')
  figure.legend(*axes[0].get_legend_handles_labels(), frameon=False,
                fontsize=8, loc='outside right center')
  style.save(figure, directory, 'curves')


def _frame(axis, achieved, predicted):
  """Limit y to the range achieved, plus as much again for predictions."""
  low, high = achieved.min(), achieved.max()
  room = (high - low) or 1e-9
  axis.set_ylim(max(low - room, min(low, np.min(predicted))) - .05 * room,
                min(high + room, max(high, np.max(predicted))) + .05 * room)
  axis.axhline(0, color=style.GREY, lw=.7, zorder=0)
  axis.axvline(0, color=style.GREY, lw=.7, zorder=0)
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
