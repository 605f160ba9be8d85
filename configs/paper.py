r"""The paper's training settings, for its two models (DAPO and GSPO).

    python -m experiments.train --workdir=DIR \
        --config=configs/mimo_7b_dapo.py --config.mtp.regime=occ \
        --config.model.pretrained=FOLDER --config.task.tokenizer=FOLDER \
        --config.task.data_dir=DATA --config.mesh.fsdp=DEVICES

The regime is a flag: rl_only, detach, ce, policy, occ, occ_authors. Settings
are those of the authors' script (Wang et al., arXiv 2605.28184): 200 steps on
DAPO-Math-17k, 128 prompts x 16 rollouts, 4 updates a step, 2k + 8k tokens. The
paper does not give its GSPO clip range; ours is that of verl's recipe. Groups
without variance are not drawn again (--config.rl.dynamic_sampling=10 would).
Microbatches, evaluation batches and the mesh are our choice; set them for the
machine. None of these configs was run.
"""

import dataclasses

from mtp_rl import config as config_lib
from mtp_rl.models import presets


def training(model, objective):
  """Return the config of a named model with an objective.

  Args:
    model: a name of `presets.NAMES` whose weights have MTP modules.
    objective: 'dapo' or 'gspo'.
  """
  config = config_lib.Config()
  config.model, mtp = presets.model(model)
  config.model.dtype, config.model.head_chunk = 'bfloat16', 128
  config.model.remat = 'block'
  config.mtp = dataclasses.replace(config.mtp, **mtp)
  config.rl = config_lib.RL(
      steps=200, prompts=128, group=16, minibatches=4, lr=1e-6,
      overlong_buffer=4096, overlong_penalty=1.)
  config.optim = config_lib.Optim(b2=.999, weight_decay=.1, clip=1., ramp=10)
  config.rollout = config_lib.Rollout(max_prompt=2048, max_response=8192)
  config.task = config_lib.Task(name='math', train='dapo_math_17k',
                                held_out=1000)  # each set in full
  config.eval = config_lib.Eval(every=20, samples=32, batch=64)
  config.run = config_lib.Run(checkpoint_every=10)
  return config_lib.preset(config, f'{objective},paper')
