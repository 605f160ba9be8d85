"""Rejects settings that cannot work, before anything is computed."""

import dataclasses
import math

from mtp_rl import config as config_lib
from mtp_rl import config_io, estimators, regimes, sharding, tasks
from mtp_rl.models import rope, settings
from mtp_rl.objectives import acceptance, masked
from mtp_rl.rollout import layout
from mtp_rl.run import loggers

# Projections of a block that can have a LoRA adapter.
TARGETS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
CHOICES = {
    'model.remat': ('none', 'dots', 'attention', 'block'),
    'optim.mu_dtype': ('float32', 'bfloat16'),
    'model.expert_form': ('auto', 'ragged', 'blocks'),
    'model.attention': ('auto', 'plain', 'blocks', 'splash', 'cudnn'),
    'model.dtype': ('float32', 'bfloat16'),
    'model.rope_type': rope.TYPES,
    'model.router': ('sigmoid', 'softmax'),
    'mtp.layout': ('', 'mimo', 'deepseek'),
    'mtp.regime': tuple(regimes.REGIMES),
    'mtp.reference': ('main_old', 'mtp_old'),
    'mtp.psi_loss': ('ce', 'policy', 'theta', *acceptance.LOSSES),
    'mtp.theta_loss': ('ce', 'policy', *acceptance.LOSSES),
    'mtp.kind': ('sequential', 'parallel'),
    'mtp.concat': ('h_emb', 'emb_h'),
    'mtp.hidden': ('post_norm', 'pre_norm'),
    'occ.estimator': tuple(estimators.ESTIMATORS),
    'occ.solver': ('gram', 'per_module'),
    'occ.scope': ('all', 'trunk', 'readout'),
    'rl.advantage': ('grpo', 'dr_grpo', 'rloo'),
    'rl.loss': ('ppo', 'gspo', 'cispo'),
    'rl.aggregation': masked.AGGREGATIONS,
    'rl.kl_kind': ('k1', 'k2', 'k3'),
    'rl.old_logprobs': ('scored', 'rollout'),
    'warmup.train': ('all', 'mtp'),
    'warmup.mtp_loss': ('ce', *acceptance.LOSSES),
    'rollout.verify': ('coupled', 'rejection'),
    'warmup.data': ('solutions', 'samples'),
    'optim.clip_mode': ('separate', 'joint'),
    'optim.schedule': ('constant', 'cosine', 'linear'),
    'task.name': tasks.MODULES,  # read late: a notebook may add its own
    'task.template': ('chat', 'plain'),
}

_POSITIVE = {
    'model': ('d_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_ff',
              'lora_alpha', 'rope_theta', 'rope_factor', 'rope_low',
              'rope_high', 'rope_gain', 'norm_eps'),
    'rl': ('prompts', 'group', 'minibatches', 'microbatches', 'lr'),
    'warmup': ('batch', 'lr', 'pool', 'pool_steps'),
    'rollout': ('max_prompt', 'max_response'),
    'mtp': ('unroll', 'lora_alpha'),
    'occ': ('probe_every', 'disjoint_parts'),
    'eval': ('every', 'samples', 'batch'),
    'mesh': ('data', 'fsdp', 'tensor', 'expert'),
    'run': ('checkpoint_every', 'keep', 'max_skipped', 'hang_minutes'),
    'task': ('held_out', 'timeout_s', 'processes', 'largest'),
}
_NOT_NEGATIVE = {
    'model': ('head_dim', 'head_chunk', 'vocab_size', 'experts',
              'shared_experts', 'dense_layers', 'rope_context', 'window',
              'lora_rank'),
    'mtp': ('lora_rank', 'modules', 'coef', 'psi_coef'),
    'occ': ('guard', 'measure'),
    'rl': ('steps', 'clip_low', 'clip_high', 'dual_clip', 'kl_coef',
           'tis_cap', 'dynamic_sampling', 'overlong_buffer',
           'overlong_penalty'),
    'optim': ('weight_decay', 'clip', 'ramp'),
    'warmup': ('steps', 'mtp_coef'),
    'rollout': ('temperature', 'top_k', 'tensor', 'expert', 'draft',
                'draft_rows', 'draft_vocab', 'slots'),
    'task': ('noisy_facts', 'noise'),
}


_need = settings.need

# Estimators with a rule of their own for several modules.
_OWN_SOLVER = ('authors', 'affordable', 'curvature', 'gac', 'pcr')

