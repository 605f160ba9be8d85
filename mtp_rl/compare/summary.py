"""Seed-paired statistics of complete runs, and their tables.

Differences are taken within a seed (both runs start from one warm-up, unless
they change it) and then averaged; the 95 % interval is Student's t over the
seeds.
"""

import json
import os
import statistics

from mtp_rl.report import intervals, tables
from mtp_rl.run import metrics

METRICS = {
    'greedy': 'held-out greedy',
    'avg': 'held-out avg@k',
    'reward': 'reward, mean of all steps',
    'acceptance': 'MTP acceptance',
    'accept_expected': 'drafts accepted',
    'accept_length': 'drafts accepted in a row',
    'entropy': 'entropy',
    'lambda': 'mean lambda',
    'update_s': 's of updates a step',
    'step_s': 's a step',
    'reward_s': 'reward in equal seconds',
    'warmup_loss': 'loss after the warm-up',
    'warmup_floor': 'its floor',
}
# Metrics whose paired differences the tables show; comparison.json has all.
SHOWN = ('greedy', 'avg', 'reward', 'reward_s', 'accept_expected',
         'accept_length')
LEVEL = .05  # of Holm's correction within a table
BASELINES = ('detach', 'rl_only')


def _mean_at_end(row, kind):
  seen = [v for n, v in row.items() if n.startswith('val/') and v is not None
          and n.rsplit('/', 1)[1].startswith(kind)]
  return statistics.fmean(seen) if seen else None


def _by_set(row):
  """Return {'greedy/<set>': accuracy}, {} where there is one held-out set."""
  seen = {f'greedy/{n.split("/")[1]}': v for n, v in row.items()
          if n.startswith('val/') and n.endswith('/greedy') and v is not None}
  return seen if len(seen) > 1 else {}


def _by_depth(late):
  """Return {'drafts/<k>': share of first k drafts that pass}, {} of one depth.

  Args:
    late: function name of a metric -> its values in the last steps.
  """
  seen, k = {}, 1
  while values := late(f'mtp_{k}/accept_cumulative'):
    seen[f'drafts/{k}'], k = statistics.fmean(values), k + 1
  return seen if len(seen) > 1 else {}


def _reward(row):
  """Return a step's mean reward, of all that was drawn; None: none.

  Groups that rl.dynamic_sampling keeps, for their varied rewards, say less.
  """
  return row.get('reward/drawn_mean', row.get('reward/mean'))


