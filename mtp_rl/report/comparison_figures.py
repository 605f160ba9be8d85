"""The figures of a comparison, drawn from metrics alone."""

import numpy as np
from matplotlib import ticker

from mtp_rl.report import style

_DASHES = {'solid': '-', 'dashed': '--', 'dotted': ':', 'dashdot': '-.'}
SHOWN = {'greedy': 'held-out greedy', 'avg': 'held-out avg@k',
         'reward': 'reward, mean of all steps',
         'reward_s': 'reward in equal seconds',
         'accept_expected': 'drafts accepted',
         'accept_length': 'drafts accepted in a row'}


def lines(variants):
  """Return label -> `style.Line`, the same in every panel."""
  return style.variants({v.label: v.config.mtp.regime for v in variants})


def _groups(variants):
  return list(dict.fromkeys(v.group for v in variants))


def curve(runs, pick, width=1):
  """Return steps, means and standard deviations over the seeds.

  Where a seed's value is missing, mean and deviation are NaN, a gap.

  Args:
    runs: dict seed -> rows.
    pick: function row -> number, None (missing), or `UNMEASURED`.
    width: steps of the running mean.
  """
  seen = {}
  for rows in runs.values():
    for row in rows:
      value = pick(row)
      if value is not UNMEASURED:
        seen.setdefault(row['step'], []).append(
            np.nan if value is None else value)
  steps = sorted(seen)
  full = max(map(len, seen.values()), default=1)
  over = lambda f: np.asarray([
      f(seen[s]) if len(seen[s]) == full else np.nan for s in steps])
  return steps, _smooth(over(np.mean), width), _smooth(
      over(lambda x: np.std(x, ddof=1 if full > 1 else 0)), width)


UNMEASURED = object()  # this step does not measure it, which is no gap


def metric(name):
  """Return a function for `curve` that picks a metric."""
  return lambda row: row.get(name, UNMEASURED)


def greedy(row):
  """Pick the mean greedy score of the held-out sets; see `curve`."""
  seen = [v for n, v in row.items() if n.startswith('val/')
          and n.endswith('/greedy')]
  if not seen:
    return UNMEASURED
  return None if None in seen else float(np.mean(seen))


