"""Eight host devices and one compilation cache for the whole test session."""

import pathlib

import jax
import pytest

from mtp_rl import config as config_lib
from mtp_rl import validate

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(
    pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
# Compiling dominates: without most optimisations it takes half as long. The
# launchers' tests and the README's main command run optimised programs.
jax.config.update('jax_disable_most_optimizations', True)


def tiny_config(**sections):
  """Return the tests' config; each section's dict overrides its fields."""
  config = config_lib.Config(
      model=config_lib.Model(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2,
                             d_ff=32, qkv_bias=True, qk_norm=True),
      task=config_lib.Task(min_terms=2, max_terms=4, held_out=16),
      rollout=config_lib.Rollout(max_prompt=6, max_response=6),
      rl=config_lib.RL(steps=4, prompts=8, group=4, minibatches=2, lr=1e-3),
      occ=config_lib.OCC(pieces=2),
      optim=config_lib.Optim(eps=1e-3),
      warmup=config_lib.Warmup(steps=4, batch=8),
      eval=config_lib.Eval(every=2, samples=2),
      run=config_lib.Run(checkpoint_every=2, progress=False))
  for section, values in sections.items():
    if not isinstance(values, dict):
      setattr(config, section, values)
      continue
    for name, value in values.items():
      assert hasattr(getattr(config, section), name), (section, name)
      setattr(getattr(config, section), name, value)
  validate.validate(config)
  return config


@pytest.fixture(name='tiny')
def _tiny():
  return tiny_config
