"""Settings: presets, round trip, and one sentence for each contradiction."""

import json
import math
import re

import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, validate
from mtp_rl.evaluation import scoring
from tests import conftest


@pytest.mark.parametrize('sections, said', [
    (dict(mtp=dict(modules=0, regime='detach')), 'mtp.modules=0'),
    (dict(model=dict(rope_type='llama3')), 'model.rope_context=0'),
    (dict(model=dict(rope_type='linear', rope_gain=1.5)), 'rope_gain=1.5'),
    (dict(model=dict(rope_type='llama3', rope_context=8, rope_low=4.)),
     'must be below model.rope_high'),
    (dict(model=dict(rope_type='yarn', rope_context=8, rope_theta=1.)),
     'needs model.rope_theta=1.0 above 1'),
    (dict(model=dict(rope_factor=2.)), 'set model.rope_type'),
    (dict(model=dict(window_layers='sf')), 'model.window=0'),
    (dict(mtp=dict(modules=0, regime='occ')), 'needs an MTP module'),
    (dict(mtp=dict(modules=2, regime='occ_authors')), 'one depth'),
    (dict(mtp=dict(unroll=2, regime='occ_authors')), 'mtp.unroll=2'),
    (dict(mtp=dict(unroll=0)), 'mtp.unroll=0 must be positive'),
    (dict(mtp=dict(modules=2, unroll=2)), 'mtp.modules=1 or mtp.unroll=1'),
    (dict(mtp=dict(unroll=2, kind='parallel')), 'mtp.kind=sequential'),
    (dict(mtp=dict(regime='ce', theta_loss='kl')), 'mtp.regime=fixed'),
    (dict(mtp=dict(theta_loss='tv')), 'occ.estimator=exact'),
    (dict(warmup=dict(mtp_loss='policy')), 'warmup.mtp_loss'),
    (dict(mtp=dict(regime='joint')), "mtp.regime='joint' is none of"),
    (dict(mtp=dict(regime='policy'), occ=dict(estimator='curvature')),
     'occ.estimator=curvature'),
    (dict(mtp=dict(regime='ce', psi_loss='policy')), 'mtp.psi_loss=ce'),
    (dict(occ=dict(lambda_min=1., lambda_max=0.)), 'exceeds'),
    (dict(occ=dict(ema=1.)), 'occ.ema'),
    (dict(rl=dict(prompts=9)), 'rl.minibatches'),
    (dict(rl=dict(microbatches=3)), 'rl.microbatches=3'),
    (dict(mesh=dict(data=3)), 'mesh.data'),
    (dict(mesh=dict(data=16), rl=dict(prompts=32, minibatches=2),
          warmup=dict(batch=24)), 'warmup.batch=24'),
    (dict(rl=dict(advantage='rloo', group=1)), 'rl.group'),
    (dict(rl=dict(loss='gspo')), 'dual'),
    (dict(rl=dict(group=1, dynamic_sampling=2)), 'rl.dynamic_sampling=2'),
    (dict(rl=dict(overlong_buffer=7)), 'rl.overlong_buffer=7'),
    (dict(task=dict(template='qwen')), 'task.template'),
    (dict(rl=dict(loss='cispo')), 'dual'),
    (dict(mtp=dict(regime='occ_authors'), occ=dict(ema=.5)), 'occ.ema'),
    (dict(mtp=dict(regime='occ_authors'), occ=dict(guard=.5)), 'occ.guard'),
    (dict(mtp=dict(regime='policy', detach_hidden=True, detach_embedding=True,
                   detach_head=True)), 'no way to what is trained'),
    (dict(mtp=dict(regime='policy', detach_hidden=True),
          model=dict(lora_rank=2)), 'no way to what is trained'),
    (dict(warmup=dict(train='mtp', mtp_coef=0.)), 'warmup.mtp_coef=0'),
    (dict(occ=dict(estimator='curvature', solver='per_module')),
     'occ.solver'),
    (dict(occ=dict(estimator='affordable', disjoint_parts=2,
                   solver='per_module')), 'occ.solver'),
    (dict(rl=dict(old_logprobs='rollout', tis_cap=2.)), 'rl.tis_cap=2'),
    (dict(rl=dict(minibatches=1)), 'rl.minibatches=1'),
    (dict(rl=dict(minibatches=1), occ=dict(estimator='authors')),
     'rl.minibatches=1'),
    (dict(occ=dict(budget=-.1)), 'occ.budget=-0.1'),
    (dict(occ=dict(target=1.)), 'occ.target=1.0'),
    (dict(occ=dict(estimator='gac', disjoint_parts=1)),
     'occ.disjoint_parts >= 2'),
    (dict(occ=dict(estimator='readout', scope='trunk')), 'occ.scope=trunk'),
    (dict(occ=dict(estimator='cross_fitted', disjoint_parts=3)),
     'occ.disjoint_parts=3'),
    (dict(occ=dict(estimator='cross_fitted', disjoint_parts=1)),
     'occ.disjoint_parts >= 2'),
    (dict(occ=dict(estimator='exact', disjoint_parts=3)),
     'occ.disjoint_parts=3'),
    (dict(occ=dict(estimator='cross_fitted', disjoint_parts=4),
          rl=dict(microbatches=8), warmup=dict(batch=32)), 'a part of 4 rows'),
    (dict(occ=dict(probe_every=0)), 'occ.probe_every=0'),
    (dict(mtp=dict(unroll=4), rollout=dict(max_prompt=2, max_response=2)),
     'rows of 4 tokens'),
    (dict(occ=dict(guard=-1.)), 'occ.guard'),
    (dict(occ=dict(measure=-1)), 'occ.measure=-1'),
    (dict(occ=dict(measure=9, estimator='exact')), 'exceeds rl.minibatches='),
    (dict(occ=dict(measure=1, guard=.1, estimator='exact')), 'occ.guard=0.1'),
    (dict(occ=dict(lambda_plus=0.)), 'occ.lambda_plus'),
    (dict(mtp=dict(kind='parallel', detach_embedding=True)),
     'mtp.detach_embedding'),
    (dict(mtp=dict(kind='parallel', concat='emb_h')), 'mtp.concat=emb_h'),
    (dict(occ=dict(estimator='cross_fitted', disjoint_parts=4),
          mesh=dict(data=8), warmup=dict(batch=32)),
     'fewer occ.disjoint_parts'),
    (dict(rl=dict(group=6, microbatches=3)), 'warmup.batch=8'),
    (dict(rl=dict(lr=0.)), 'rl.lr=0.0 must be positive'),
    (dict(rl=dict(clip_low=-.1)), 'must not be negative'),
    (dict(model=dict(router_groups=2)), 'model.experts=0'),
    (dict(model=dict(n_kv_heads=3)), 'model.n_kv_heads=3'),
    (dict(model=dict(d_model=18)), 'model.head_dim'),
    (dict(model=dict(head_dim=5)), 'even'),
    (dict(rollout=dict(top_p=0.)), 'rollout.top_p'),
    (dict(rollout=dict(temperature=0.)), 'rollout.temperature'),
])
def test_contradictions_are_named(sections, said):
  with pytest.raises(config_lib.ConfigError, match=said) as error:
    conftest.tiny_config(**sections)
  assert '\n' not in str(error.value)


