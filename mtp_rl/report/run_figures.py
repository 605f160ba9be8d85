"""The figures of a run, drawn from its metrics alone."""

import math

from matplotlib import figure as mpl_figure

from mtp_rl.report import series, style

_DASHES = {'solid': '-', 'dashed': '--', 'dotted': ':', 'dashdot': '-.'}
_LETTER = 7.5 * .602 / 72  # inches of a letter in samples.png
_FEW = 40  # points of a curve that are marked one by one


def _panel(axis, rows, curves, title, unit, x='RL step', spacing=1, **limits):
  """Draw curves, a list of (metric, label); mark gaps below."""
  gaps = []
  for i, (name, label) in enumerate(curves):
    steps, values = series.series(rows, name, spacing)
    gaps += [s for s, v in zip(steps, values) if v is None]
    found = [math.nan if v is None else v for v in values]
    if any(map(math.isfinite, found)):
      line = style.SERIES[i % len(style.SERIES)]
      axis.plot(steps, found, _DASHES[line.dash], color=line.colour, lw=1.3,
                label=label, marker=line.marker if len(steps) <= _FEW else None,
                ms=3.2)
  axis.set_title(title, fontsize=10)
  axis.set(xlabel=x, ylabel=unit, **limits)
  axis.grid(alpha=.25)
  style.whole_steps(axis)
  if gaps:
    axis.plot(gaps, [0] * len(gaps), '^', color=style.GREY, ms=4, clip_on=False,
              transform=axis.get_xaxis_transform(),
              label='missing or not finite')
  if len(axis.lines) > 1 or gaps:
    axis.legend(frameon=False, fontsize=8)


def _new(columns, title, height=3.4):
  figure, axes = style.new(1, columns, (4.4 * columns, height), title)
  return figure, axes[0]


def _depths(rows, end):
  return [(n, f'depth {n.split("/")[0][4:]}')
          for n in series.names(rows, 'mtp_', '/' + end)]


def learning(rows, directory, title, warm=()):
  """Draw the warm-up's losses, and reward and held-out accuracy of RL."""
  figure, axes = _new(3 if warm else 2, title)
  if warm:
    _panel(axes[0], warm, [('warmup/loss', 'main head'),
                           *_depths(warm, 'loss')],
           'warm-up: cross-entropy', 'nats a token', 'update', 20)
  left, right = axes[-2:]
  _panel(left, rows, [('reward/mean', 'samples')], 'RL: reward',
         'mean of the rollout', ylim=(0, 1.02))
  _panel(right, rows, [(n, n[4:]) for n in series.names(rows, 'val/')
                       if n.rsplit('/', 1)[1].startswith(('greedy', 'avg@'))],
         'RL: held-out accuracy', 'share of the reward', ylim=(0, 1.02))
  style.save(figure, directory, 'learning')


def coefficient(rows, directory, title):
  """Draw lambda, the c-proxy <delta_RL, delta_MTP>, and their cosine."""
  figure, axes = _new(3, title)
  measured = lambda what: [(n, f'gradients ({e})')
                           for n, e in series.measured(rows, what)
                           if e not in ('logprob', 'authors')]
  _panel(axes[0], rows, [('occ/lambda', 'lambda')], 'coefficient lambda',
         'lambda')
  _panel(axes[1], rows, [('occ/dot', 'log-probs'), *measured('c')],
         'c = <RL, MTP>', 'nats² (log-probs)')
  axes[1].set_yscale('symlog', linthresh=1e-3)
  _panel(axes[2], rows, [('occ/cos', 'log-probs'), *measured('cos')],
         'cosine of RL and MTP', 'cosine', ylim=(-1.05, 1.05))
  for axis in axes:
    axis.axhline(0, color=style.GREY, lw=.6, zorder=0)
  style.save(figure, directory, 'occ')


def acceptance(rows, directory, title):
  """Draw how often each MTP module would be accepted as a drafter."""
  figure, (left, right) = _new(2, title)
  _panel(left, rows, _depths(rows, 'accept_top1'),
         'argmax of the module = of the main head', 'share of tokens',
         ylim=(0, 1.02))
  _panel(right, rows, _depths(rows, 'accept_expected'),
         'expected acceptance, sum min(p, q)', 'share of tokens',
         ylim=(0, 1.02))
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
  cut = lambda text, n: ascii_text(text if len(text) <= n
                                   else text[:n - 3] + '...')
  lines = [('step', 'prompt', 'completion', 'answer', 'reward', 'black')]
  lines += [(str(r['step']), cut(r['prompt'], 52), cut(r['completion'], 34),
             cut(r['answer'], 14), f'{r["reward"]:.2f}',
             style.GREEN if r['reward'] >= 1 else '#b03030') for r in rows]
  # Columns are as wide as their longest text (cut above), the sheet as all.
  widths = [max(len(line[i]) for line in lines) + 3 for i in range(5)]
  wide = max(sum(widths), len(title) * 1.4) * _LETTER + .3
  figure = mpl_figure.Figure(figsize=(wide, .24 * (len(lines) + 2)))
  axis = figure.add_axes((.15 / wide, 0, 1, 1))
  axis.set_axis_off()
  height = 1 / (len(lines) + 2)
  starts = [sum(widths[:i]) * _LETTER / wide for i in range(5)]
  axis.text(0, 1 - height, ascii_text(title), fontsize=10, va='center',
            parse_math=False)
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


def draw_all(rows, sample_rows, directory, title, warm=()):
  """Draw every figure of a run into a directory.

  Args:
    rows: list of rows of metrics.jsonl.
    sample_rows: see `samples`; with [] that figure is left out.
    directory: where the PNG files go.
    title: one line above each figure.
    warm: list of rows of warmup.jsonl.
  """
  learning(rows, directory, title, warm)
  if any('occ/lambda' in r for r in rows):
    coefficient(rows, directory, title)
  if any(n.endswith('accept_top1') for r in rows for n in r):
    acceptance(rows, directory, title)
  if sample_rows:
    samples(sample_rows, directory, title)
