"""Sampling from another layout of the parameters samples the same."""

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import sharding, tokenizers, train_step
from mtp_rl.rollout import layout, sampler
from tests import conftest

V, P, G = 14, 8, 2
MOE = dict(experts=4, experts_per_token=2, expert_ff=16, shared_experts=1)


def _sample(config):
  """Completions of fixed prompts, and the placed parameters."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    params = steps.init(jax.random.key(0)).params
    placed = layout.make_place(steps.abstract.params, config, mesh)(params)
    generate = sampler.make_generate(
        config, mesh, steps.abstract.params,
        tokenizers.CharTokenizer('0123456789').ends, G)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, V, (P, config.rollout.max_prompt))
    drawn = generate(placed, prompts.astype(np.int32), prompts > 0,
                     jax.random.key(1))
  return drawn[:2], placed


@pytest.mark.parametrize('model, mesh, rollout', [
    ({}, dict(fsdp=8), dict(tensor=2)),
    conftest.long(dict(dtype='bfloat16'), dict(data=2, fsdp=4),
                  dict(tensor=2)),
    (MOE, dict(fsdp=4, expert=2), dict(expert=4, tensor=2))])
def test_another_layout_samples_the_same(model, mesh, rollout):
  sections = dict(model=dict(vocab_size=V) | model,
                  rl=dict(prompts=P, group=4), mesh=mesh)
  (want, logp), _ = _sample(conftest.tiny_config(**sections))
  (got, logp_), placed = _sample(conftest.tiny_config(
      rollout=rollout, **sections))
  np.testing.assert_array_equal(got.tokens, want.tokens)
  rough = 1e-5 if not model.get('dtype') else 2e-2
  np.testing.assert_allclose(logp_, logp, rtol=rough, atol=rough)
  kernel = placed['blocks']['layers']['attention']['query']['kernel']
  assert kernel.sharding.mesh.shape['tensor'] == 2
  assert kernel.dtype == model.get('dtype', 'float32')
  scale = placed['final_norm']['scale']
  assert scale.dtype == np.float32


def test_without_it_nothing_moves():
  config = conftest.tiny_config()
  params = {'a': 1}
  mesh = sharding.make_mesh(config.mesh)
  assert layout.make_place(params, config, mesh)(params) is params


def test_a_layout_that_does_not_fit_is_refused():
  for rollout, mesh in ((dict(tensor=3), dict(fsdp=8)),
                        (dict(tensor=2), {})):
    with pytest.raises(config_lib.ConfigError, match='rollout.tensor'):
      conftest.tiny_config(rollout=rollout, mesh=mesh)
