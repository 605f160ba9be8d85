"""What all figures and pages share: colours, lines, layout, file format.

Lines of one figure differ in colour, dash and marker, and the colours in
lightness, so that they can be told apart in grey print.
"""

import os
from typing import NamedTuple

import matplotlib
from matplotlib import figure as mpl_figure
from matplotlib import ticker

matplotlib.rcParams['svg.hashsalt'] = 'mtp_rl'
BLUE, ORANGE, GREEN, GREY = '#1c5fa8', '#d8702a', '#3a8f5c', '#909090'


class Line(NamedTuple):
  """How a series is drawn.

  Attributes:
    colour: as #rrggbb.
    dash: 'solid', 'dashed', 'dotted' or 'dashdot'.
    marker: 'o', 's', '^' or 'D'.
  """
  colour: str
  dash: str
  marker: str


# The same in every figure of every run and comparison.
REGIMES = {
    'rl_only': Line('#8a8a8a', 'dotted', 's'),
    'detach': Line('#111111', 'solid', 'o'),
    'ce': Line('#d0402f', 'dashed', '^'),
    'policy': Line('#e9b04a', 'solid', 'D'),
    'fixed': Line('#5b2a7a', 'dashdot', 's'),
    'occ': Line('#1c5fa8', 'solid', '^'),
    'occ_authors': Line('#4fb9bd', 'dashed', 'o')}
# Series of a run, and variants of a comparison whose regime has come before.
SERIES = (Line('#1c5fa8', 'solid', 'o'), Line('#e08a3c', 'dashed', 's'),
          Line('#5b2a6f', 'dashdot', '^'), Line('#57a878', 'dotted', 'D'),
          Line('#a33a55', 'solid', 's'), Line('#9aa832', 'dashed', 'o'))
_MORE = (Line('#2f7d4f', 'dashed', 'D'), Line('#d0699f', 'dotted', 'o'),
         Line('#6b4a21', 'dashdot', 's'), Line('#8fb4dc', 'solid', 'D'),
         Line('#45526b', 'dotted', '^'), Line('#c9b458', 'dashdot', '^'),
         Line('#174a3b', 'solid', 's'), Line('#e0876a', 'dashed', 's'))


def variants(regimes):
  """Return name -> `Line` of a comparison's variants.

  The first variant of a regime has the regime's line; further ones have lines
  that no regime has.

  Args:
    regimes: dict name -> regime.
  """
  out, used, more = {}, set(), 0
  for name, regime in regimes.items():
    if regime in REGIMES and regime not in used:
      used.add(regime)
      out[name] = REGIMES[regime]
    else:
      out[name] = _MORE[more % len(_MORE)]
      more += 1
  return out


def title(config):
  """Return the line above a run's figures: task, regime, seed."""
  return (f'{config.task.name} {config.task.dataset}'.strip() +
          f', regime {config.mtp.regime}, seed {config.seed}')


def new(rows, columns, size, title='', **kw):
  """Return a figure and its axes [rows, columns].

  Args:
    rows, columns: number of rows and columns of axes.
    size: (width, height) of the whole figure in inches.
    title: above it, in one line, as small as that needs.
    **kw: of `Figure.subplots`.
  """
  figure = mpl_figure.Figure(figsize=size, layout='constrained')
  if title:
    # A letter is about .55 of the font's size wide.
    fits = 72 * size[0] / (.55 * len(title))
    figure.suptitle(title, fontsize=min(10., max(fits, 5.)), parse_math=False)
  return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def whole_steps(axis, count=6):
  """Put the ticks of the x axis on whole numbers."""
  axis.xaxis.set_major_locator(ticker.MaxNLocator(count, integer=True,
                                                  steps=[1, 2, 5, 10]))


def save(figure, directory, name):
  """Write a figure as directory/name.png: the old one stays until then."""
  path = os.path.join(directory, name + '.png')
  figure.savefig(path + '.part', dpi=110, format='png')
  os.replace(path + '.part', path)
