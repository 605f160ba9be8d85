"""The study of drafters: plan, statistics, and one small one for real."""

import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl.compare import drafting
from tests import conftest


def _study(tmp_path, variants='ce;once:mtp.unroll=1', updates=(3,), **sections):
  base = conftest.tiny_config(**(dict(mtp=dict(unroll=2)) | sections))
  return drafting.plan(base, variants, [0, 1], list(updates), 2,
                       str(tmp_path))


@pytest.mark.parametrize('variants, said', [
    ('policy', "'policy' is none of ce, kl"),
    ('a:warmup.mtp_loss=theta', "warmup.mtp_loss='theta' is none of"),
    ('a:mtp.unroll=0', 'must be positive'), ('', 'set --variants'),
    ('ce;a:warmup.batch=32,warmup.lr=.1', 'a changes warmup.batch, but all'),
    ('a:rollout.temperature=.5', 'a changes rollout.temperature, but all')])
def test_a_plan_that_cannot_work_is_refused(variants, said, tmp_path):
  with pytest.raises(config_lib.ConfigError, match=said):
    _study(tmp_path, variants)


def test_losses_are_variants_and_the_policy_keeps_its_warm_up(tmp_path):
  study = _study(tmp_path, warmup=dict(mtp_coef=0.))
  assert study.base.warmup.train == 'all' and study.base.warmup.steps == 4
  assert study.base.warmup.mtp_coef == 0.
  ce, once = (v.config for v in study.variants)
  assert (ce.warmup.train, ce.warmup.data, ce.warmup.steps) == (
      'mtp', 'samples', 3)
  assert ce.warmup.mtp_coef == 1.
  assert (ce.mtp.unroll, once.mtp.unroll) == (2, 1)


def test_differences_are_paired_by_seed(tmp_path):
  study = _study(tmp_path)
  def row(variant, seed, first, both):
    return {'variant': variant, 'seed': seed, 'updates': 3,
            'mtp_1/accept_expected': first, 'mtp_2/accept_expected': .5,
            'mtp_1/accept_cumulative': first, 'mtp_2/accept_cumulative': both,
            'mtp/accept_length': first + both}
  rows = [row('ce', 0, .2, .1), row('ce', 1, .4, .3),
          row('once', 0, .3, .1), row('once', 1, .5001, .2)]
  ce, once = drafting.summarise(study, rows)
  assert ce['mean']['tokens a forward'].mean == pytest.approx(1.5)
  assert 'minus_first' not in ce
  gap = once['minus_first']
  assert gap['depth 1'].mean == pytest.approx(.10005)
  assert gap['depth 1'].high - gap['depth 1'].low < 2e-3
  assert gap['first 2'].mean == pytest.approx(-.05)
  text = drafting.write_report(study, rows)
  assert '**+0.100** ± 0.001' in text and 'minus ce' in text


@pytest.mark.long
def test_a_study_trains_measures_and_resumes(tmp_path, capsys):
  study = _study(tmp_path, 'ce;tv_e2e;once:mtp.unroll=1', (2, 5),
                 warmup=dict(pool_steps=3, lr=3e-2), run=dict(progress=True))
  rows = drafting.run(study)
  assert 'seed 1, tv_e2e: 100%' in capsys.readouterr().err
  assert [(r['seed'], r['variant'], r['updates']) for r in rows] == [
      (s, v, n) for s in (0, 1) for v in ('ce', 'tv_e2e', 'once')
      for n in (2, 5)]
  assert all(0 < r['mtp_2/accept_cumulative'] < r['mtp_1/accept_expected'] < 1
             for r in rows)
  ce, e2e, once = (np.asarray([r['mtp_2/accept_expected'] for r in rows
                               if r['variant'] == v])
                   for v in ('ce', 'tv_e2e', 'once'))
  assert np.all(ce != e2e) and np.all(ce != once)
  # A seed that lost its last variants measures the same again.
  path = tmp_path / 'seed_1.jsonl'
  path.write_text(''.join(path.read_text().splitlines(True)[:2]))
  assert drafting.run(study) == rows
  other = study._replace(updates=[2, 4])
  with pytest.raises(config_lib.ConfigError, match='differs in updates'):
    drafting.run(other)
