"""Every setting of a run, typed, and the named presets.

A file in configs/ returns `Config` from `get_config()`; flags override any
field (`--config.rl.lr=3e-4`). The flag parser rejects fields that do not exist,
`validate.validate` combinations that cannot work.
"""

import dataclasses
import importlib
import math


class ConfigError(ValueError):
  """A setting that cannot work; the message names it and the fix."""


def optional(module, user, extra):
  """Import a module that the plain install leaves out, and return it.

  Args:
    module: dotted name.
    user: what needs it, the subject of the error message.
    extra: extra of this project that installs it.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as e:
    name = module.split('.')[0].replace('_', '-')
    raise ConfigError(f'{user} needs the package {name}; install it with pip '
                      f"install -e '.[{extra}]' ({e})") from e


@dataclasses.dataclass(unsafe_hash=True)
class Model:
  """The decoder."""
  d_model: int = 64
  n_layers: int = 2
  n_heads: int = 4
  n_kv_heads: int = 4
  head_dim: int = 0  # 0: d_model / n_heads
  d_ff: int = 256
  vocab_size: int = 0  # V, rows of the token table; 0: the tokenizer's
  rope_theta: float = 10000.
  rotary: float = 1.  # fraction of a head's channels that RoPE turns
  rope_type: str = 'default'  # or 'linear', 'llama3', 'yarn': models/rope.py
  rope_factor: float = 1.  # how many times the context is stretched
  rope_context: int = 0  # context before that, tokens (llama3, yarn)
  rope_low: float = 1.  # low_freq_factor (llama3), beta_slow (yarn)
  rope_high: float = 4.  # high_freq_factor (llama3), beta_fast (yarn)
  rope_gain: float = 1.  # factor on sines and cosines (yarn)
  rope_truncate: bool = True  # yarn: its ramp begins and ends at a channel
  window: int = 0  # tokens that a sliding layer sees, itself included; 0: all
  window_layers: str = ''  # 's' (sliding) or 'f' (full) a layer; '': all slide
  norm_eps: float = 1e-6
  qkv_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = True
  dtype: str = 'float32'  # of the computation; parameters stay float32
  attention: str = 'auto'  # form of the computation; see models/attention.py
  remat: str = 'dots'  # what is kept for the backward pass; 'none': all
  head_chunk: int = 16  # columns per slice of the output head; 0: all at once
  lora_rank: int = 0  # r of the trunk's adapters; 0: its weights are trained
  lora_alpha: float = 16.  # an adapter's output is scaled by this / r
  lora_targets: str = 'query,key,value,out,gate,up,down'  # that have adapters
  pretrained: str = ''  # Hugging Face folder or GGUF file to start from
  experts: int = 0  # E routed experts a layer; 0: one dense SwiGLU of d_ff
  experts_per_token: int = 0  # experts that a token is routed to
  expert_ff: int = 0  # inner width of one expert
  expert_form: str = 'auto'  # of their matmuls; see models/moe.py
  shared_experts: int = 0  # experts that every token takes, as one SwiGLU
  dense_layers: int = 0  # first layers that keep the dense SwiGLU
  router: str = 'sigmoid'  # with a correction bias; or 'softmax', without
  router_groups: int = 1  # groups of experts; a token uses the best of them
  router_top_groups: int = 1  # how many groups a token uses
  router_scale: float = 1.  # factor on the routed experts' weights
  norm_topk: bool = True  # make the chosen experts' weights sum to that factor


@dataclasses.dataclass(unsafe_hash=True)
class MTP:
  """The MTP modules and how they meet the RL objective."""
  modules: int = 1  # sets of parameters; `depths` gives K
  unroll: int = 1  # depths of one module applied to its own states
  kind: str = 'sequential'  # depth k sees x_{i+k}; 'parallel': the trunk alone
  regime: str = 'occ'  # see regimes.py
  theta_loss: str = 'policy'  # theta's MTP loss in regimes 'fixed' and 'occ'
  coef: float = 0.1  # fixed lambda of 'ce', 'policy' and 'fixed', over K
  reference: str = 'main_old'  # delta_MTP = log pi_MTP - log pi_<reference>
  psi_loss: str = 'ce'  # psi's own loss; 'theta': lambda * the loss of theta
  psi_coef: float = 1.  # psi's own coefficient (unused by 'theta')
  concat: str = 'h_emb'  # or 'emb_h'
  hidden: str = 'post_norm'  # trunk state that depth 1 receives
  layout: str = ''  # names in files: 'mimo', 'deepseek'; '': the family's own
  fresh: bool = False  # new modules where the pretrained model has none
  lora_rank: int = 0  # the same of the modules' blocks, apart from the trunk
  lora_alpha: float = 16.
  lora_targets: str = 'query,key,value,out,gate,up,down'
  detach_hidden: bool = False
  detach_embedding: bool = False
  detach_head: bool = False


@dataclasses.dataclass(unsafe_hash=True)
class OCC:
  """Optimal coefficient calibration (equations in occ.py, rivals.py)."""
  estimator: str = 'logprob'  # see estimators.py
  lambda_plus: float = 1.
  eps: float = 1e-8
  lambda_min: float = -1.
  lambda_max: float = 1.
  ema: float = 0.  # decay of the moving average of lambda; 0: none
  solver: str = 'gram'  # K > 1: G^-1 c, or 'per_module': c_k / v_k^2
  scope: str = 'all'  # parameters whose gradients are measured
  disjoint_parts: int = 2  # per minibatch, for estimators that read gradients
  probe_every: int = 4  # measurements of lambda for one of L eta
  measure: int = 0  # minibatches a step that measure lambda, the first; 0: all
  budget: float = .1  # affordable: share of RL's own gain that MTP may cost
  target: float = .5  # gac: share of MTP where the gradients are free of noise
  guard: float = 0.  # bound rho of ||lambda g_MTP|| / ||g_RL||; 0: off
  eta: float = 0.  # step size in the curvature form; 0: the learning rate


@dataclasses.dataclass(unsafe_hash=True)
class RL:
  """The RL objective and the shape of a step."""
  steps: int = 100
  prompts: int = 16  # P
  group: int = 8  # G
  minibatches: int = 4
  microbatches: int = 1  # > 1: recompute each one in the backward pass
  pack: bool = False  # put several completions in one row for the update
  lr: float = 1e-3
  dynamic_sampling: int = 0  # most redraws a step, for varied groups; 0: off
  overlong_buffer: int = 0  # penalised tokens before max_response; 0: off
  overlong_penalty: float = 1.  # of a completion cut off at max_response
  advantage: str = 'grpo'
  loss: str = 'ppo'
  clip_low: float = 0.2
  clip_high: float = 0.28
  dual_clip: float = 10.  # bound c of the loss where A < 0; 0: off
  aggregation: str = 'token-mean'
  kl_coef: float = 0.
  kl_kind: str = 'k3'
  entropy_coef: float = 0.
  tis_cap: float = 0.  # cap of the sampler-trainer importance weight; 0: off
  old_logprobs: str = 'scored'  # anew, or the sampler's own: 'rollout'


@dataclasses.dataclass(unsafe_hash=True)
class Optim:
  """AdamW, its schedule and clipping (RL and warm-up)."""
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  mu_dtype: str = 'float32'  # of Adam's first moment; the second is float32
  weight_decay: float = 0.1
  clip: float = 1.  # global norm; 0: off
  clip_mode: str = 'separate'  # theta and psi apart, or one 'joint' norm
  schedule: str = 'constant'
  ramp: int = 0  # first updates, in which the learning rate rises linearly


@dataclasses.dataclass(unsafe_hash=True)
class Warmup:
  """Supervised training before RL: next-token and MTP losses."""
  steps: int = 0
  batch: int = 128
  lr: float = 2e-3
  mtp_coef: float = 1.
  mtp_loss: str = 'ce'  # of the MTP modules; see objectives/acceptance.py
  train: str = 'all'  # 'mtp': the MTP modules, everything else frozen
  data: str = 'solutions'  # 'samples': the model's own, for training prompts
  pool: int = 1  # rollouts (rl.prompts x rl.group samples) of one pool
  pool_steps: int = 50  # updates that draw from one pool
  init: str = ''  # workdir of experiments.pretrain to start from instead


@dataclasses.dataclass(unsafe_hash=True)
class Rollout:
  """Sampling; lengths in tokens."""
  max_prompt: int = 32
  max_response: int = 32
  temperature: float = 1.
  top_k: int = 0  # 0: off
  top_p: float = 1.
  slots: int = 0  # rows decoded at a time; 0: all of a rollout, as one program
  draft: int = 0  # tokens that the MTP modules draft a step; 0: off
  verify: str = 'coupled'  # the tokens of no drafts; or 'rejection'
  draft_rows: int = 0  # draft if at most so many rows are decoded; 0: always
  draft_vocab: int = 0  # draft the first so many token ids alone; 0: all
  tensor: int = 0  # devices that split a layer to sample; 0: as in training
  expert: int = 0  # devices that split the experts while sampling


@dataclasses.dataclass(unsafe_hash=True)
class Task:
  """The task; each task reads its own fields."""
  name: str = 'arithmetic'
  held_out: int = 256  # problems to evaluate on (math: of each set, at most)
  min_terms: int = 4  # arithmetic, subset_sum
  max_terms: int = 6
  noisy_facts: int = 40  # of the 100 (running sum, digit) facts
  noise: float = 0.6  # chance that a noisy fact is written wrong
  degree: int = 2  # path_finding: arms of a star
  arm: int = 3  # path_finding: edges of an arm
  nodes: int = 12  # path_finding: characters to name nodes by; dag_planning
  edge_prob: float = .1  # dag_planning: chance of an edge
  taught: float = .2  # dag_planning: share of distant pairs in the warm-up
  largest: int = 4  # subset_sum: digits are 1 to this; sums: numbers 0 to this
  dataset: str = ''  # reasoning_gym
  options: str = '{}'  # reasoning_gym: JSON object of the data set's settings
  size: int = 4000  # reasoning_gym: questions drawn before the split
  allow_eval: bool = False  # reasoning_gym: scorers that run answers as Python
  timeout_s: float = 5.  # reasoning_gym, math: limit to verify one answer
  tokenizer: str = ''  # math, sums: folder or GGUF file; '': characters
  template: str = 'chat'  # math, sums: the tokenizer's own, or 'plain'
  prefix: str = ''  # sums: start of every answer, put in the prompt
  data_dir: str = ''  # math: folder of NAME.jsonl or NAME.parquet
  cache_dir: str = ''  # math: of prepared sets; '': ~/.cache/mtp_rl
  train: str = 'dapo_math_17k'  # math: sets, comma-separated
  evals: str = 'aime24,aime25,amc23,math500,minerva_math,olympiadbench'
  processes: int = 2  # reasoning_gym, math: verifier processes


@dataclasses.dataclass(unsafe_hash=True)
class Eval:
  """Evaluation during training."""
  every: int = 25
  samples: int = 4  # k of avg@k, pass@k, maj@k
  batch: int = 128  # prompts of one generation


@dataclasses.dataclass(unsafe_hash=True)
class Mesh:
  """Devices: batch over all but tensor, parameters over all but data."""
  data: int = 1
  fsdp: int = 1
  tensor: int = 1  # devices that split a layer
  expert: int = 1  # devices that split the experts


@dataclasses.dataclass(unsafe_hash=True)
class Run:
  """Bookkeeping."""
  checkpoint_every: int = 50
  keep: int = 2
  progress: bool = True
  loggers: str = 'tensorboard'  # of tensorboard, csv, wandb; by commas
  strict: bool = False  # a damaged checkpoint ends the run
  hang_minutes: float = 60.  # processes waiting for each other: the run ends
  max_skipped: int = 5  # updates in a row that are not finite: the run ends


@dataclasses.dataclass(unsafe_hash=True)
class Config:
  """One run."""
  seed: int = 0
  model: Model = dataclasses.field(default_factory=Model)
  mtp: MTP = dataclasses.field(default_factory=MTP)
  occ: OCC = dataclasses.field(default_factory=OCC)
  rl: RL = dataclasses.field(default_factory=RL)
  optim: Optim = dataclasses.field(default_factory=Optim)
  warmup: Warmup = dataclasses.field(default_factory=Warmup)
  rollout: Rollout = dataclasses.field(default_factory=Rollout)
  task: Task = dataclasses.field(default_factory=Task)
  eval: Eval = dataclasses.field(default_factory=Eval)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  run: Run = dataclasses.field(default_factory=Run)


def depths(mtp: MTP):
  """Return K, how many tokens ahead the MTP modules predict.

  That is mtp.modules, or mtp.unroll where one module is applied that often.
  """
  return mtp.modules * mtp.unroll


_RL_PRESETS = {
    'grpo': dict(advantage='grpo', loss='ppo', clip_low=.2, clip_high=.2,
                 dual_clip=3., aggregation='seq-mean-token-mean',
                 kl_coef=1e-3, kl_kind='k3'),
    'dapo': dict(advantage='grpo', loss='ppo', clip_low=.2, clip_high=.28,
                 dual_clip=10., aggregation='token-mean', kl_coef=0.),
    'gspo': dict(advantage='grpo', loss='gspo', clip_low=3e-4, clip_high=4e-4,
                 dual_clip=0., aggregation='seq-mean-token-mean', kl_coef=0.),
    'dr_grpo': dict(advantage='dr_grpo', loss='ppo', clip_low=.2, clip_high=.2,
                    dual_clip=0., aggregation='seq-mean-token-sum-norm',
                    kl_coef=0.),
    'cispo': dict(advantage='grpo', loss='cispo', clip_low=1., clip_high=4.,
                  dual_clip=0., aggregation='token-mean', kl_coef=0.),
}
PRESETS = tuple(_RL_PRESETS) + ('paper',)


def preset(config: Config, names):
  """Set the fields of the named presets on config and return it.

  'grpo', 'dapo', 'gspo', 'dr_grpo', 'cispo' set the RL objective; 'paper' sets
  the plain loss L_RL + lambda L_MTP, one joint clip, and unbounded lambda.

  Args:
    config: a `Config`, changed in place.
    names: comma-separated names, '' for none (the text after the colon in
      --config=configs/quickstart.py:gspo,paper).

  Returns:
    config.

  Raises:
    ConfigError: a name is unknown.
  """
  for name in filter(None, (names or '').split(',')):
    if name in _RL_PRESETS:
      for field, value in _RL_PRESETS[name].items():
        setattr(config.rl, field, value)
    elif name == 'paper':
      config.mtp.psi_loss = 'theta'
      config.optim.clip_mode = 'joint'
      config.occ.lambda_min, config.occ.lambda_max = -math.inf, math.inf
    else:
      raise ConfigError(f'preset {name!r} is unknown; choose from '
                        f'{", ".join(PRESETS)}')
  return config


def with_vocabulary(config: Config, size):
  """Return a copy whose model.vocab_size is resolved to V.

  Args:
    config: a `Config`, not changed.
    size: the tokenizer's number of tokens, V where model.vocab_size=0.

  Raises:
    ConfigError: the tokenizer has more tokens than the table has rows.
  """
  rows = config.model.vocab_size or size
  if size > rows:
    raise ConfigError(
        f'the tokenizer has {size} tokens, but model.vocab_size={rows}; set it '
        'to the rows of the token table')
  return dataclasses.replace(
      config, model=dataclasses.replace(config.model, vocab_size=rows))