# Values that have another name today.
_RENAMED_VALUES = {
    ('mtp.psi_loss', 'joint'): 'theta', ('occ.solver', 'joint'): 'gram',
    ('occ.solver', 'per_head'): 'per_module'}


def _need_fields(config, default, prefix=''):
  """Refuse what a config file set that is no field, or is of another type."""
  for name, value in vars(config).items():
    path = prefix + name
    config_io.refuse_renamed(path)
    _need(name in vars(default), f'config field {path} does not exist; '
          'mtp_rl/config.py lists them')
    ours = getattr(default, name)
    kind = type(ours)
    # A whole number may stand for a float, but True is no number here.
    _need(isinstance(value, (int, float) if kind is float else kind)
          and isinstance(value, bool) == (kind is bool),
          f'{path}={value!r} must be of type {kind.__name__}')
    if dataclasses.is_dataclass(ours):
      _need_fields(value, ours, f'{path}.')


def _need_signs(config: config_lib.Config, table, holds, message):
  for section, fields in table.items():
    for field in fields:
      value = getattr(getattr(config, section), field)
      _need(holds(value), f'{section}.{field}={value} {message}')


def _need_finite(config: config_lib.Config):
  """Refuse NaN anywhere, and infinities but as a bound of lambda."""
  for section, fields in vars(config).items():
    for name, value in (vars(fields).items()
                        if dataclasses.is_dataclass(fields) else ()):
      bound = section == 'occ' and name in ('lambda_min', 'lambda_max')
      _need(not isinstance(value, float) or math.isfinite(value)
            or (bound and not math.isnan(value)),
            f'{section}.{name}={value} must be a finite number')


