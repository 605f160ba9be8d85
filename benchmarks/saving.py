r"""What checksums cost: seconds of a save, of reading, at SmolLM2-135M's size.

    python -m benchmarks.saving --rounds=7

Saves a state of random numbers (parameters and both moments of Adam) under
`--folder`, on the disk that it lies on.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from configs import smollm2_135m
from mtp_rl import config as config_lib
from mtp_rl import sharding, train_step
from mtp_rl.run import checkpoint, checksums


def state(layers):
  """Return the abstract and a random state at SmolLM2-135M's shape."""
  config = smollm2_135m.get_config()
  config.model.pretrained = ''
  config.model.n_layers = layers or config.model.n_layers
  mesh = sharding.make_mesh(config.mesh)
  abstract = train_step.make(
      config_lib.with_vocabulary(config, 49152), mesh).abstract
  rng = np.random.default_rng(0)
  def draw(x):
    values = rng.standard_normal(x.shape, np.float32) * .02
    return jax.device_put(values.astype(x.dtype), x.sharding)
  return abstract, jax.tree.map(draw, abstract)


def main():
  """Time saves and reads; print seconds and shares."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--layers', type=int, default=0, help='0: all')
  parser.add_argument('--folder', help='default: temporary')
  args = parser.parse_args()
  abstract, values = state(args.layers)
  size = sum(x.nbytes for x in jax.tree.leaves(values))
  seconds = {name: [] for name in ('save', 'without', 'restore', 'damage')}

  def timed(name, action, *given, **kw):
    began = time.perf_counter()
    out = action(*given, **kw)
    seconds[name].append(time.perf_counter() - began)
    return out

  early, write, damage = checksums.Early, checksums.write, checksums.damage
  checksums.damage = lambda folder: timed('damage', damage, folder)
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    save = lambda name, step: timed(
        name, checkpoint.Checkpoints(folder, keep=1).save, step, values)
    for step in range(args.rounds + 1):
      checksums.Early = lambda folder: open(os.devnull)
      checksums.write = lambda folder, early: None
      save('without', 2 * step)
      checksums.Early, checksums.write = early, write
      save('save', 2 * step + 1)
      timed('restore', checkpoint.Checkpoints(folder, keep=1).restore, abstract)
  median = {k: statistics.median(v[1:]) for k, v in seconds.items()}
  quartiles = lambda ratios: np.quantile(ratios, (.25, .5, .75)).tolist()
  both = zip(seconds['save'][1:], seconds['without'][1:])
  print(json.dumps({
      'cores': len(os.sched_getaffinity(0)), 'state_gb': size / 1e9,
      'save_s': median['save'], 'without_s': median['without'],
      'save_over_without': quartiles([a / b for a, b in both]),
      'restore_s': median['restore'], 'compare_s': median['damage']},
      indent=1))


if __name__ == '__main__':
  main()
