"""Convert weights: Hugging Face folder or GGUF file <-> a run's checkpoints.

    python -m experiments.convert --source=FOLDER_OR_GGUF --workdir=DIR \
        --config=configs/CONFIG.py
    python -m experiments.convert --target=FOLDER --workdir=DIR

The first command writes the checkpoint that a run of this config starts from;
other runs use it with --config.warmup.init=DIR. The second writes the
parameters of a run's latest checkpoint (--phase and --step choose another) as
config.json and *.safetensors, MTP modules included. It also copies the
tokenizer's files if task.tokenizer is a folder (not those inside a GGUF file).
"""

import contextlib
import os
import shutil

from absl import flags

from experiments import launch
from mtp_rl import config as config_lib
from mtp_rl import config_io

_CONFIG = launch.define_config(required=False)
_SOURCE = flags.DEFINE_string('source', None, 'Folder or .gguf file to read.')
_TARGET = flags.DEFINE_string('target', None, 'Folder to write.')
_PHASE = flags.DEFINE_enum('phase', 'rl', ['rl', 'warmup'], 'Phase of the run.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default: the latest.')
# Files of the tokenizer and its template, copied to the target folder.
_WORDS = ('tokenizer.json', 'tokenizer_config.json', 'tokenizer.model',
          'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
          'merges.txt', 'chat_template.jinja', 'generation_config.json')
_ADAPTERS = flags.DEFINE_bool(
    'adapters', False, "Write LoRA adapters alone, in PEFT's format, instead "
    'of weights with the adapters merged.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'],
                           'Dtype of the written tensors; float32 is exact.')


def _read():
  """Write the first checkpoint of a run from published weights."""
  from mtp_rl import trainer
  config = _CONFIG.value
  if config is None:
    raise config_lib.ConfigError('--source needs --config, which sets the '
                                 'model, the task and the tokenizer')
  config.model.pretrained, config.warmup.steps = _SOURCE.value, 0
  trainer.pretrain(config, launch.WORKDIR.value)
  print(f'see {launch.WORKDIR.value}/checkpoints/warmup/0')


def _about(run):
  """Return what config.json says beside the architecture."""
  from mtp_rl.run import workdir
  ends, r = run.task.tokenizer.ends, run.config.rollout
  return dict(
      original=workdir.published_config(run.workdir),
      max_position_embeddings=r.max_prompt + r.max_response,
      eos_token_id=ends.eos[0] if len(ends.eos) == 1 else list(ends.eos),
      pad_token_id=ends.pad)


def _write():
  """Write published weights from a run's checkpoint."""
  import jax

  from mtp_rl import train_step
  from mtp_rl.models import lora, pretrained
  from mtp_rl.run import checkpoint, workdir
  config = config_io.load(os.path.join(launch.WORKDIR.value, 'config.json'))
  config.task.allow_eval = True  # no answer is scored here
  run = workdir.reopen(config, launch.WORKDIR.value)
  where = workdir.existing_checkpoints(run, _PHASE.value)
  model = run.config.model
  about = _about(run)
  if not _ADAPTERS.value:
    pretrained.new_folder(_TARGET.value, model, config.mtp, **about)
  with jax.set_mesh(run.mesh), contextlib.closing(run.task):
    steps = train_step.make(run.config, run.mesh, _PHASE.value)
    saved = checkpoint.Checkpoints(where, config.run.keep)
    params = saved.restore(steps.abstract, _STEP.value, params_only=True)
    if _ADAPTERS.value:
      lora.save(_TARGET.value, params, model, config.mtp)
      print(f'see {_TARGET.value}')
      return
    pretrained.save(_TARGET.value, lora.merged(params, model, config.mtp),
                    model, config.mtp, _DTYPE.value, **about)
  words = os.path.expanduser(config.task.tokenizer)
  for name in _WORDS if os.path.isdir(words) else ():
    if os.path.exists(os.path.join(words, name)):
      shutil.copy(os.path.join(words, name), _TARGET.value)
  print(f'see {_TARGET.value}')


def main():
  """Convert in the direction that the flags name."""
  if (_SOURCE.value is None) == (_TARGET.value is None):
    raise config_lib.ConfigError('give one of --source and --target')
  (_read if _SOURCE.value is not None else _write)()


if __name__ == '__main__':
  launch.run(main)
