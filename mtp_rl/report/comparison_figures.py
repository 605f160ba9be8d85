"""The figures of a comparison, drawn from metrics alone."""

import numpy as np
from matplotlib import ticker

from mtp_rl.report import style

_COLOURS = ('#707070', '#111111', '#c03030', '#e08a1e', '#2060a8', '#3a8f5c',
            '#8a55b0', '#14a0a8', '#b06a3a', '#d060a0')
_DASHES = ('-', '--', ':')


def _styles(variants):
  """Return label -> (colour, line style), the same in every panel."""
  labels = list(dict.fromkeys(v.label for v in variants))
  return {label: (_COLOURS[i % len(_COLOURS)],
                  _DASHES[i // len(_COLOURS) % len(_DASHES)])
          for i, label in enumerate(labels)}


def _groups(variants):
  return list(dict.fromkeys(v.group for v in variants))


def _curve(runs, pick):
  """Return steps, means and standard deviations over the seeds.

  Args:
    runs: dict seed -> rows.
    pick: function row -> number or None.
  """
  seen = {}
  for rows in runs.values():
    for row in rows:
      value = pick(row)
      if value is not None:
        seen.setdefault(row['step'], []).append(value)
  if not seen:
    return [], np.zeros(0), np.zeros(0)
  full = max(len(v) for v in seen.values())
  steps = sorted(s for s, v in seen.items() if len(v) == full)
  values = np.asarray([seen[s] for s in steps])
  return steps, values.mean(1), values.std(1, ddof=1 if full > 1 else 0)


def _greedy(row):
  seen = [v for n, v in row.items() if n.startswith('val/')
          and n.endswith('/greedy') and v is not None]
  return float(np.mean(seen)) if seen else None


def _smooth(x, width):
  """Return the running mean of the last `width` values."""
  total = np.cumsum(np.concatenate([[0.], x]))
  end = np.arange(1, len(x) + 1)
  start = np.maximum(end - width, 0)
  return (total[end] - total[start]) / (end - start)


def _draw(axis, variants, runs, pick, styles, width=1):
  for v in variants:
    steps, mean, spread = _curve(runs[v.name], pick)
    if not len(steps):
      continue
    mean, spread = _smooth(mean, width), _smooth(spread, width)
    colour, dash = styles[v.label]
    axis.plot(steps, mean, dash, color=colour, lw=1.3, label=v.label)
    if len(runs[v.name]) > 1:
      axis.fill_between(steps, mean - spread, mean + spread, color=colour,
                        alpha=.12, lw=0)
  axis.grid(alpha=.25)
  axis.set_xlabel('RL step')
  axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))


def _figure(rows, columns, title, width=4.4, height=3., **kw):
  return style.new(rows, columns, (width * columns + 1.6, height * rows + .5),
                   title, **kw)


def _legend(axis):
  handles, labels = axis.get_legend_handles_labels()
  if handles:
    axis.legend(handles, labels, frameon=False, fontsize=8, loc='center left',
                bbox_to_anchor=(1.01, .5))


def learning(variants, runs, directory, title):
  """Draw reward and held-out greedy accuracy, a row of panels per group."""
  styles, groups = _styles(variants), _groups(variants)
  figure, axes = _figure(len(groups), 2, title)
  longest = max((len(rows) for seeds in runs.values()
                 for rows in seeds.values()), default=1)
  width = max(1, longest // 20)
  for (left, right), group in zip(axes, groups):
    mine = [v for v in variants if v.group == group]
    _draw(left, mine, runs, lambda r: r.get('reward/mean'), styles, width)
    _draw(right, mine, runs, _greedy, styles)
    over = f', mean of {width} steps' if width > 1 else ''
    left.set_title(f'{group}: reward{over}', fontsize=10)
    right.set_title(f'{group}: held-out greedy', fontsize=10)
    _legend(right)
  style.save(figure, directory, 'learning')


def coefficient(variants, runs, directory, title):
  """Draw lambda of each variant whose regime computes it, a panel each."""
  mine = [v for v in variants if v.config.mtp.regime.startswith('occ')
          and runs[v.name]]
  if not mine:
    return
  styles, columns = _styles(variants), min(3, len(mine))
  figure, axes = _figure(-(-len(mine) // columns), columns, title, width=3.8,
                         height=2.5, sharex=True, sharey=True)
  axes = axes.ravel()
  for axis, v in zip(axes, mine):
    _draw(axis, [v], runs, lambda r: r.get('occ/lambda'), styles)
    axis.axhline(0, color='#909090', lw=.6, zorder=0)
    axis.set_yscale('symlog', linthresh=1e-2)
    axis.set_title(f'{v.group}: {v.label}', fontsize=9)
  for axis in axes[len(mine):]:
    axis.set_axis_off()
  figure.supylabel('lambda', fontsize=10)
  style.save(figure, directory, 'lambda')


def forest(rows, directory, title):
  """Draw the paired differences with their intervals, a row per group.

  Args:
    rows: list from `compare.summary.compare`.
    directory: where forest.png goes.
    title: above the figure.
  """
  shown = {'greedy': 'held-out greedy', 'avg': 'held-out avg@k',
           'reward': 'reward, mean of all steps'}
  marks = {'detach': ('o', '#2060a8', .14), 'rl_only': ('s', '#d8702a', -.14)}
  rows = [r for r in rows if any(r['against'].values())]
  if not rows:
    return
  groups = list(dict.fromkeys(r['group'] for r in rows))
  heights = [.34 * sum(r['group'] == g for r in rows) + .8 for g in groups]
  figure, axes = _figure(len(groups), len(shown), title, width=3.6,
                         height=sum(heights) / len(groups),
                         height_ratios=heights)
  handles = {}
  for line, group in zip(axes, groups):
    mine = [r for r in rows if r['group'] == group][::-1]
    for axis, (metric, name) in zip(line, shown.items()):
      axis.axvline(0, color='#909090', lw=.8, zorder=0)
      for y, row in enumerate(mine):
        for regime, (mark, colour, shift) in marks.items():
          found = row['against'].get(regime, {}).get(metric)
          if found is None:
            continue
          error = (None if found.low is None else
                   [[found.mean - found.low], [found.high - found.mean]])
          handles[f'minus {regime}'] = axis.errorbar(
              found.mean, y + shift, xerr=error, fmt=mark, ms=4, lw=1.2,
              color=colour, capsize=2)
      axis.set_ylim(-.6, len(mine) - .4)
      axis.set_yticks(range(len(mine)), [r['label'] for r in mine]
                      if axis is line[0] else [''] * len(mine), fontsize=8)
      axis.set_title(f'{group}: {name}', fontsize=9)
      axis.tick_params(axis='x', labelsize=8)
      axis.xaxis.set_major_locator(ticker.MaxNLocator(4))
      axis.grid(axis='x', alpha=.25)
  figure.legend(handles.values(), handles.keys(), loc='outside right center',
                frameon=False, fontsize=8)
  style.save(figure, directory, 'forest')


def draw_all(variants, runs, rows, directory, title):
  """Draw every figure of a comparison.

  Args:
    variants: list of `grid.Variant`.
    runs: dict from `compare.summary.collect`.
    rows: list from `compare.summary.compare`.
    directory: where the PNG files go.
    title: above each figure.
  """
  several = any(len(seeds) > 1 for seeds in runs.values())
  bands = title + ('; bands: 1 standard deviation' if several else '')
  learning(variants, runs, directory, bands)
  coefficient(variants, runs, directory, bands)
  forest(rows, directory, title + '; paired by seed, 95 % intervals')
