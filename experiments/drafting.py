r"""Compare ways to train the MTP modules of a fixed policy as drafters.

    python -m experiments.drafting --config=configs/quickstart.py \
        --workdir=DIR --variants='ce;kl;tv;hybrid;tv_e2e' --seeds=5 \
        --config.mtp.modules=3

The config's warm-up makes one policy a seed (warmup.train=mtp: its pretrained
weights are the policy); each variant then trains new modules on the policy's
own samples. The name of a loss is a variant; others are written as for
experiments.compare, 'name:section.field=value,...'. The same command resumes
after the last variant that was measured.
"""

import os

import jax
from absl import flags

from experiments import launch

CONFIG = launch.define_config()
_VARIANTS = flags.DEFINE_string('variants', 'ce;kl;tv;hybrid;tv_e2e',
                                'Losses, or name:section.field=value,...;')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)
_AT = flags.DEFINE_list('at', ['400'], 'Measure after so many updates.')
_BATCHES = flags.DEFINE_integer(
    'batches', 8, 'Batches of fresh samples to measure on.', lower_bound=1)
_FRESH = flags.DEFINE_bool('fresh', True, 'Start with new modules; if not, '
                           'with those of the warm-up.')

flags.register_validator(
    'at', lambda texts: texts and all(t.isdigit() and int(t) for t in texts),
    '--at takes whole numbers, like 100,400')


def main():
  """Train, measure, and print the tables."""
  from mtp_rl.compare import drafting  # late, so that typos fail fast
  jax.config.update('jax_compilation_cache_dir', os.path.abspath(
      os.path.join(launch.WORKDIR.value, 'cache')))
  base = CONFIG.value
  study = drafting.plan(base, _VARIANTS.value,
                        [base.seed + i for i in range(_SEEDS.value)],
                        sorted(map(int, _AT.value)), _BATCHES.value,
                        launch.WORKDIR.value, _FRESH.value)
  rows = drafting.run(study, lambda text: print(text, flush=True))
  print(drafting.write_report(study, rows))


if __name__ == '__main__':
  launch.run(main)
