"""The figures of a run, drawn from its metrics alone."""

import math

from matplotlib import figure as mpl_figure

from mtp_rl.report import style


def _series(rows, name):
  """Return steps and values of a metric; NaN, a gap, where there is none.

  A value is missing where it was not finite, or where the file has no row of a
  step; steps at which the metric is not measured are no gaps.
  """
  x, y, last = [], [], None
  for row in rows:
    if last is not None and row['step'] > last + 1:
      x.append(last + 1)
      y.append(math.nan)
    last = row['step']
    if name in row:
      x.append(last)
      y.append(math.nan if row[name] is None else row[name])
  return x, y


def _panel(axis, rows, curves, title, **limits):
  missing = 0
  for name, label, line in curves:
    x, y = _series(rows, name)
    missing += sum(map(math.isnan, y))
    if any(map(math.isfinite, y)):
      axis.plot(x, y, label=label, **line)
  axis.set(title=title, xlabel='RL step', **limits)
  axis.grid(alpha=.25)
  if missing:
    axis.text(.98, .02, 'gaps: values that are missing or not finite',
              transform=axis.transAxes, ha='right', fontsize=7)
  if axis.lines:
    axis.legend(frameon=False, fontsize=8)


def _new(columns, title, height=3.6):
  figure, axes = style.new(1, columns, (4.6 * columns, height), title)
  return figure, axes[0]


def _measured(rows, what):
  """Return [(metric, label)] of an estimator's value, such as 'c' or 'cos'."""
  names = {n for r in rows for n in r}
  return [(n, f'{n.split("/")[1]} (gradients)') for n in sorted(names)
          if n.startswith('occ/') and n.count('/') == 2
          and n.endswith('/' + what)]


def learning(rows, directory, title):
  """Draw reward and held-out accuracy against the RL step."""
  figure, (left, right) = _new(2, title)
  _panel(left, rows, [('reward/mean', 'samples', dict(color=style.BLUE, lw=1))],
         'mean reward of the rollouts', ylim=(0, 1.02))
  names = sorted({n for r in rows for n in r if n.startswith('val/') and
                  n.rsplit('/', 1)[1].startswith(('greedy', 'avg@'))})
  colours = (style.BLUE, style.ORANGE, style.GREEN, style.GREY)
  curves = [(n, n[4:], dict(color=colours[i % 4], marker='o', ms=3, lw=1.2))
            for i, n in enumerate(names)]
  _panel(right, rows, curves, 'held-out accuracy', ylim=(0, 1.02))
  style.save(figure, directory, 'learning')


def coefficient(rows, directory, title):
  """Draw lambda, the c-proxy <delta_RL, delta_MTP>, and their cosine."""
  figure, axes = _new(3, title)
  line = lambda colour: dict(color=colour, lw=1)
  measured = lambda what: [
      (name, label, line(style.GREEN)) for name, label in _measured(rows, what)
      if not name.startswith(('occ/logprob/', 'occ/authors/'))]
  _panel(axes[0], rows, [('occ/lambda', 'lambda', line(style.BLUE))],
         'coefficient lambda')
  _panel(axes[1], rows, [('occ/dot', 'log-prob proxy', line(style.ORANGE)),
                         *measured('c')], 'c = <RL, MTP>')
  axes[1].set_yscale('symlog', linthresh=1e-3)
  _panel(axes[2], rows, [('occ/cos', 'log-prob proxy', line(style.ORANGE)),
                         *measured('cos')], 'cosine of RL and MTP',
         ylim=(-1.05, 1.05))
  for axis in axes:
    axis.axhline(0, color=style.GREY, lw=.6, zorder=0)
  style.save(figure, directory, 'occ')


def acceptance(rows, directory, title):
  """Draw how often each MTP module would be accepted as a drafter."""
  figure, (left, right) = _new(2, title)
  depths = sorted({n.split('/')[0] for r in rows for n in r
                   if n.startswith('mtp_') and n.endswith('accept_top1')})
  colours = (style.BLUE, style.ORANGE, style.GREEN, style.GREY)
  pick = lambda kind: [
      (f'{d}/{kind}', f'depth {d[4:]}', dict(color=colours[i % 4], lw=1.2))
      for i, d in enumerate(depths)]
  _panel(left, rows, pick('accept_top1'), 'argmax of module = of main head',
         ylim=(0, 1.02))
  _panel(right, rows, pick('accept_expected'),
         'expected acceptance, sum min(p, q)', ylim=(0, 1.02))
  style.save(figure, directory, 'acceptance')


def samples(rows, directory, title, limit=18):
  """Draw sampled completions as text, with their rewards.

  Args:
    rows: dicts with 'step', 'prompt', 'completion', 'answer', 'reward'.
    directory: where samples.png goes.
    title: of the sheet.
    limit: most rows shown, evenly spread over the run.
  """
  count = min(limit, len(rows))
  rows = [rows[round(i * (len(rows) - 1) / max(count - 1, 1))]
          for i in range(count)]
  figure = mpl_figure.Figure(figsize=(10, .34 * (len(rows) + 3)))
  axis = figure.add_axes((0.02, 0, .96, 1))
  axis.set_axis_off()
  cut = lambda text, n: ascii_text(text if len(text) <= n
                                   else text[:n - 3] + '...')
  lines = [('step', 'prompt', 'completion', 'answer', 'reward', 'black')]
  lines += [(str(r['step']), cut(r['prompt'], 52), cut(r['completion'], 34),
             cut(r['answer'], 14), f'{r["reward"]:.2f}',
             style.GREEN if r['reward'] >= 1 else '#b03030') for r in rows]
  height = 1 / (len(lines) + 2)
  # Columns are as wide as their longest text (cut above).
  widths = [max(len(line[i]) for line in lines) + 3 for i in range(5)]
  starts = [sum(widths[:i]) * .0088 for i in range(5)]
  axis.text(0, 1 - height, ascii_text(title), fontsize=10, va='center')
  for i, line in enumerate(lines):
    for x, text in zip(starts, line[:5]):
      axis.text(x, 1 - (i + 2) * height, text, family='monospace', fontsize=7.5,
                color=line[5], va='center', parse_math=False,
                weight='bold' if i == 0 else 'normal')
  style.save(figure, directory, 'samples')


def ascii_text(text):
  """Return text with everything but printable ASCII escaped."""
  return ''.join(c if ' ' <= c <= '~' else c.encode(
      'unicode_escape').decode() for c in text)


def draw_all(rows, sample_rows, directory, title):
  """Draw every figure of a run into a directory.

  Args:
    rows: list of rows of metrics.jsonl.
    sample_rows: see `samples`; with [] that figure is left out.
    directory: where the PNG files go.
    title: one line above each figure.
  """
  learning(rows, directory, title)
  if any('occ/lambda' in r for r in rows):
    coefficient(rows, directory, title)
  if any(n.endswith('accept_top1') for r in rows for n in r):
    acceptance(rows, directory, title)
  if sample_rows:
    samples(sample_rows, directory, title)
