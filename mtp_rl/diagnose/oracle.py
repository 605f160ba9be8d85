"""The lambda with the highest J on held-out rollouts, by line search.

A yardstick for the estimators: it reads rollouts that the update does not see.
"""

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib


def vertex(grid, values):
  """Return where a function sampled on a grid is largest, float [].

  This is the vertex of the parabola through the best point and its two
  neighbours (at an end: the three outermost points), clipped to the grid.

  Args:
    grid: [n], evenly spaced, ascending, n >= 3.
    values: [n].
  """
  step = grid[1] - grid[0]
  i = jnp.clip(jnp.argmax(values), 1, grid.shape[0] - 2)
  low, middle, high = values[i - 1], values[i], values[i + 1]
  bend = low - 2 * middle + high
  inner = grid[i] + step * (low - high) / 2 / jnp.where(bend < 0, bend, 1.)
  best = jnp.where(bend < 0, inner, grid[jnp.argmax(values)])
  return jnp.clip(best, grid[0], grid[-1])


def line_search(ahead, modules, config: config_lib.OCC, points=21, sweeps=40):
  """Return the best lambda between its bounds, which must be finite, [K].

  The search tries `points` lambdas and takes the vertex of the parabola through
  the best one and its neighbours. For K > 1 it searches one coordinate after
  another, `sweeps` times over.

  Args:
    ahead: function lambda [K] -> J of held-out rollouts after the update with
      that lambda.
    modules: K.
    config: `config.OCC`, of which lambda_min and lambda_max are read.
    points, sweeps: see above.
  """
  grid = jnp.linspace(config.lambda_min, config.lambda_max, points)

  def search(n, lam):
    at = lambda x: ahead(lam.at[n % modules].set(x))
    return lam.at[n % modules].set(vertex(grid, jax.lax.map(at, grid)))

  rounds = modules * sweeps if modules > 1 else 1
  return jax.lax.fori_loop(0, rounds, search,
                           jnp.zeros((modules,), grid.dtype))