def _validate_mtp(config: config_lib.Config):
  m, o = config.mtp, config.occ
  _need(m.regime == 'rl_only' or m.modules >= 1,
        f'mtp.regime={m.regime} needs an MTP module, but mtp.modules=0; set '
        'mtp.modules=1 or mtp.regime=rl_only')
  drafts = config.rollout.draft
  _need(m.modules or not drafts,
        f'rollout.draft={drafts} drafts with the MTP modules, but '
        'mtp.modules=0; set mtp.modules=1 or rollout.draft=0')
  _need(m.unroll == 1 or m.modules == 1,
        f'mtp.unroll={m.unroll} applies one module again and again, but '
        f'mtp.modules={m.modules}; set mtp.modules=1 or mtp.unroll=1')
  _need(m.unroll == 1 or m.kind == 'sequential',
        f'mtp.unroll={m.unroll} feeds a module its own states, but a parallel '
        'one reads the trunk alone; set mtp.kind=sequential or mtp.unroll=1')
  _need(m.regime != 'occ_authors' or config_lib.depths(m) == 1,
        'mtp.regime=occ_authors is defined for one depth, but mtp.modules='
        f'{m.modules} and mtp.unroll={m.unroll}; set both to 1, or '
        'mtp.regime=occ')
  columns = config.rollout.max_prompt + config.rollout.max_response
  _need(columns > config_lib.depths(m), 'the deepest of '
        f'{config_lib.depths(m)} MTP modules predicts nothing in rows of '
        f'{columns} tokens; raise rollout.max_prompt or rollout.max_response')
  _need(m.theta_loss == 'policy' or m.regime in ('fixed', 'occ'),
        f'mtp.theta_loss={m.theta_loss} is read by the regimes fixed and occ, '
        f'but mtp.regime={m.regime}; set mtp.regime=fixed, or leave '
        'mtp.theta_loss=policy')
  through = [not m.detach_hidden,  # the ways of the MTP loss into theta
             m.kind == 'sequential' and not m.detach_embedding
             and not config.model.lora_rank,
             not m.detach_head and not config.model.lora_rank]
  _need(m.regime in ('rl_only', 'detach') or any(through),
        f'mtp.regime={m.regime} trains theta by MTP, but mtp.detach_* leave '
        'the MTP loss no way to what is trained of theta; set '
        'mtp.regime=detach, or one of them to false')
  _need(m.regime == 'occ' or o.estimator == 'logprob',
        f'occ.estimator={o.estimator} is read by mtp.regime=occ only, but '
        f'mtp.regime={m.regime}; set one of the two')
  _need(m.psi_loss != 'policy' or m.regime not in ('rl_only', 'detach', 'ce'),
        f'mtp.regime={m.regime} trains the MTP modules by cross-entropy; set '
        'mtp.psi_loss=ce')
  _need(o.lambda_min <= o.lambda_max,
        f'occ.lambda_min={o.lambda_min} exceeds occ.lambda_max={o.lambda_max}')
  _need(o.eps > 0, f'occ.eps={o.eps} must be positive')
  _need(o.eta >= 0, f'occ.eta={o.eta} must not be negative; 0 means the '
        'learning rate')
  _need(0 <= o.budget < float('inf'), f'occ.budget={o.budget} must be a '
        'finite number of at least 0')
  _need(0 <= o.target < 1, f'occ.target={o.target} must be a share of at '
        'least 0 and below 1')
  _need(m.regime != 'occ_authors' or not (o.ema or o.guard),
        'mtp.regime=occ_authors neither averages nor bounds its lambdas, but '
        f'occ.ema={o.ema} and occ.guard={o.guard}; set both to 0')
  _need(o.solver == 'gram' or o.estimator not in _OWN_SOLVER,
        f'occ.estimator={o.estimator} has a rule of its own for several '
        f'modules and does not read occ.solver={o.solver}; set occ.solver=gram')
  reads = estimators.ESTIMATORS[o.estimator].reads
  _need(m.regime != 'occ' or m.theta_loss == 'policy' or 'deltas' not in reads,
        f'occ.estimator={o.estimator} measures log-probs, which stand in for '
        f'the policy loss alone, but mtp.theta_loss={m.theta_loss}; set an '
        'estimator that reads gradients, such as occ.estimator=exact')
  measured = m.regime == 'occ_authors' or (
      m.regime == 'occ' and 'deltas' in reads)
  _need(config.rl.minibatches > 1 or not measured,
        f'mtp.regime={m.regime} measures how far the policy moved since the '
        'rollout, but with rl.minibatches=1 it has not moved and lambda would '
        'always be 0; set rl.minibatches >= 2 or occ.estimator=exact')
  _need(o.measure <= config.rl.minibatches, f'occ.measure={o.measure} exceeds '
        f'rl.minibatches={config.rl.minibatches}; set 0 for all of them')
  _need(not o.guard or not regimes.holds(config), f'occ.guard={o.guard} bounds '
        f'each minibatch by its own gradients, but occ.measure={o.measure} '
        'leaves some unmeasured; set one of the two to 0')
  _need(o.scope == 'all' or (
      'gradients' in reads and 'fisher' not in reads),
        f'occ.scope={o.scope} is read by estimators that read the gradients '
        f'themselves, but occ.estimator={o.estimator}; set occ.scope=all')
  _need(m.kind == 'sequential' or not m.detach_embedding,
        'mtp.kind=parallel does not read the embedding; set '
        'mtp.detach_embedding=false')
  _need(m.kind == 'sequential' or m.concat == 'h_emb',
        f'mtp.kind=parallel concatenates nothing, but mtp.concat={m.concat}; '
        'set mtp.concat=h_emb')
  _need(o.lambda_plus > 0, f'occ.lambda_plus={o.lambda_plus} must be positive')
  _need(0 <= o.ema < 1, f'occ.ema={o.ema} must lie in [0, 1)')


def _validate_start(config: config_lib.Config):
  w, m = config.warmup, config.model
  _need(w.train == 'all' or config.mtp.modules,
        'warmup.train=mtp trains MTP modules, but mtp.modules=0; set '
        'mtp.modules=1')
  _need(w.train == 'all' or w.mtp_coef or not w.steps,
        'warmup.train=mtp trains MTP modules alone, but warmup.mtp_coef=0 '
        'leaves them no loss; set warmup.mtp_coef above 0')
  _need(w.data == 'solutions' or w.train == 'mtp',
        'warmup.data=samples imitates the model itself, which must then stay '
        'fixed; set warmup.train=mtp')
  _need(not (m.pretrained and w.init),
        f'model.pretrained={m.pretrained} and warmup.init={w.init} both give '
        'the first parameters; set one of them')
  _need(m.pretrained or not config.mtp.fresh,
        'mtp.fresh=true adds modules to pretrained weights, but '
        'model.pretrained is empty; set it, or mtp.fresh=false')