def test_no_module_is_allowed_where_none_is_needed(tiny):
  tiny(mtp=dict(modules=0, regime='rl_only'))


@pytest.mark.parametrize('name', config_lib.PRESETS)
def test_presets_are_valid_and_differ(name):
  config = config_lib.preset(config_lib.Config(), name)
  validate.validate(config)
  assert config_io.differences(config, config_lib.Config()) or name == 'dapo'


def test_presets_combine_and_keep_other_fields():
  config = config_lib.Config(rl=config_lib.RL(steps=7))
  config_lib.preset(config, 'gspo,paper')
  assert config.rl.steps == 7 and config.rl.loss == 'gspo'
  assert config.rl.clip_low == 3e-4 and config.optim.clip_mode == 'joint'
  assert config.occ.lambda_max == math.inf
  with pytest.raises(config_lib.ConfigError, match='gapo'):
    config_lib.preset(config, 'gapo')
  config.rl.stepz = 3  # not lost, so that a misspelt field is found
  assert config_lib.preset(config, 'dapo').rl.stepz == 3


def test_round_trip_and_differences():
  config = config_lib.preset(config_lib.Config(seed=3), 'cispo')
  again = config_io.from_dict(config_io.to_dict(config))
  assert again == config and hash(again) == hash(config)
  again.mtp.coef, again.seed = .7, 4
  assert config_io.differences(config, again) == ['seed', 'mtp.coef']


