"""The paper's configs: every setting beside the paper's value; full size."""

import dataclasses
import math

import jax
import pytest

from configs import glm_4_5_air_dapo, mimo_7b_dapo, mimo_7b_gspo, smollm2_135m
from mtp_rl import config as config_lib
from mtp_rl import regimes, sharding, train_step, tree, validate
from mtp_rl.models import rope

# No stretched RoPE, no sliding window, no adapters.
PLAIN = {f'model.{f}': getattr(config_lib.Model(), f)
         for f in ('rope_type', *rope.FIELDS[1:], 'window', 'window_layers',
                   'lora_rank')} | {'mtp.lora_rank': 0}
# What every one of the paper's runs has, by its authors' script.
COMMON = PLAIN | {
    'rl.steps': 200, 'rl.prompts': 128, 'rl.group': 16, 'rl.minibatches': 4,
    'rl.lr': 1e-6, 'rl.advantage': 'grpo', 'rl.kl_coef': 0.,
    'rl.entropy_coef': 0., 'rl.overlong_buffer': 4096,
    'rl.overlong_penalty': 1., 'optim.ramp': 10, 'optim.weight_decay': .1,
    'optim.clip': 1., 'optim.clip_mode': 'joint', 'optim.schedule': 'constant',
    'rollout.max_prompt': 2048, 'rollout.max_response': 8192,
    'rollout.top_k': 0, 'rollout.top_p': 1.,
    'rollout.temperature': 1., 'task.name': 'math',
    'task.train': 'dapo_math_17k', 'task.held_out': 1000, 'eval.samples': 32,
    'task.evals': 'aime24,aime25,amc23,math500,minerva_math,olympiadbench',
    'rl.dynamic_sampling': 0, 'rl.tis_cap': 0., 'optim.b1': .9,
    'optim.b2': .999, 'optim.eps': 1e-8, 'mtp.kind': 'sequential',
    'mtp.hidden': 'post_norm', 'mtp.detach_hidden': False,
    'mtp.detach_embedding': False, 'mtp.detach_head': False,
    'mtp.fresh': False, 'occ.solver': 'gram', 'occ.scope': 'all',
    'mtp.modules': 1, 'mtp.regime': 'occ', 'mtp.psi_loss': 'theta',
    'mtp.reference': 'main_old', 'occ.estimator': 'logprob',
    'occ.lambda_plus': 1., 'occ.eps': 1e-8, 'occ.lambda_min': -math.inf,
    'occ.lambda_max': math.inf, 'occ.ema': 0., 'occ.guard': 0.,
    'occ.measure': 0}
DAPO = {'rl.loss': 'ppo', 'rl.clip_low': .2, 'rl.clip_high': .28,
        'rl.dual_clip': 10., 'rl.aggregation': 'token-mean'}
# verl's recipe: the paper's own range is not known to us.
GSPO = {'rl.loss': 'gspo', 'rl.clip_low': 3e-4, 'rl.clip_high': 4e-4,
        'rl.dual_clip': 0., 'rl.aggregation': 'seq-mean-token-mean'}
MIMO = {'model.d_model': 4096, 'model.n_layers': 36, 'model.n_heads': 32,
        'model.n_kv_heads': 8, 'model.head_dim': 128, 'model.d_ff': 11008,
        'model.vocab_size': 151680, 'model.rope_theta': 640000.,
        'model.norm_eps': 1e-5, 'model.qkv_bias': True,
        'model.tie_embeddings': False, 'mtp.concat': 'h_emb',
        'model.rotary': 1., 'model.qk_norm': False, 'model.experts': 0}
GLM = {'model.n_layers': 46, 'model.n_heads': 96, 'model.n_kv_heads': 8,
       'model.experts': 128, 'model.experts_per_token': 8,
       'model.shared_experts': 1, 'model.rotary': .5, 'mtp.concat': 'emb_h',
       'model.d_model': 4096, 'model.head_dim': 128, 'model.d_ff': 10944,
       'model.vocab_size': 151552, 'model.rope_theta': 1e6,
       'model.norm_eps': 1e-5, 'model.qkv_bias': True, 'model.qk_norm': False,
       'model.tie_embeddings': False, 'model.expert_ff': 1408,
       'model.dense_layers': 1, 'model.router_groups': 1,
       'model.router_top_groups': 1, 'model.router_scale': 1.,
       'model.norm_topk': True, 'model.router': 'sigmoid'}
# How it is computed, or not read by these configs: ours to choose.
OURS = {'rl.pack', 'model.dtype', 'model.remat', 'model.attention',
        'model.expert_form', 'optim.mu_dtype', 'rollout.tensor',
        'rollout.expert', 'rollout.slots', 'rollout.draft', 'rollout.verify',
        'rollout.draft_vocab', 'rl.old_logprobs',
        'rollout.draft_rows',
        'model.head_chunk', 'model.pretrained', 'rl.microbatches', 'rl.kl_kind',
        'mtp.coef', 'mtp.psi_coef', 'mtp.theta_loss', 'mtp.unroll',
        'occ.budget', 'occ.target', 'occ.disjoint_parts', 'occ.probe_every',
        'occ.eta', 'mtp.layout', 'mtp.lora_alpha', 'mtp.lora_targets',
        'model.lora_alpha', 'model.lora_targets'}


def _count(leaves):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(leaves))


@pytest.mark.parametrize('module, fields, parameters', [
    (mimo_7b_dapo, MIMO | DAPO, 7_833_409_536),
    (mimo_7b_gspo, MIMO | GSPO, 7_833_409_536),
    (glm_4_5_air_dapo, GLM | DAPO, 109_227_310_848),
])
def test_settings_are_the_papers_at_full_size(module, fields, parameters):
  config = module.get_config()
  validate.validate(config)
  for name, value in (COMMON | fields).items():
    section, field = name.split('.')
    assert getattr(getattr(config, section), field) == value, name
  listed = COMMON.keys() | fields.keys() | OURS
  if not config.model.experts:
    listed |= {n for n in GLM if n.startswith('model.')}
  for section in ('model', 'mtp', 'occ', 'rl', 'optim', 'rollout'):
    for field in dataclasses.asdict(getattr(config, section)):
      assert f'{section}.{field}' in listed, 'a setting without its line'
  mesh = sharding.make_mesh(config.mesh)
  steps = train_step.make(config, mesh)
  assert _count(steps.abstract.params) == parameters
  moments = _count(steps.abstract.opt_state) / parameters
  assert 2 <= moments < 2.001


def test_each_regime_is_a_flag_away():
  for regime in regimes.REGIMES:
    config = mimo_7b_dapo.get_config()
    config.mtp.regime = regime
    validate.validate(config)


def test_smollm2_has_its_parameters_and_a_module():
  config = smollm2_135m.get_config()
  validate.validate(config)
  mesh = sharding.make_mesh(config.mesh)
  params = train_step.make(config, mesh).abstract.params
  assert _count(tree.theta(params)) == 134_515_008