def _validate_adapters(config: config_lib.Config):
  m, mtp, o = config.model, config.mtp, config.occ
  for section, c in (('model', m), ('mtp', mtp)):
    if not c.lora_rank:
      continue
    names = c.lora_targets.split(',')
    wrong = [n for n in names if n not in TARGETS]
    _need(not wrong, f'{section}.lora_targets={c.lora_targets} names '
          f'{", ".join(wrong)}; choose from {", ".join(TARGETS)}')
    # PEFT takes up_proj in a model with experts to mean the routed experts.
    _need(not m.experts or not set(names) & {'gate', 'up', 'down'},
          f'{section}.lora_targets={c.lora_targets} names gate, up or down, '
          'but in a model with experts the attention alone takes adapters; set '
          f'{section}.lora_targets=query,key,value,out')
  _need(mtp.modules or not mtp.lora_rank,
        f'mtp.lora_rank={mtp.lora_rank} needs an MTP module, but mtp.modules=0')
  _need(not m.lora_rank or (o.scope != 'readout' and o.estimator != 'readout'),
        f'with model.lora_rank={m.lora_rank} the readout is not trained; set '
        'occ.estimator and occ.scope to something else than readout')


def _validate_sampling(config: config_lib.Config):
  r, mesh = config.rollout, config.mesh
  if r.tensor or r.expert:
    devices = mesh.data * mesh.fsdp * mesh.tensor * mesh.expert
    split = (r.tensor or 1) * (r.expert or 1)
    _need(devices % split == 0,
          f'rollout.tensor={r.tensor} and rollout.expert={r.expert} split the '
          f'sampler over {split} devices, which do not divide the '
          f"mesh's {devices}; set divisors")
    rows = devices // (r.tensor or 1)
    _need(config.rl.prompts % rows == 0,
          f'rl.prompts={config.rl.prompts} does not divide over the {rows} '
          f'devices that rollout.tensor={r.tensor} leaves for rows; set '
          'rollout.tensor higher')
  places = sharding.batch_devices(layout.sampling_config(config).mesh)
  _need(not places or r.slots % places == 0,
        f'rollout.slots={r.slots} does not divide over the {places} devices '
        'that rows are split over while sampling; set a multiple')


def _validate_packing(config: config_lib.Config):
  m, o = config.mtp, config.occ
  _need(m.regime != 'occ_authors',
        'rl.pack=true puts several completions in a row, but mtp.regime='
        'occ_authors needs microbatches of whole rows, with padding; set '
        'rl.pack=false or mtp.regime=occ')
  _need(o.estimator != 'authors',
        'rl.pack=true leaves padding out, but occ.estimator=authors is a mean '
        'over all positions, padding included; set rl.pack=false or '
        'occ.estimator=logprob')
  _need('parts' not in estimators.ESTIMATORS[o.estimator].reads,
        f'rl.pack=true mixes prompts in a row, but occ.estimator={o.estimator} '
        'splits rows by prompt; set rl.pack=false')
  _need(not estimators.ESTIMATORS[o.estimator].in_parts
        or o.disjoint_parts == 1,
        'rl.pack=true mixes prompts in a row, but occ.disjoint_parts='
        f'{o.disjoint_parts} splits rows by prompt; set '
        'occ.disjoint_parts=1 or rl.pack=false')
  _need(config.model.attention != 'cudnn',
        'rl.pack=true puts several completions in a row, but '
        'model.attention=cudnn supports one only; set model.attention=auto')