def test_foreign_config_files_are_named(tmp_path):
  path = tmp_path / 'config.json'
  with pytest.raises(config_lib.ConfigError, match='does not exist'):
    config_io.load(path)
  for text, said in (('{', 'not a config'), ('[]', 'not a config'),
                     ('{"nope": 1}', 'nope'), ('{"rl": {"x": 1}}', "'x'"),
                     ('{"rl": 5}', "section 'rl'"), ('\xe9', 'not a config'),
                     ('[' * 10 ** 5, 'not a config')):
    path.write_text(text, encoding='latin1')
    with pytest.raises(config_lib.ConfigError, match=said):
      config_io.load(path)


def test_a_file_cannot_allow_that_answers_run(tmp_path):
  path = tmp_path / 'config.json'
  given = config_lib.Config(task=config_lib.Task(allow_eval=True))
  path.write_text(json.dumps(config_io.to_dict(given)))
  assert not config_io.load(path).task.allow_eval
  scored = scoring.configure(config_io.load(path), 1, ['task.allow_eval=true'])
  assert scored.task.allow_eval


@pytest.mark.parametrize('old, new', config_io.RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(old, new):
  section, field = old.split('.')
  said = f'{old} is now called {new};'
  with pytest.raises(config_lib.ConfigError, match=said):
    config_io.from_dict({section: {field: 1}})
  with pytest.raises(config_lib.ConfigError, match=said):
    config_io.assign(config_lib.Config(), old, '1')
  config = config_lib.Config()
  setattr(getattr(config, section), field, 1)  # as a config file may
  with pytest.raises(config_lib.ConfigError, match=said):
    validate.validate(config)
  owner, name = new.split('.')
  assert hasattr(getattr(config_lib.Config(), owner), name)


@pytest.mark.parametrize('name, old, new', [
    ('mtp.psi_loss', 'joint', 'theta'), ('occ.solver', 'joint', 'gram'),
    ('occ.solver', 'per_head', 'per_module')])
def test_an_old_value_is_refused_with_the_new_one(name, old, new):
  config = config_lib.Config()
  config_io.assign(config, name, old)
  with pytest.raises(config_lib.ConfigError,
                     match=f'{name}={old} is now called {new}'):
    validate.validate(config)


def test_a_vocabulary_is_resolved_once_and_must_hold_the_tokenizer():
  config = config_lib.Config()
  assert config_lib.with_vocabulary(config, 17).model.vocab_size == 17
  assert config.model.vocab_size == 0  # a run's config.json keeps this
  config.model.vocab_size = 32
  assert config_lib.with_vocabulary(config, 17).model.vocab_size == 32
  with pytest.raises(config_lib.ConfigError, match='has 33 tokens'):
    config_lib.with_vocabulary(config, 33)


@pytest.mark.parametrize('name, value', [
    ('rl.steps', 1e3), ('rl.pack', 'false'), ('rl.lr', '1e-3'), ('rl', 5),
    ('seed', None), ('mtp.coef', True), ('task.name', 3), ('occ.eta', [1.])])
def test_a_value_of_another_type_is_refused(name, value):
  config = config_lib.Config()
  section, _, field = name.rpartition('.')
  setattr(getattr(config, section) if section else config, field, value)
  with pytest.raises(config_lib.ConfigError,
                     match=re.escape(f'{name}={value!r} must be of type')):
    validate.validate(config)


def test_a_field_that_does_not_exist_is_refused():
  for name in 'sede', 'rl_steps':
    config = config_lib.Config()
    setattr(config, name, 3)
    with pytest.raises(config_lib.ConfigError, match=f'{name} does not exist'):
      validate.validate(config)


@pytest.mark.parametrize('name, value', [
    ('rl.lr', math.inf), ('mtp.coef', math.inf), ('optim.b1', 2.),
    ('optim.b2', 1.), ('seed', -1), ('rl.clip_high', math.nan),
    ('occ.lambda_max', math.nan), ('run.max_skipped', 0)])
def test_what_is_no_usable_number_is_refused(name, value):
  config = config_lib.Config()
  section, _, field = name.rpartition('.')
  setattr(getattr(config, section) if section else config, field, value)
  with pytest.raises(config_lib.ConfigError, match=f'{name}={value}'):
    validate.validate(config)
