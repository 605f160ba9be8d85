"""Bad updates on purpose: NaN in the advantages of one row.

Imported by child processes before they join each other, so it must not touch
JAX's devices.
"""

import numpy as np

from mtp_rl.rollout import experience

collect = experience.collect


def poisoned(batch, value=np.nan):
  """Return a `types.RolloutBatch` whose row 5 has this advantage."""
  spoilt = batch.advantages.copy()
  spoilt[5] = value
  return batch._replace(advantages=spoilt)


def collector(bad_steps):
  """Return `experience.collect` with the rollouts of some steps poisoned."""
  def spoilt(actor, params, reference, step):
    out = collect(actor, params, reference, step)
    return out._replace(batch=poisoned(out.batch)) if step in bad_steps else out
  return spoilt
