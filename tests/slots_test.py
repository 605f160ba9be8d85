"""Slots: the same completions, whatever sits beside them and when."""

import functools

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import prng, sharding, train_step, trainer
from mtp_rl.rollout import layout, slots
from mtp_rl.rollout import prompts as prompts_lib
from mtp_rl.run import metrics
from tests import conftest, sampler_test

TOKENIZER, V = sampler_test.TOKENIZER, sampler_test.V
TEXTS = ['abcdef', 'a', 'fed', 'cc', 'a', 'bad', 'face', 'd']
GROUP, R = 3, 6


def _config(mesh=None, model=None, **rollout):
  return conftest.tiny_config(
      model=dict(vocab_size=V) | (model or {}), mesh=mesh or {},
      mtp=dict(regime='detach'),
      rollout=dict(max_response=20, temperature=4.) | rollout)


@functools.cache
def _params(**model):
  return jax.device_get(sampler_test._sharp(_config(model=model)))


def _run(config, texts=TEXTS, greedy=False, finished=None):
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    abstract = train_step.make(config, mesh).abstract.params
    params = jax.device_put(_params(), jax.tree.map(lambda x: x.sharding,
                                                    abstract))
    placed = layout.make_place(abstract, config, mesh)(params)
    generate = slots.make_generate(config, mesh, abstract, TOKENIZER.ends,
                                   GROUP, greedy)
    return generate(placed, *prompts_lib.pad_prompts(texts, TOKENIZER, R),
                    prng.run_key(3), finished)


@functools.cache
def _whole():
  return _run(_config())


def _same(got, want):
  np.testing.assert_array_equal(got.rows.tokens, want.rows.tokens)
  np.testing.assert_array_equal(got.rows.valid, want.rows.valid)
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_lengths_differ_enough_to_say_something():
  lengths = _whole().rows.valid[:, R:].sum(1)
  assert lengths.min() <= 2 and lengths.max() == 20
  assert len(set(lengths.tolist())) > 6


@pytest.mark.parametrize('rollout', [
    dict(slots=3), dict(slots=8, draft=2), dict(slots=64),
    conftest.long(dict(slots=1)), conftest.long(dict(slots=16)),
    conftest.long(dict(slots=3, draft=3)),
    dict(slots=16, draft=1, draft_rows=4)])  # drafts begin when few are left
def test_slots_and_drafts_change_no_completion(rollout):
  got = _run(_config(**rollout))
  _same(got, _whole())
  forwards, tokens = got.counts[:2].tolist()
  assert tokens == _whole().counts[1]
  assert forwards < tokens if rollout.get('draft') else forwards == tokens
  assert set(got.seconds) == {'prefill', 'wait'} | (
      {'decode'} if not rollout.get('draft') else
      {'decode', 'draft'} if 'draft_rows' in rollout else {'draft'})


def test_shuffled_prompts_get_their_own_completions():
  order = [3, 0, 7, 1, 6, 5, 2, 4]  # the two 'a' in their order
  got = _run(_config(slots=5), [TEXTS[i] for i in order])
  want = _whole().rows.tokens.reshape(len(TEXTS), GROUP, -1)[order]
  np.testing.assert_array_equal(got.rows.tokens, want.reshape(
      got.rows.tokens.shape))


@pytest.mark.parametrize('mesh, rollout', [
    (dict(data=2, fsdp=2, tensor=2), dict(slots=8, draft=2)),
    conftest.long(dict(fsdp=8), dict(slots=8)),
    conftest.long(dict(fsdp=4), dict(slots=4, tensor=2, draft=1))])
def test_on_a_mesh_they_are_the_same(mesh, rollout):
  _same(_run(_config(mesh, **rollout)), _whole())


def test_rows_are_handed_on_as_they_end():
  seen, calls = np.zeros(len(TEXTS) * GROUP, int), []
  tokens = np.zeros((len(seen), 20), np.int32)
  def finished(rows, responses):
    seen[rows] += 1
    tokens[rows] = responses
    calls.append(len(rows))
  got = _run(_config(slots=4), finished=finished)
  assert (seen == 1).all() and len(calls) > 4
  np.testing.assert_array_equal(tokens, got.rows.tokens[:, R:])


def test_a_row_costs_its_own_length():
  """With one slot there are as many forward passes as tokens, not more."""
  table = slots._Table(samples=6, devices=2, slots=2, group=3)
  which, sample, entering = table.fill()
  assert table.seats.tolist() == [[0, 1], [3, 4]] and entering.all()
  assert which.tolist() == [[0, 0], [0, 0]]
  assert sample.tolist() == [[0, 1], [0, 1]]
  done = np.array([False, True, True, False])
  places, samples = table.leave(done)
  assert places.tolist() == [1, 2] and samples.tolist() == [1, 3]
  assert table.shrink() is None  # samples wait
  which, sample, entering = table.fill()
  assert table.seats.tolist() == [[0, 2], [5, 4]]
  assert entering.tolist() == [[False, True], [True, False]]
  assert table.fill() is None and table.shrink() is None
  table.leave(np.array([True, False, True, False]))
  assert table.shrink().tolist() == [[1], [1]]
  assert table.seats.tolist() == [[2], [4]]


def test_slots_must_divide_over_the_devices():
  with pytest.raises(config_lib.ConfigError, match='rollout.slots=6'):
    _config(dict(fsdp=4), slots=6)


@pytest.mark.long
def test_a_run_with_slots_and_drafts_resumes_bit_for_bit(tmp_path, capsys):
  """Stopped after step 2 of 4; verified while decoding, not scored again."""
  settings = dict(slots=8, draft=2, max_response=6)
  config = lambda steps: conftest.tiny_config(
      rl=dict(steps=steps, old_logprobs='rollout'),
      mtp=dict(regime='detach'), rollout=settings)
  rows = {}
  for name, parts in (('whole', (4,)), ('parts', (2, 4))):
    for steps in parts:
      trainer.train(config(steps), str(tmp_path / name))
    rows[name] = [
        {k: v for k, v in row.items() if not k.startswith('timing_s')
         and not k.endswith('per_s')} for row in metrics.read(str(
             tmp_path / name / 'metrics.jsonl'))]
  assert rows['parts'][3:] == rows['whole'][3:] and len(rows['whole']) == 5
  assert rows['whole'][1]['rollout/accepted_1'] is not None
  assert 'could not be written' not in capsys.readouterr().err
  noted = [metrics.read(str(tmp_path / name / 'tokens.jsonl'))
           for name in ('parts', 'whole')]
  assert noted[0][-1] == noted[1][-1] and noted[0][-1]['kind'] == 'rollout'
  last = noted[0][-1]
  assert last['entropy'] == [None] * last['length'] and None not in last['d_rl']