def smoothing(runs):
  """Return over how many steps rewards are averaged: a twentieth of a run."""
  longest = max((len(rows) for seeds in runs.values()
                 for rows in seeds.values()), default=1)
  return max(1, longest // 20)


def _smooth(x, width):
  """Return the running mean of the last `width` values; gaps stay."""
  there = np.isfinite(x)
  total = lambda y: np.cumsum(np.concatenate([[0.], y]))
  sums, counts = total(np.where(there, x, 0.)), total(there)
  end = np.arange(1, len(x) + 1)
  start = np.maximum(end - width, 0)
  mean = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
  return np.where(there, mean, np.nan)


def _draw(axis, variants, runs, pick, styles, unit, width=1):
  gaps = set()
  for v in variants:
    steps, mean, spread = curve(runs[v.name], pick, width)
    gaps |= {s for s, m in zip(steps, mean) if np.isnan(m)}
    if np.isnan(mean).all():
      continue
    line = styles[v.label]
    axis.plot(steps, mean, _DASHES[line.dash], color=line.colour, lw=1.3,
              label=v.label, marker=line.marker, ms=3.6,
              markevery=max(1, len(steps) // 8))
    if len(runs[v.name]) > 1:
      axis.fill_between(steps, mean - spread, mean + spread, color=line.colour,
                        alpha=.12, lw=0)
  if gaps:
    axis.plot(sorted(gaps), [0] * len(gaps), '^', color=style.GREY, ms=4,
              clip_on=False, transform=axis.get_xaxis_transform(),
              label='missing or not finite')
  axis.grid(alpha=.25)
  axis.set(xlabel='RL step', ylabel=unit)
  style.whole_steps(axis)


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
  styles, groups = lines(variants), _groups(variants)
  if not any(row['step'] for seeds in runs.values() for rows in seeds.values()
             for row in rows):
    return  # no RL: one point a variant, which the tables have
  figure, axes = _figure(len(groups), 2, title)
  width = smoothing(runs)
  for (left, right), group in zip(axes, groups):
    mine = [v for v in variants if v.group == group]
    _draw(left, mine, runs, metric('reward/mean'), styles,
          'mean of the rollout', width)
    _draw(right, mine, runs, greedy, styles, 'share of the reward')
    over = f', mean of {width} steps' if width > 1 else ''
    left.set_title(f'{group}: reward{over}', fontsize=10)
    right.set_title(f'{group}: held-out greedy', fontsize=10)
    _legend(right)
  style.save(figure, directory, 'learning')


def warmups(variants, runs, directory, title):
  """Draw the main head's loss in the warm-ups, a thin line a seed.

  Whether a seed leaves a plateau is seen in its own line, not in a mean.

  Args:
    variants: list of `grid.Variant`; those without runs are left out.
    runs: dict variant's name -> dict seed -> rows of warmup.jsonl.
    directory: where warmup.png goes.
    title: above the figure.
  """
  variants = [v for v in variants if runs.get(v.name)]
  if not variants:
    return
  styles, groups = lines(variants), _groups(variants)
  figure, axes = _figure(len(groups), 1, title, width=6., height=3.6)
  for axis, group in zip(axes[:, 0], groups):
    for v in (v for v in variants if v.group == group):
      for i, rows in enumerate(runs[v.name].values()):
        loss = np.asarray([r['warmup/loss'] for r in rows], float)
        axis.plot([r['step'] for r in rows],
                  _smooth(loss, max(1, len(rows) // 50)),
                  _DASHES[styles[v.label].dash], lw=1., alpha=.8,
                  color=styles[v.label].colour,
                  label=v.label if i == 0 else None)
    axis.set(xlabel='update of the warm-up', yscale='log',
             ylabel='loss of the main head, nats a token')
    axis.grid(alpha=.25, which='both')
    _legend(axis)
  style.save(figure, directory, 'warmup')


def reward_by_seconds(variants, runs, rows, directory, title):
  """Draw the reward against seconds, means over the seeds, a panel per group.

  Of the seeds that have a reward in equal seconds.

  Args:
    variants, runs, rows, directory, title: see `draw_all`.
  """
  paces = {r['name']: r['values'].get('step_s', {}) for r in rows}
  styles, groups = lines(variants), _groups(variants)
  figure, axes = _figure(len(groups), 1, title, width=6.)
  width = smoothing(runs)
  for axis, group in zip(axes[:, 0], groups):
    for v in (v for v in variants if v.group == group and paces[v.name]):
      there = {s: runs[v.name][s] for s in paces[v.name]}
      steps, mean, _ = curve(there, metric('reward/mean'), width)
      each = np.mean(list(paces[v.name].values()))
      line = styles[v.label]
      axis.plot(np.asarray(steps) * each, mean, _DASHES[line.dash], lw=1.3,
                color=line.colour, label=v.label, marker=line.marker, ms=3.6,
                markevery=max(1, len(steps) // 8))
    over = f', mean of {width} steps' if width > 1 else ''
    axis.set_title(f'{group}: reward{over}', fontsize=10)
    axis.set(xlabel="seconds (steps times the mean of the seeds' medians)",
             ylabel='mean of the rollout')
    axis.grid(alpha=.25)
    _legend(axis)
  style.save(figure, directory, 'seconds')


def coefficient(variants, runs, directory, title):
  """Draw lambda of each variant whose regime computes it, a panel each."""
  mine = [v for v in variants if v.config.mtp.regime.startswith('occ')
          and runs[v.name]]
  if not mine:
    return
  styles, columns = lines(variants), min(3, len(mine))
  figure, axes = _figure(-(-len(mine) // columns), columns, title, width=3.8,
                         height=2.5, sharex=True, sharey=True)
  axes = axes.ravel()
  for axis, v in zip(axes, mine):
    _draw(axis, [v], runs, metric('occ/lambda'), styles, '')
    axis.axhline(0, color='#909090', lw=.6, zorder=0)
    axis.set_yscale('symlog', linthresh=1e-2)
    axis.set_title(f'{v.group}: {v.label}', fontsize=9)
  for axis in axes[len(mine):]:
    axis.set_axis_off()
  figure.supylabel('lambda', fontsize=10)
  style.save(figure, directory, 'lambda')


def differences(rows, metric_name):
  """Return [(variant, baseline, its regime, `intervals.Interval`)].

  Args:
    rows: of one group.
    metric_name: whose differences.
  """
  return [(r['label'], r['baselines'][regime], regime, found[metric_name])
          for r in rows for regime, found in r['against'].items()
          if found.get(metric_name) is not None]


def forest(rows, directory, title):
  """Draw the paired differences with their intervals, each on a tick.

  Args:
    rows: list from `compare.summary.compare`.
    directory: where forest.png goes.
    title: above the figure.
  """
  rows = [r for r in rows if any(r['against'].values())]
  if not rows:
    return
  groups = list(dict.fromkeys(r['group'] for r in rows))
  shown = [m for m in SHOWN if differences(rows, m)]
  names = {g: list(dict.fromkeys(
      pair[:2] for m in shown for pair in differences(
          [r for r in rows if r['group'] == g], m))) for g in groups}
  heights = [.24 * len(names[g]) + .8 for g in groups]
  figure, axes = _figure(len(groups), len(shown), title, width=3.6,
                         height=sum(heights) / len(groups),
                         height_ratios=heights)
  for panels, group in zip(axes, groups):
    mine = [r for r in rows if r['group'] == group]
    places = {pair: -i for i, pair in enumerate(names[group])}
    for axis, key in zip(panels, shown):
      axis.axvline(0, color=style.GREY, lw=.8, zorder=0)
      for label, other, regime, found in differences(mine, key):
        line = style.REGIMES[regime]
        axis.errorbar(found.mean, places[label, other], xerr=_error(found),
                      fmt=line.marker, ms=4, lw=1.2, color=line.colour,
                      capsize=2)
      axis.set_ylim(-len(places) + .4, .6)
      axis.set_yticks(list(places.values()), [
          ' - '.join(pair) if axis is panels[0] else '' for pair in places],
                      fontsize=8)
      axis.set_title(f'{group}: {SHOWN[key]}', fontsize=9)
      axis.set_xlabel('difference', fontsize=8)
      axis.tick_params(axis='x', labelsize=8)
      axis.xaxis.set_major_locator(ticker.MaxNLocator(4))
      axis.grid(alpha=.25)
  style.save(figure, directory, 'forest')


def _error(found):
  """Return [[below], [above]] of an interval, or None where it has no ends."""
  return None if found.low is None else [[found.mean - found.low],
                                         [found.high - found.mean]]


def trade(rows, directory, title):
  """Draw what drafts gain against what held-out accuracy loses, over Detach.

  Drafts in a row, where a run measures several.

  Args:
    rows: list from `compare.summary.compare`.
    directory: where trade.png goes.
    title: above the figure.
  """
  pairs = [(r, r['against'].get('detach', {})) for r in rows
           if r['regime'] != 'rl_only']  # its modules are frozen
  several = any(x.get('accept_length') for _, x in pairs)
  drafts = 'accept_length' if several else 'accept_expected'
  pairs = [(r, x) for r, x in pairs if x.get('avg') and x.get(drafts)]
  if not pairs:
    return
  groups = list(dict.fromkeys(r['group'] for r, _ in pairs))
  figure, axes = _figure(1, len(groups), title, width=7., height=5.)
  for axis, group in zip(axes[0], groups):
    mine = [(r, x) for r, x in pairs if r['group'] == group]
    styles = style.variants({r['label']: r['regime'] for r, _ in mine})
    for r, found in mine:
      x, y, line = found[drafts], found['avg'], styles[r['label']]
      axis.errorbar(x.mean, y.mean, xerr=_error(x), yerr=_error(y), ms=5,
                    fmt=line.marker, lw=.8, color=line.colour,
                    label=r['label'])
    axis.axhline(0, color=style.GREY, lw=.8, zorder=0)
    axis.axvline(0, color=style.GREY, lw=.8, zorder=0)
    other = mine[0][0]['baselines']['detach']
    axis.set_title(f'{group}: right of and not below {other} is a gain',
                   fontsize=10)
    axis.set_xlabel(f'drafts accepted{" in a row" * several}, minus {other}')
    axis.set_ylabel(f'held-out avg@k, minus {other}')
    axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, .5))
    axis.grid(alpha=.25)
  style.save(figure, directory, 'trade')


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
  trade(rows, directory, title + '; paired by seed, 95 % intervals')
