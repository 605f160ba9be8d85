"""Eight host devices and one compilation cache for the whole test session."""

import functools
import os
import pathlib
import re

import jax
import jaxlib
import pytest

from mtp_rl import config as config_lib
from mtp_rl import validate
from mtp_rl.run import metrics

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update('jax_platforms', 'cpu')  # also where a GPU's plugin lies
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(
    ROOT / '.pytest_cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
# Compiling dominates: without most optimisations it takes half as long. The
# README's main command runs optimised programs.
jax.config.update('jax_disable_most_optimizations', True)
# And without the CPU's fusion emitters in a third of that. Eight devices on two
# busy cores may meet late in a collective, which XLA would abort after 40 s.
# XLA aborts at flags that it does not know: only the tested release gets these.
if jaxlib.__version__.startswith('0.10.'):
  os.environ['XLA_FLAGS'] = ' '.join([
      os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false',
      '--xla_cpu_collective_call_terminate_timeout_seconds=300'])


def long(*values):
  """Return a parameter set that runs with `-m long` alone."""
  return pytest.param(*values, marks=pytest.mark.long)


def tiny_config(**sections):
  """Return the tests' config; each section's dict overrides its fields."""
  config = config_lib.Config(
      model=config_lib.Model(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2,
                             d_ff=32, qkv_bias=True, qk_norm=True),
      task=config_lib.Task(min_terms=2, max_terms=4, held_out=16),
      rollout=config_lib.Rollout(max_prompt=6, max_response=6),
      rl=config_lib.RL(steps=4, prompts=8, group=4, minibatches=2, lr=1e-3),
      occ=config_lib.OCC(disjoint_parts=2),
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


@functools.cache
def glossary():
  """The pattern of every name in the glossary of experiments/README.md."""
  text = (ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8')
  names = re.findall(r'^\| `([^`]+)` \|', text.split('## Glossary')[1], re.M)
  assert len(names) > 60
  fields = {'<k>': r'\d+', '<step>': r'\d+'}
  known = [''.join(fields.get(x, '[^/]+') if x.startswith('<') else re.escape(x)
                   for x in re.split('(<[a-z]+>)', name)) for name in names]
  return re.compile('|'.join(known))


@pytest.fixture(autouse=True)
def _runs_write_what_the_glossary_explains(monkeypatch):
  """Check the names of every row that a run in this process writes."""
  write = metrics.Writer.write
  def checked(self, step, values):
    row = write(self, step, values)
    unknown = [name for name in row if not glossary().fullmatch(name)]
    assert not unknown, f'not in experiments/README.md: {unknown}'
    return row
  monkeypatch.setattr(metrics.Writer, 'write', checked)
