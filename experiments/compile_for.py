r"""Compile a config's real programs for TPUs or GPUs that are not at hand.

    pip install -e '.[tpu]'
    python -m experiments.compile_for --config=configs/mimo_7b_dapo.py \
        --topology=v5p:4x4x4 --config.mesh.fsdp=64 --workdir=DIR

With the extra `gpu-aot` the topology may be GPUs, partitions x hosts x GPUs of
a host, as in h100:1x8x8. Prints what each program needs of one chip and writes
DIR/compile_for.json; exits with 1 if one does not fit. Programs are the update
of a regime (`rl_only`, `detach`, `ce`, `policy`, `occ`, or `occ:exact` for
another estimator), `score` (log-probs of a minibatch of samples), the sampler's
`prefill`, `decode`, `window` (with --config.rollout.slots) and whole `rollout`,
and `reshard`, which moves the parameters to the sampler's layout (with
--config.rollout.tensor). The part of the run's state that stays on the chip
during a program counts as well.
"""

import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is run; JAX must read it first

from absl import flags

from experiments import launch

CONFIG = launch.define_config()
TOPOLOGY = flags.DEFINE_string('topology', 'v5p:4x4x4', 'What to compile for.')
PROGRAMS = flags.DEFINE_list(
    'programs', ['rl_only', 'detach', 'policy', 'occ', 'score', 'prefill',
                 'decode'],
    'Programs to compile.')


def main():
  """Compile, print the table, write the JSON."""
  from mtp_rl.aot import programs, targets
  from mtp_rl.run import checkpoint, metrics
  checkpoint.prepare_workdir(launch.WORKDIR.value)
  path = os.path.join(launch.WORKDIR.value, 'compile_for.json')
  target, rows = targets.chip(TOPOLOGY.value), []
  for row in programs.compile_all(CONFIG.value, TOPOLOGY.value, PROGRAMS.value):
    rows.append(row)
    print(programs.describe(row, target), flush=True)
    metrics.write_json(path, [programs.to_dict(row, target) for row in rows])
  print()
  print(programs.table(rows, CONFIG.value, TOPOLOGY.value))
  if not all(programs.fits(row, target) for row in rows):
    sys.exit(1)


if __name__ == '__main__':
  launch.run(main)