def _validate_batch(config: config_lib.Config):
  r, mesh = config.rl, config.mesh
  _need(r.prompts % r.minibatches == 0,
        f'rl.prompts={r.prompts} does not split into rl.minibatches='
        f'{r.minibatches}; make it a multiple')
  rows = r.prompts // r.minibatches * r.group
  devices = mesh.data * mesh.fsdp * mesh.expert
  split = f'mesh.data * mesh.fsdp * mesh.expert = {devices}'
  if estimators.ESTIMATORS[config.occ.estimator].in_parts:
    n = config.occ.disjoint_parts
    _need(r.prompts // r.minibatches % n == 0,
          f'occ.disjoint_parts={n} must divide the prompts of a minibatch, of '
          f'which there are {r.prompts // r.minibatches}; set '
          'occ.disjoint_parts to a divisor')
    _need(n >= 2 or 'parts' not in estimators.ESTIMATORS[
        config.occ.estimator].reads,
          f'occ.estimator={config.occ.estimator} compares disjoint parts, but '
          'occ.disjoint_parts=1; set occ.disjoint_parts >= 2')
    _need(rows // n % r.microbatches == 0,
          f'a part of {rows // n} rows (occ.disjoint_parts={n}) does not split '
          f'into rl.microbatches={r.microbatches}; make it a divisor')
    _need(rows // n // r.microbatches % devices == 0,
          f'a part of {rows // n} rows (occ.disjoint_parts={n}) in '
          f'rl.microbatches={r.microbatches} does not divide over the mesh '
          f'({split}); set fewer occ.disjoint_parts')
  _need(rows % r.microbatches == 0,
        f'a minibatch of {rows} rows does not split into rl.microbatches='
        f'{r.microbatches}; make it a divisor')
  _need(rows // r.microbatches % devices == 0,
        f'a microbatch of {rows // r.microbatches} rows does not divide over '
        f'the mesh ({split}); change rl.prompts, '
        'rl.group, rl.minibatches, rl.microbatches or the mesh')
  _need(r.prompts % devices == 0,
        f'rl.prompts={r.prompts} does not divide over the mesh ({split})')
  batch = config.warmup.batch
  _need(not config.warmup.steps or batch % (devices * r.microbatches) == 0,
        f'warmup.batch={batch} does not split into rl.microbatches='
        f'{r.microbatches} over the mesh ({split}); make it a multiple')
  _need(r.advantage != 'rloo' or r.group > 1,
        'rl.advantage=rloo leaves one sample out of its group, but '
        'rl.group=1; set rl.group >= 2')
  _need(r.group > 1 or not r.dynamic_sampling,
        f'rl.dynamic_sampling={r.dynamic_sampling} looks for groups whose '
        'rewards differ, but rl.group=1; set rl.group >= 2 or '
        'rl.dynamic_sampling=0')
  _need(r.overlong_buffer <= config.rollout.max_response,
        f'rl.overlong_buffer={r.overlong_buffer} exceeds rollout.max_response='
        f'{config.rollout.max_response}; both count tokens, set it lower')
  _need(r.old_logprobs == 'scored' or not r.tis_cap,
        f'rl.tis_cap={r.tis_cap} weights the old log-probs against those of '
        'the sampler, but with rl.old_logprobs=rollout they are the same; set '
        'rl.tis_cap=0 or rl.old_logprobs=scored')
  _need(r.loss == 'ppo' or not r.dual_clip,
        f'rl.loss={r.loss} has no dual clip, but rl.dual_clip={r.dual_clip}; '
        'set rl.dual_clip=0')


def validate(config: config_lib.Config):
  """Reject settings that cannot work.

  Raises:
    config.ConfigError: one sentence that names the setting and the fix.
  """
  _need_fields(config, config_lib.Config())
  _need_finite(config)
  _need(config.seed >= 0, f'seed={config.seed} must not be negative')
  for name in ('b1', 'b2'):
    value = getattr(config.optim, name)
    _need(0 <= value < 1, f'optim.{name}={value}, the decay of a moving '
          'average, must lie in [0, 1)')
  _need(config.optim.eps > 0, f'optim.eps={config.optim.eps} must be positive')
  for name, choices in CHOICES.items():
    section, field = name.split('.')
    value = getattr(getattr(config, section), field)
    _need((name, value) not in _RENAMED_VALUES,
          f'{name}={value} is now called '
          f'{_RENAMED_VALUES.get((name, value))}; use that name')
    _need(value in choices, f'{name}={value!r} is none of '
          f'{", ".join(choices)}')
  _need_signs(config, _POSITIVE, lambda x: x > 0, 'must be positive')
  _need_signs(config, _NOT_NEGATIVE, lambda x: x >= 0, 'must not be negative')
  settings.check(config.model)
  loggers.names(config.run.loggers)
  _need(0 < config.rollout.top_p <= 1,
        f'rollout.top_p={config.rollout.top_p} must lie in (0, 1]')
  _need(config.rollout.temperature > 0,
        'rollout.temperature=0 makes all samples of a group equal, which '
        'teaches nothing; set it above 0 (evaluation is greedy anyway)')
  _validate_adapters(config)
  _validate_mtp(config)
  _validate_batch(config)
  _validate_sampling(config)
  if config.rl.pack:
    _validate_packing(config)
  _validate_start(config)