def run_values(rows):
  """Return a run's values, a dict with those `METRICS` that it has.

  And with 'greedy/<set>' where there are several held-out sets, 'drafts/<k>'
  where there are several depths.

  Args:
    rows: list of rows of metrics.jsonl.
  """
  steps = [r for r in rows if r['step'] > 0]
  column = lambda name: [r[name] for r in steps if r.get(name) is not None]
  last = rows[-1] if rows else {}
  rewards = [x for x in map(_reward, steps) if x is not None]
  lambdas, seconds = map(column, ('occ/lambda', 'timing_s/update'))
  # One step's rollouts are few: the last tenth of the steps.
  late = lambda name: column(name)[-max(len(steps) // 10, 1):]
  first = rows[0] if rows else {}
  ends = {k: late(name) for k, name in (
      ('accept_expected', 'mtp_1/accept_expected'),
      ('accept_length', 'mtp/accept_length'), ('entropy', 'actor/entropy'))}
  depths = _by_depth(late)
  if not depths:
    ends['accept_length'] = []  # of one draft: accept_expected again
  out = {
      'greedy': _mean_at_end(last, 'greedy'),
      'avg': _mean_at_end(last, 'avg@'),
      'reward': statistics.fmean(rewards) if rewards else None,
      'acceptance': last.get('mtp_1/accept_top1'),
      **{k: statistics.fmean(x) if x else None for k, x in ends.items()},
      'lambda': statistics.fmean(lambdas) if lambdas else None,
      'update_s': statistics.median(seconds) if seconds else None,
      'warmup_loss': first.get('after_warmup/loss'),
      'warmup_floor': first.get('after_warmup/floor'),
      **_by_set(last), **depths,
  }
  return {k: v for k, v in out.items() if v is not None}


def is_complete(workdir):
  """Return whether the run in a workdir has done all its steps."""
  try:
    with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
      return json.load(f)['status'] == 'complete'
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return False


def collect(variants, seeds, path):
  """Read the complete runs.

  Args:
    variants: list of `grid.Variant`.
    seeds: list of ints.
    path: function (variant's name, seed) -> workdir.

  Returns:
    dict name -> dict seed -> rows of metrics.jsonl.
  """
  return {v.name: {
      s: metrics.read(os.path.join(path(v.name, s), 'metrics.jsonl'))
      for s in seeds if is_complete(path(v.name, s))} for v in variants}


def baseline(variants, group, regime):
  """Return the first variant of a group with a regime, or None."""
  return next((v for v in variants if v.group == group
               and v.config.mtp.regime == regime), None)


def step_seconds(rows):
  """Return the median seconds of a run's RL steps, None where it has none.

  Compilation, in the first of them, does not count.
  """
  seen = [r['timing_s/step'] for r in rows if r.get('timing_s/step')]
  return statistics.median(seen) if seen else None


def _in_equal_seconds(variants, runs):
  """Return name -> seed -> values: seconds a step, reward in equal seconds.

  That is the mean reward of the steps that a run makes in the seconds that the
  fastest run of the same seed and group takes for all of its steps.
  """
  out = {v.name: {} for v in variants}
  for group in dict.fromkeys(v.group for v in variants):
    names = [v.name for v in variants if v.group == group]
    for seed in set.intersection(*(set(runs[n]) for n in names)):
      rewards = {n: [x for x in map(_reward, runs[n][seed]) if x is not None]
                 for n in names}
      each = {n: step_seconds(runs[n][seed]) for n in names}
      if not all(rewards.values()) or None in each.values():
        continue
      budget = min(each[n] * len(rewards[n]) for n in names)
      for n in names:
        steps = max(int(budget / each[n] + 1e-6), 1)
        out[n][seed] = {'step_s': each[n],
                        'reward_s': statistics.fmean(rewards[n][:steps])}
  return out


def compare(variants, runs, seconds=False):
  """Return a dict per variant: its values, means and paired differences.

  Args:
    variants: list of `grid.Variant`.
    runs: dict from `collect`.
    seconds: whether rewards are also compared in equal seconds.
  """
  values, each = {}, {name: {s: run_values(rows) for s, rows in seeds.items()}
                      for name, seeds in runs.items()}
  if seconds:
    for name, some in _in_equal_seconds(variants, runs).items():
      for seed, found in some.items():
        each[name][seed] |= found
  names = list(METRICS | dict.fromkeys(sorted(
      m for some in each.values() for v in some.values() for m in v)))
  for name, some in each.items():
    values[name] = {m: {s: v[m] for s, v in some.items() if m in v}
                    for m in names}
  out = []
  for v in variants:
    mine = values[v.name]
    row = {'name': v.name, 'group': v.group, 'label': v.label,
           'regime': v.config.mtp.regime, 'seeds': sorted(runs[v.name]),
           'values': mine, 'mean': {}, 'against': {}, 'baselines': {}}
    row['mean'] = {m: intervals.interval(mine[m].values())
                   for m in names if mine[m]}
    for regime in BASELINES:
      other = baseline(variants, v.group, regime)
      if other is not None and other.name != v.name:
        found = {m: intervals.paired(mine[m], values[other.name][m])
                 for m in names}
        row['against'][regime] = {m: x for m, x in found.items() if x}
        row['baselines'][regime] = other.label
    out.append(row)
  return out


def _number(x, name, signed=False):
  digits = 4 if name in ('lambda', 'update_s', 'step_s') else 3
  text = f'{x:+.{digits}f}' if signed else f'{x:.{digits}f}'
  return text.replace('-', '−')  # noqa: RUF001


def _difference(x, name, stands):
  """Return the text of a paired difference; `stands`: also by Holm."""
  if x is None:
    return ''
  mean = _number(x.mean, name, signed=True)
  if x.low is None:
    return mean
  ends = ', '.join(_number(end, name, signed=True) for end in (x.low, x.high))
  mean = f'**{mean}**' if intervals.told(x) else mean
  mean += r'\*' * stands
  return f'{mean} [{ends}]'


def _differences(rows, regime, titles):
  """Return the table of paired differences, '' where there are none.

  Args:
    rows: those of one group, from `compare`.
    regime: the baseline's.
    titles: dict metric -> title of its column.
  """
  held = [(r['label'], r['against'][regime]) for r in rows
          if r['against'].get(regime)]
  stands = intervals.holm({(label, m): found[m] for label, found in held
                           for m in titles if m in found}, LEVEL)
  lines = [[label, str(max(x.n for x in found.values())),
            *[_difference(found.get(m), m, (label, m) in stands)
              for m in titles]] for label, found in held]
  if not lines:
    return ''
  other = next(r['baselines'][regime] for r in rows if regime in r['baselines'])
  return tables.markdown([f'minus {other}', 'pairs', *titles.values()],
                         lines) + '\n'


def _reached(row, least):
  """Return seed -> whether its held-out greedy accuracy is `least` or more."""
  return {s: x >= least for s, x in row['values']['greedy'].items()}


def solved(row, least):
  """Return the `intervals.Interval` of the share of seeds that solve the task.

  Args:
    row: of `compare`.
    least: held-out greedy accuracy, mean of the sets, from which a seed counts.
  """
  seen = _reached(row, least).values()
  return intervals.share(sum(seen), len(seen))


def _solved(rows, least):
  """Return the table of the shares of seeds that solve the task.

  And, where the group has a baseline, the p of each share against its: by
  Fisher, and by McNemar, paired by seed.
  """
  base = next((r for regime in BASELINES for r in rows
               if r['regime'] == regime), None)
  titles = ['variant', f'seeds with greedy {least:g} or more',
            'share, Wilson 95 %']
  if base is not None:
    titles += [f'Fisher\'s p against {base["label"]}',
               'McNemar\'s, paired by seed']
  lines = []
  for row in rows:
    x = solved(row, least)
    line = [row['label'], '', ''] if x is None else [
        row['label'], f'{round(x.mean * x.n)} of {x.n}',
        f'[{x.low:.2f}, {x.high:.2f}]']
    if base is not None:
      other = solved(base, least)
      pair = _reached(row, least), _reached(base, least)
      line += ['', ''] if row is base or not (x and other) else [
          f'{intervals.shares_differ(x, other):.2g}',
          f'{intervals.pairs_differ(*pair):.2g}']
    lines.append(line)
  return tables.markdown(titles, lines) + '\n'


def markdown(rows, title, least=None):
  """Return the tables: for each group the means and the paired differences.

  Where there are several held-out sets the same follows for each of them, and
  where there are several depths for the drafts up to each.

  Args:
    rows: list from `compare`.
    title: first line.
    least: adds the shares of seeds that reach it, see `solved`; None: not.
  """
  shown = [m for m in METRICS if any(m in r['mean'] for r in rows)]
  out = [f'# {title}\n\n'
         'Means over seeds; differences are paired by seed, with 95 % '
         't-intervals, bold where 0 lies outside (by chance that happens to '
         'one interval in 20), with a star where that also holds by Holm for '
         f'all differences of a table together ({LEVEL:.0%}).\n\n']
  parts = {kind: {m: text.format(m.split('/')[1]) for r in rows
                  for m in r['mean'] if m.startswith(kind)} for kind, text in (
                      ('greedy/', 'held-out greedy, {}'),
                      ('drafts/', 'first {} pass'))}
  for group in dict.fromkeys(r['group'] for r in rows):
    mine = [r for r in rows if r['group'] == group]
    out.append(f'## {group}\n\n')
    titles = METRICS | parts['greedy/'] | parts['drafts/']
    for names in filter(None, (shown, *parts.values())):
      out.append(tables.markdown(
          ['variant', 'seeds', *[titles[m] for m in names]],
          [[r['label'], str(len(r['seeds'])), *[
              _number(r['mean'][m].mean, m) if m in r['mean'] else ''
              for m in names]] for r in mine]) + '\n')
      compared = [m for m in (SHOWN if names is shown else names) if m in names]
      if least is not None and names is shown and 'greedy' in names:
        out.append(_solved(mine, least))
      out += [_differences(mine, regime, {m: titles[m] for m in compared})
              for regime in BASELINES]
  return ''.join(out).rstrip('\n') + '\n'
