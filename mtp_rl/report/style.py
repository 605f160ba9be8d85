"""What all figures share: colours, layout, file format."""

import os
import textwrap

import matplotlib
from matplotlib import figure as mpl_figure

matplotlib.rcParams['svg.hashsalt'] = 'mtp_rl'
BLUE, ORANGE, GREEN, GREY = '#2060a8', '#d8702a', '#3a8f5c', '#909090'


def title(config):
  """Return the line above a run's figures: task, regime, seed."""
  return (f'{config.task.name} {config.task.dataset}'.strip() +
          f', regime {config.mtp.regime}, seed {config.seed}')


def new(rows, columns, size, title='', **kw):
  """Return a figure and its axes [rows, columns].

  Args:
    rows, columns: number of rows and columns of axes.
    size: (width, height) of the whole figure in inches.
    title: above it, wrapped to its width.
    **kw: of `Figure.subplots`.
  """
  figure = mpl_figure.Figure(figsize=size, layout='constrained')
  if title:
    figure.suptitle(textwrap.fill(title, int(11 * size[0])), fontsize=10)
  return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def save(figure, directory, name):
  """Write a figure as directory/name.png."""
  figure.savefig(os.path.join(directory, name + '.png'), dpi=110)
