"""The picture of lambda on one page: two gradients, and the parabola of a gain.

    python -m mtp_rl.report.parabola experiments/results/lambda

Two parameters, an objective of curvature L in every direction: there the lower
bound of `occ.decomposition` is what a step gains.
"""

import sys

import numpy as np

from mtp_rl import occ
from mtp_rl.report import style

# ruff: noqa: RUF001 (the signs of mtp_rl/README.md)

ETA, L = .1, 4.
G_RL, G_MTP = np.array([1., .5]), np.array([.9, -.2])
RHO = 1.  # of `occ.guard`


def numbers():
  """Return what the picture shows, as a dict of floats.

  c, v2 (of G_RL and G_MTP), slope (of Delta at 0), star (lambda*), gain
  (Delta at lambda*), guard (the largest |lambda| that rho leaves).
  """
  c, v2 = float(G_RL @ G_MTP), float(G_MTP @ G_MTP)
  star = occ.lambda_plus(ETA, L) * c / v2
  return {'c': c, 'v2': v2, 'slope': ETA * (1 - L * ETA) * c, 'star': star,
          'gain': occ.best_gain(c, v2, L, ETA),
          'guard': RHO * float(np.linalg.norm(G_RL) / np.sqrt(v2))}


def _arrow(axis, end, colour, text, place, start=(0., 0.), **kw):
  axis.annotate('', end, start, arrowprops=dict(
      arrowstyle='-|>', color=colour, lw=2, shrinkA=0, shrinkB=0, **kw))
  axis.text(*place, text, color=colour, fontsize=10, ha='center')


def _gradients(axis, n):
  """Draw g_RL, g_MTP, the shadow that c is made of, and the step of both."""
  shadow = n['c'] / (G_RL @ G_RL) * G_RL
  axis.plot(*zip(G_MTP, shadow), ':', color=style.GREY, lw=1.4)
  axis.plot(*zip((0, 0), shadow), color=style.GREEN, lw=7, alpha=.35,
            solid_capstyle='butt')
  both = G_RL + .6 * G_MTP
  _arrow(axis, both, '#111111', 'g_RL + λ g_MTP,\nhere with λ = .6', (1.4, .1))
  _arrow(axis, both, style.ORANGE, '', (0, 0), G_RL, ls='--', alpha=.6)
  _arrow(axis, G_RL, style.BLUE, 'g_RL: where the\nreward grows', (1.2, .57))
  _arrow(axis, G_MTP, style.ORANGE, 'g_MTP: where the modules\'\nloss falls;'
         f' v² = its length² = {n["v2"]:.2f}', (.76, -.46))
  axis.text(.04, .09, 'shadow of g_MTP on g_RL', color=style.GREEN,
            fontsize=9, rotation=26.6, rotation_mode='anchor',
            transform_rotates_text=True)
  axis.text(-.08, .95, f'c = shadow × length of g_RL = {n["c"]:.2f}\n'
            'c > 0: they agree; c < 0: they oppose', fontsize=9.5, va='top')
  axis.set(xlim=(-.12, 1.72), ylim=(-.55, 1.), aspect='equal', xticks=[],
           yticks=[], title='c and v² come from two gradients over θ')


def _curve(axis, n):
  """Draw Delta(lambda), its slope at 0, its top and where it pays."""
  star, top = n['star'], n['gain']
  delta = lambda lam, c=n['c']: occ.decomposition(lam, c, n['v2'], ETA, L)
  low, high = (float(x) for x in occ.helpful_interval(star))
  axis.axvspan(low, high, color=style.GREEN, alpha=.13, lw=0)
  axis.text(star, .003, f'MTP helps:\n0 to 2λ* = {high:.2f}',
            color=style.GREEN, ha='center', fontsize=9.5)
  grid = np.linspace(-.45, 3.27, 400)
  axis.plot(grid, delta(grid), color=style.BLUE, lw=2.2)
  grid = np.linspace(-1.6, .45, 200)
  axis.plot(grid, delta(grid, -n['c']), ':', color=style.GREY, lw=1.6)
  axis.text(-1.5, .007, 'c < 0: the top\nlies left of 0', color='#666666',
            fontsize=9)
  x = np.array([0., .85])
  axis.plot(x, n['slope'] * x, '--', color=style.ORANGE, lw=1.8)
  axis.text(-.08, .043, 'at 0 it rises by\nη (1 − Lη) c', color=style.ORANGE,
            fontsize=9.5, ha='right')
  axis.plot(star, top, 'o', color='#111111', ms=6)
  axis.text(1.0, top + .004, f'the top: λ* = λ₊ c / v² = {star:.2f}',
            fontsize=10)
  axis.text(2.9, .02, 'it bends down by\nL η² v²: a long\nstep overshoots',
            color=style.BLUE, fontsize=9.5)
  y, violet = -.029, '#5b2a7a'
  axis.plot([-n['guard'], n['guard']], [y, y], '|-', color=violet, lw=2, ms=12)
  axis.text(-1.5, y - .005, 'the guard allows |λ| up to ρ ‖g_RL‖ / ‖g_MTP‖ = '
            f'{n["guard"]:.2f} (ρ = 1)', color=violet, fontsize=9.5, va='top')
  axis.axhline(0, color=style.GREY, lw=.8, zorder=0)
  axis.axvline(0, color=style.GREY, lw=.8, zorder=0)
  axis.set(xlim=(-1.6, 4.4), ylim=(-.043, .056), xlabel='λ',
           ylabel='Δ(λ): what MTP adds to the gain of J',
           title='what MTP adds to a step is a parabola in λ')
  axis.spines[['top', 'right']].set_visible(False)


def draw(directory, name='parabola'):
  """Draw the picture into directory/name.png."""
  figure, ((left, right),) = style.new(1, 2, (10.6, 4.3), width_ratios=(1, 1.2))
  found = numbers()
  _gradients(left, found)
  _curve(right, found)
  style.save(figure, directory, name)


if __name__ == '__main__':
  draw(sys.argv[1])
