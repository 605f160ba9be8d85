"""Comparisons: grid, statistics, processes, and one small one for real."""

import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from configs import from_json
from mtp_rl import config as config_lib
from mtp_rl import config_io, estimators, trainer
from mtp_rl.compare import grid, jobs, study, summary
from mtp_rl.report import comparison_figures, intervals
from mtp_rl.run import metrics
from tests import conftest


@pytest.mark.parametrize('freedom, t', [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706),
    (9, 2.2622), (30, 2.0423)])
def test_an_interval_has_the_tables_t(freedom, t):
  values = list(range(freedom + 1))
  found = intervals.interval(values)
  deviation = statistics.stdev(values) / math.sqrt(len(values))
  assert (found.high - found.mean) / deviation == pytest.approx(t, abs=5e-5)


def test_interval_by_hand():
  # Mean 3, standard deviation sqrt(2.5), half-width 2.7764 sqrt(2.5 / 5).
  found = intervals.interval([1., 2., 3., 4., 5.])
  assert found.mean == 3. and found.n == 5
  assert found.high - 3. == pytest.approx(1.96324, abs=1e-4)
  assert 3. - found.low == pytest.approx(found.high - 3.)
  assert intervals.interval([2.]) == (2., None, None, 1)
  assert intervals.interval([]) is None


def test_pairs_are_of_one_seed_and_others_are_left_out():
  found = intervals.paired({0: 1., 1: 5., 3: 9.}, {0: .5, 2: 100., 3: 8.})
  assert found.mean == pytest.approx(.75) and found.n == 2
  assert intervals.paired({0: 1.}, {1: 1.}) is None


def test_holm_by_hand():
  # n = 2: t has one degree of freedom, p = 1 - 2 / pi atan(t).
  pair = lambda mean, gap: intervals.interval([mean - gap, mean + gap])
  assert intervals.p_value(pair(1., 1.)) == pytest.approx(.5)
  assert intervals.p_value(pair(1., math.tan(math.pi * .005))) == pytest.approx(
      .01)
  found = {name: pair(1., math.tan(math.pi * p / 2)) for name, p in (
      ('a', .01), ('b', .03), ('c', .02), ('d', .6))}
  # .01 <= .05 / 4 stands; .02 > .05 / 3 does not, nor does what follows.
  assert intervals.holm(found) == {'a'}
  assert intervals.holm(found, .08) == {'a', 'b', 'c'}
  alike = {0: intervals.interval([0., 0.]),
           1: intervals.interval([.3, .4 - .1]),
           2: intervals.interval([3.])}
  assert intervals.holm(alike) == set()  # no spread: nothing can be tested
  assert not any(map(intervals.told, alike.values()))
  assert intervals.told(pair(1., .07)) and not intervals.told(pair(1., 1.))


def test_wilson_by_hand():
  # z = 1.96, 1 of 10: centre (.1 + z^2 / 20) / (1 + z^2 / 10) = .21101, half
  # z sqrt(.1 * .9 / 10 + z^2 / 400) / (1 + z^2 / 10) = .19314.
  found = intervals.share(1, 10)
  assert found.mean == .1 and found.n == 10
  assert found.low == pytest.approx(.01788, abs=1e-5)
  assert found.high == pytest.approx(.40415, abs=1e-5)
  assert intervals.share(0, 20).low == 0. and intervals.share(0, 0) is None


def test_fisher_by_hand():
  # No seed of 11 against 6: the tables as far out, or further, have all six of
  # 22 on one side, so p = 2 (11 over 6) / (22 over 6).
  share = intervals.share
  p = intervals.shares_differ(share(0, 11), share(6, 11))
  assert p == pytest.approx(2 * math.comb(11, 6) / math.comb(22, 6))
  assert p == intervals.shares_differ(share(6, 11), share(0, 11))
  assert intervals.shares_differ(share(2, 3), share(2, 3)) == 1.


def test_mcnemar_by_hand():
  # Five seeds one way and none the other: p = 2 / 2^5; the tie and the seed
  # that one of them lacks say nothing.
  a = {s: True for s in range(6)} | {9: True}
  b = {s: s == 5 for s in range(6)}
  assert intervals.pairs_differ(a, b) == intervals.pairs_differ(b, a) == 1 / 16
  assert intervals.pairs_differ(b, b) == intervals.pairs_differ({}, b) == 1.


def test_shares_of_seeds_that_solve_a_task():
  variants = grid.free_variants(
      conftest.tiny_config(), 'a:mtp.regime=detach;b:mtp.regime=detach')
  runs = {v.name: {s: [{'step': 0, 'val/x/greedy': x}]
                   for s, x in enumerate(seen)}
          for v, seen in zip(variants, ((.5, .9, 1.), (.89, .5, .5)))}
  rows = summary.compare(variants, runs)
  text = summary.markdown(rows, 'title', .9)
  assert "Fisher's p against a" in text
  assert '| a | 2 of 3 | [0.21, 0.94] |  |  |' in text
  assert '| b | 0 of 3 | [0.00, 0.56] | 0.4 | 0.5 |' in text
  assert '| minus a |' in text  # the first is the baseline of its regime
  assert 'Wilson' not in summary.markdown(rows, 'title')
  assert comparison_figures.differences(rows, 'greedy') == [
      ('b', 'a', 'detach', rows[1]['against']['detach']['greedy'])]
  runs = {name: {0: [{'step': 1, 'reward/mean': 1.}]} for name in 'ab'}
  assert 'Wilson' not in summary.markdown(
      summary.compare(variants, runs), 'title', .9)


def test_the_reward_of_a_step_is_that_of_all_its_draws():
  rows = [{'step': 1, 'reward/mean': .9, 'reward/drawn_mean': .2},
          {'step': 2, 'reward/mean': .4}]
  assert summary.run_values(rows)['reward'] == pytest.approx(.3)


def test_values_of_a_run():
  rows = [{'step': 0, 'val/a/greedy': .1, 'val/a/avg@4': .1,
           'after_warmup/loss': .5, 'after_warmup/floor': .3},
          {'step': 1, 'reward/mean': .2, 'occ/lambda': .5,
           'timing_s/update': 9.},
          {'step': 2, 'reward/mean': .4, 'occ/lambda': None,
           'timing_s/update': 1.},
          {'step': 3, 'reward/mean': .6, 'occ/lambda': .1, 'val/a/greedy': .8,
           'val/b/greedy': .6, 'val/a/avg@4': .5, 'mtp_1/accept_top1': .9,
           'mtp_1/accept_expected': .7, 'timing_s/update': 2.}]
  assert summary.run_values(rows) == pytest.approx({
      'greedy': .7, 'avg': .5, 'reward': .4, 'acceptance': .9,
      'accept_expected': .7, 'lambda': .3, 'update_s': 2.,
      'greedy/a': .8, 'greedy/b': .6, 'warmup_loss': .5, 'warmup_floor': .3})
  assert summary.run_values([]) == {}


def test_rewards_in_equal_seconds(tmp_path):
  """4 steps of 1 s beside 4 of 2 s: in 4 s the slower run makes two."""
  variants = grid.free_variants(
      conftest.tiny_config(), 'still:mtp.regime=detach;joint:mtp.regime=policy')
  def run(step_s, rewards):
    times = [90., *[step_s] * (len(rewards) - 1)]  # the first step compiles
    return [{'step': 0}, *[
        {'step': i + 1, 'reward/mean': r, 'timing_s/step': s}
        for i, (r, s) in enumerate(zip(rewards, times))]]
  runs = {'still': {0: run(1., [.1, .2, .3, .4]), 1: run(1., [.1] * 4)},
          'joint': {0: run(2., [.2, .4, .6, .8])}}
  still, joint = summary.compare(variants, runs, seconds=True)
  assert still['values']['reward_s'] == pytest.approx({0: .25})
  assert joint['values']['reward_s'] == pytest.approx({0: .3})
  assert joint['values']['step_s'] == {0: 2.}
  assert joint['against']['detach']['reward_s'].mean == pytest.approx(.05)
  assert 'reward_s' not in summary.compare(variants, runs)[0]['mean']
  none = {n: {0: [{'step': 0, 'val/x/greedy': .5}]} for n in runs}  # no RL
  assert 'reward_s' not in summary.compare(variants, none, True)[0]['mean']
  comparison_figures.reward_by_seconds(variants, runs, [still, joint],
                                       str(tmp_path), 'title')
  assert (tmp_path / 'seconds.png').stat().st_size > 10_000


def test_drafts_in_a_row_are_compared_where_there_are_several():
  variants = grid.free_variants(
      conftest.tiny_config(), 'still:mtp.regime=detach;joint:mtp.regime=policy')
  def text(more, *, second=False):
    row = lambda length: [{'step': 1, 'reward/mean': 0.,
                           'mtp_1/accept_expected': .5,
                           'mtp/accept_length': length,
                           'mtp_1/accept_cumulative': .5,
                           'mtp_2/accept_cumulative':
                               length - .5 if second else None}]
    return summary.markdown(summary.compare(variants, {
        'still': {0: row(.5), 1: row(.7)},
        'joint': {0: row(.5 + more), 1: row(.7 + 1.001 * more)}}), 'title')

  table = text(.2, second=True).split('minus still')[1]
  assert '| drafts accepted | drafts accepted in a row |' in table
  assert '**+0.200**\\* [+0.199, +0.201]' in table
  by_depth = text(.2, second=True).split('| first 1 pass | first 2 pass |')
  assert '| joint | 2 | 0.500 | 0.300 |' in by_depth[1]
  assert '| joint | 2 | +0.000 [+0.000, +0.000] | **+0.200**' in by_depth[2]
  assert 'in a row' not in text(0.) and 'pass |' not in text(0.)


def test_several_held_out_sets_have_a_table_of_their_own():
  config = conftest.tiny_config()
  variants = grid.free_variants(
      config, 'still:mtp.regime=detach;joint:mtp.regime=policy')
  row = lambda a, b: [{'step': 1, 'reward/mean': 0., 'val/a/greedy': a,
                       'val/b/greedy': b}]
  text = summary.markdown(summary.compare(variants, {
      'still': {0: row(.1, .5), 1: row(.3, .5)},
      'joint': {0: row(.2, .4), 1: row(.4001, .2)}}), 'title')
  means, by_set = text.split('| variant | seeds | held-out greedy, a |')
  assert 'held-out greedy, a' not in means
  assert '| joint | 2 | 0.300 | 0.300 |' in by_set
  assert '| joint | 2 | **+0.100** [+0.099, +0.101] | −0.200 [' in (  # noqa: RUF001
      by_set.replace(r'\*', ''))
  one = [{'step': 1, 'reward/mean': 0., 'val/a/greedy': .5}]
  assert 'held-out greedy, a' not in summary.markdown(summary.compare(
      variants, {'still': {0: one}, 'joint': {0: one}}), 'title')


@pytest.mark.parametrize('preset', grid.PRESETS)
def test_every_variant_of_a_preset_can_run_and_differs(preset):
  base = conftest.tiny_config()
  variants = grid.preset_variants(base, preset)
  assert grid.check(base, variants + variants) == variants
  assert len({repr(v.config) for v in variants}) == len(variants)
  assert base == conftest.tiny_config()
  assert len({v.group for v in variants}) == len(grid.OBJECTIVES[preset]) * (
      1 if preset == 'pareto' else 2)
  for v in variants:
    joint = v.group.endswith('paper')
    assert v.config.optim.clip_mode == ('joint' if joint else 'separate')
    assert (v.config.mtp.psi_loss == 'theta') == joint
    ppo = v.config.rl.loss == 'ppo'
    assert v.config.rl.dual_clip == (0 if not ppo else 10 if joint else 3)
    for regime in summary.BASELINES:
      assert summary.baseline(variants, v.group, regime).label == regime


def test_presets_hold_what_they_promise():
  base = conftest.tiny_config()
  labels = lambda *args, **kw: [v.label for v in grid.preset_variants(
      base, *args, clips=['paper'], **kw)]
  assert labels('table1', objectives=['gspo'], coef=.5) == [
      'rl_only', 'detach', 'ce-0.5', 'policy-0.5', 'occ-logprob']
  assert [f'policy-{x}' for x in ('0.1', '0.2', '0.5', '1')] == labels(
      'table2')[2:6]
  assert labels('trace', estimators=['curvature'])[2:] == ['occ-curvature']
  assert len(labels('trace')) == 2 + len(estimators.ESTIMATORS)
  with pytest.raises(config_lib.ConfigError, match='table3'):
    labels('table3')
  with pytest.raises(config_lib.ConfigError, match='magic'):
    labels('trace', estimators=['magic'])


def test_free_variants():
  a, b, c = grid.free_variants(
      conftest.tiny_config(),
      'a:mtp.regime=policy,mtp.coef=1,run.progress=true ; b:rl.dual_clip=0;c:')
  assert (a.config.mtp.regime, a.config.mtp.coef) == ('policy', 1.)
  assert a.config.run.progress is True and b.config.rl.dual_clip == 0
  assert c.config == conftest.tiny_config()


@pytest.mark.parametrize('text, overridden, said', [
    ('a:mtp.regme=occ', (), "'mtp.regme' does not exist"),
    ('a:mtp=1', (), "'mtp' does not exist"),
    ('a:rl.group=many', (), "rl.group='many' is no int"),
    ('a:run.progress=1', (), 'is no bool'),
    ('a:mtp.regime', (), 'section.field=value'),
    ('../a:', (), 'cannot name a directory'),
    ('cache:', (), 'cannot be called cache'),
    ('a:seed=3', (), 'seed'),
    ('a:mtp.modules=2', (), 'which all variants of a comparison share'),
    ('a:mtp.kind=parallel', (), 'which all variants of a comparison share'),
    ('a:mtp.lora_rank=4', (), 'which all variants of a comparison share'),
    ('a:warmup.init=x', (), 'changes warmup.init, which all'),
    ('a:rl.loss=gspo', (), 'variant a: rl.loss=gspo has no dual clip'),
    ('a:;a:rl.lr=1', (), 'two variants are called a'),
    ('a:rl.lr=1', ('rl.lr',), '--config.rl.lr is overruled by variant a'),
    ('', (), '--preset')])
def test_what_cannot_be_compared_is_named(text, overridden, said):
  base = conftest.tiny_config()
  with pytest.raises(config_lib.ConfigError, match=said) as error:
    grid.check(base, grid.free_variants(base, text), overridden)
  assert '\n' not in str(error.value)


def test_runs_may_run_answers_only_where_the_command_says_so(tmp_path):
  for allowed in (False, True):
    base = conftest.tiny_config(task=dict(allow_eval=allowed))
    made = study.plan(study.Study(base, grid.check(
        base, grid.free_variants(base, 'a:')), [3], str(tmp_path)))
    for job in made:
      assert ('--config.task.allow_eval=true' in job.command) == allowed


def test_a_variant_that_changes_the_warm_up_has_its_own(tmp_path):
  base = conftest.tiny_config(warmup=dict(steps=2))
  def plan(text):
    variants = grid.check(base, grid.free_variants(base, text))
    todo = study.plan(study.Study(base, variants, [3], str(tmp_path / text[0])))
    config = lambda job: from_json.get_config(job.command[3].split(':', 1)[1])
    return {j.name: (j.after, config(j).warmup) for j in todo}

  todo = plan('some:;own:warmup.mtp_coef=0')
  shared = str(tmp_path / 's' / 'warmup' / 'seed_3')
  assert list(todo) == ['warmup/seed_3', 'some/seed_3', 'own/seed_3']
  assert todo['some/seed_3'][0] == 'warmup/seed_3'
  assert todo['some/seed_3'][1].init == shared
  after, own = todo['own/seed_3']
  assert (after, own.init, own.steps, own.mtp_coef) == ('', '', 2, 0.)
  assert list(plan('own:warmup.mtp_coef=0')) == ['own/seed_3']

  base.warmup.init = shared
  with pytest.raises(config_lib.ConfigError, match='changes warmup.mtp_coef'):
    plan('own:warmup.mtp_coef=0')


def test_runs_from_another_warm_up_or_config_are_refused(tmp_path):
  """A warm-up of the comparison's own may have moved with its directory."""
  base = conftest.tiny_config(warmup=dict(steps=2))
  def made(text, init=''):
    base.warmup.init = init
    return study.Study(base, grid.free_variants(base, text), [3],
                       str(tmp_path))
  def there(init):
    config = study._config(found, found.variants[0], 3)
    config.warmup.init = init
    workdir = found.path('a', 3)
    os.makedirs(workdir, exist_ok=True)
    metrics.write_json(os.path.join(workdir, 'config.json'),
                       config_io.to_dict(config))
    metrics.write_json(os.path.join(workdir, 'summary.json'),
                       {'status': 'complete'})

  found = made('a:rl.lr=.1')
  there('elsewhere/warmup/seed_3')
  study.plan(found)
  with pytest.raises(config_lib.ConfigError, match='differs in rl.lr'):
    study.write_report(made('a:rl.lr=.2'))
  found = made('a:rl.lr=.1', init='A')
  there('A')
  study.plan(found)
  for refused in (study.plan, study.write_report):
    with pytest.raises(config_lib.ConfigError, match='differs in warmup.init'):
      refused(made('a:rl.lr=.1', init='B'))


def test_a_config_file_is_a_config(tmp_path):
  config = config_lib.preset(conftest.tiny_config(), 'gspo,paper')
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(config_io.to_dict(config)))
  assert from_json.get_config(str(path)) == config
  with pytest.raises(config_lib.ConfigError, match='after a colon'):
    from_json.get_config()


def _job(tmp_path, name, code, after=''):
  """A job that is complete once its file exists."""
  mark = tmp_path / name
  code = f'import os, sys, time; mark = {str(mark)!r}; {code}'
  return jobs.Job(name, [sys.executable, '-c', code],
                  str(tmp_path / 'logs' / name), mark.exists, after)


_DONE = 'open(mark, "w")'


def test_jobs_fail_alone_and_hold_up_only_what_needs_them(tmp_path):
  (tmp_path / 'old').write_text('')
  todo = [_job(tmp_path, 'old', 'raise SystemExit("started again")'),
          _job(tmp_path, 'bad', 'print("one\\n"); sys.exit("the reason")'),
          _job(tmp_path, 'needs_bad', _DONE, 'bad'),
          _job(tmp_path, 'lazy', ''),
          _job(tmp_path, 'good', _DONE),
          _job(tmp_path, 'needs_good', 'assert os.path.exists(mark[:-10] + '
               f'"good"); {_DONE}', 'good')]
  seen = []
  failed = jobs.run(todo, 2, lambda: False,
                    lambda job, problem: seen.append(job.name))
  assert failed == {
      'bad': 'exit status 1: the reason',
      'needs_bad': 'not started, because bad failed',
      'lazy': 'exit status 0: it printed nothing'}
  assert sorted(seen) == sorted(job.name for job in todo)
  assert not os.path.exists(tmp_path / 'logs' / 'old')
  assert jobs.last_line(tmp_path / 'logs' / 'bad') == 'the reason'


def test_cores_are_shared_out_and_ours_are_kept(tmp_path):
  assert jobs.share([0, 1, 2, 3], 2) == [(0, 2), (1, 3)]
  assert jobs.share([4, 5], 3) == [(4,), (5,), (4,)]
  assert jobs.share([], 2) == [(), ()]
  before = jobs.available_cores()
  if not before:
    pytest.skip('this system has no affinity')
  code = f'print(sorted(os.sched_getaffinity(0))); {_DONE}'
  assert not jobs.run([_job(tmp_path, 'a', code)], len(before),
                      lambda: False, lambda *_: None)
  assert jobs.last_line(tmp_path / 'logs' / 'a') == str(before[:1])
  assert jobs.available_cores() == before


def test_what_the_user_set_goes_before_our_settings_of_malloc(
    tmp_path, monkeypatch):
  for name, seen in (('mine', 'mine'), (None, jobs.MALLOC)):
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    if name:
      monkeypatch.setenv('GLIBC_TUNABLES', name)
    assert study._environment(tmp_path)['GLIBC_TUNABLES'] == seen


def test_a_stop_reaches_the_processes_and_the_same_call_resumes(tmp_path):
  code = ('import signal; signal.signal(signal.SIGTERM, lambda *_: (print('
          '"clean end", flush=True), sys.exit(0))); print("ready", flush=True);'
          'time.sleep(0 if os.path.exists(mark + "2") else 60); ' + _DONE)
  todo = [_job(tmp_path, n, code) for n in ('a', 'b', 'c')]
  logs = [tmp_path / 'logs' / n for n in ('a', 'b')]
  ready = lambda: all(p.exists() and 'ready' in p.read_text() for p in logs)
  start = time.monotonic()
  assert jobs.run(todo, 2, ready, lambda *_: None) == {}
  assert time.monotonic() - start < 30
  assert [jobs.last_line(p) for p in logs] == ['clean end'] * 2
  assert not (tmp_path / 'logs' / 'c').exists()
  for job in todo:
    (tmp_path / (job.name + '2')).write_text('')
  assert jobs.run(todo, 2, lambda: False, lambda *_: None) == {}
  assert all(job.complete() for job in todo)


_OUTER = """
import sys
from mtp_rl.compare import jobs
from mtp_rl.run import signals
inner, log, fd = sys.argv[1:]
with signals.interruptible(at_once=jobs.kill):
  job = jobs.Job('a', [sys.executable, '-c', inner], log, lambda: False)
  jobs.run([job], 1, lambda: False, lambda *_: None, keep_open=[int(fd)])
"""
_INNER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],
                 close_fds=False)
print('ready', flush=True)
time.sleep(600)
"""


def test_a_second_signal_leaves_no_process_behind(tmp_path):
  """Not even one that the killed process had started."""
  log, (read, write) = tmp_path / 'log', os.pipe()
  child = subprocess.Popen(
      [sys.executable, '-c', _OUTER, _INNER, str(log), str(write)],
      cwd=conftest.ROOT, stderr=subprocess.PIPE, pass_fds=[write])
  os.close(write)  # all others inherit it: the pipe ends with the last of them
  with child.stderr, open(read, 'rb') as pipe:
    try:
      while not log.exists() or 'ready' not in log.read_text():
        assert child.poll() is None
        time.sleep(.05)
      child.send_signal(signal.SIGTERM)
      while b'once more' not in child.stderr.readline():
        assert child.poll() is None
      assert not select.select([pipe], [], [], 0)[0]
      child.send_signal(signal.SIGTERM)
      assert child.wait(20) == 143
      assert select.select([pipe], [], [], 20)[0] and not pipe.read()
    finally:
      child.kill()


def _study(workdir, **rl):
  base = conftest.tiny_config(
      rl=dict(steps=2) | rl, warmup=dict(steps=2), eval=dict(every=1))
  text = 'still:mtp.regime=rl_only;cut:mtp.regime=detach'
  return study.Study(base, grid.check(base, grid.free_variants(base, text)),
                     [0, 1], str(workdir))


def _mostly_here(todo, *args, real=jobs.run):
  """Do all jobs but the last in this process, which is quicker."""
  for job in todo[:-1]:
    config = from_json.get_config(job.command[3].split(':', 1)[1])
    call = {'experiments.pretrain': trainer.pretrain,
            'experiments.train': trainer.train}[job.command[2]]
    call(config, job.command[4].removeprefix('--workdir='))
    assert job.complete()
  return real([todo[-1]._replace(after='')], *args)


@pytest.fixture(scope='module', name='real')
def _real(tmp_path_factory):
  """A comparison of two variants over two seeds."""
  found = _study(tmp_path_factory.mktemp('compare'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR',
                 jax.config.jax_compilation_cache_dir)
    patch.setenv('JAX_NUM_CPU_DEVICES', '8')  # as here: one cache serves both
    patch.setattr(jobs, 'run', _mostly_here)
    assert study.run(found, 1) == ({}, False)
  return found


@pytest.mark.long
def test_a_comparison_from_warm_up_to_figures(real, monkeypatch):
  for name in ('warmup', 'still', 'cut'):
    for seed in (0, 1):
      config = config_io.load(os.path.join(real.path(name, seed),
                                            'config.json'))
      assert config.seed == seed
      if name != 'warmup':
        assert config.warmup.init == real.path('warmup', seed)
  with open(study.write_report(real), encoding='utf-8') as f:
    text = f.read()
  assert '| minus cut |' in text and '| minus still |' in text
  assert 'Wilson' not in text
  path = study.write_report(real, least=0., seconds=True)
  with open(path, encoding='utf-8') as f:
    text = f.read()
  assert '| cut | 2 of 2 | [0.34, 1.00] |' in text
  assert '| reward in equal seconds |' in text
  assert os.path.exists(os.path.join(real.workdir, 'figures', 'seconds.png'))
  with open(os.path.join(real.workdir, 'comparison.json'),
            encoding='utf-8') as f:
    still, cut = json.load(f)['variants']
  assert still['seeds'] == [0, 1] and list(cut['against']) == ['rl_only']
  difference = cut['against']['rl_only']['reward']
  values = [cut['values']['reward'][s] - still['values']['reward'][s]
            for s in ('0', '1')]
  assert difference['mean'] == pytest.approx(sum(values) / 2)
  assert difference['n'] == 2 and difference['low'] <= difference['mean']
  assert still['values']['acceptance'].keys() == {'0', '1'}
  for name in ('learning', 'forest'):
    with open(os.path.join(real.workdir, 'figures', name + '.png'), 'rb') as f:
      assert f.read(4) == b'\x89PNG'
  with open(os.path.join(real.workdir, 'comparison.html'),
            encoding='utf-8') as f:
    page = f.read()
  for name in ('still', 'cut'):
    assert f'"{name}/seed_1/report.html"' in page
    assert os.path.exists(os.path.join(real.path(name, 1), 'report.html'))

  monkeypatch.setattr(jobs.subprocess, 'Popen', None)  # nothing may start
  assert study.run(real, 2) == ({}, False)


@pytest.mark.filterwarnings('error')
def test_the_trade_of_drafts_against_accuracy_is_drawn(tmp_path, monkeypatch):
  base = conftest.tiny_config()
  variants = grid.preset_variants(base, 'pareto')
  row = lambda acc, drafts: {'step': 1, 'val/a/avg@4': acc,
                             'mtp_1/accept_expected': drafts}
  runs = {v.name: {s: [row(.1 * s + .01 * i, .5 + .02 * i * s)]
                   for s in (1, 2)} for i, v in enumerate(variants)}
  rows = summary.compare(variants, runs)
  comparison_figures.trade(rows, str(tmp_path), 'title')
  assert (tmp_path / 'trade.png').stat().st_size > 10_000
  found = {r['label']: r['against'].get('detach', {}) for r in rows}
  # The second variant is detach, the third ce-0.1: .01 more at each seed.
  assert found['ce-0.1']['avg'].mean == pytest.approx(.01)
  assert found['ce-0.1']['accept_expected'].mean == pytest.approx(.03)
  for some in runs.values():
    for (one,) in some.values():
      one |= {'mtp_1/accept_cumulative': .5, 'mtp_2/accept_cumulative': .1,
              'mtp/accept_length': .6}
  drawn = []
  monkeypatch.setattr(comparison_figures.style, 'save',
                      lambda figure, *_: drawn.append(figure.axes[0]))
  for measured in (rows, summary.compare(variants, runs)):
    comparison_figures.trade(measured, '', 'title')
  assert [axis.get_xlabel() for axis in drawn] == [
      'drafts accepted, minus detach', 'drafts accepted in a row, minus detach']


def _warmed_up(study_, losses):
  """Write complete runs without RL: name of a warm-up -> its losses by seed."""
  for v in study_.variants:
    for seed in study_.seeds:
      os.makedirs(study_.path(v.name, seed))
      for name, row in (('summary.json', {'status': 'complete'}),
                        ('config.json', config_io.to_dict(v.config) | {
                            'seed': seed}),
                        ('metrics.jsonl', {'step': 0, 'val/x/greedy': .5})):
        with open(os.path.join(study_.path(v.name, seed), name), 'w',
                  encoding='utf-8') as f:
          f.write(json.dumps(row) + '\n')
  for name, by_seed in losses.items():
    for seed, each in enumerate(by_seed):
      os.makedirs(study_.path(name, seed), exist_ok=True)
      with open(os.path.join(study_.path(name, seed), 'warmup.jsonl'), 'w',
                encoding='utf-8') as f:
        f.writelines(json.dumps({'step': i, 'warmup/loss': x}) + '\n'
                     for i, x in enumerate(each))


@pytest.mark.parametrize('own', [True, False])
def test_warm_ups_are_drawn_seed_by_seed(tmp_path, monkeypatch, own):
  """One that all variants share says nothing about them, and is not drawn."""
  base = conftest.tiny_config(warmup=dict(steps=3), rl=dict(steps=0))
  variants = grid.free_variants(base, 'shared:rl.lr=.1;other:' + (
      'warmup.mtp_coef=2' if own else 'rl.lr=.2'))
  found = study.Study(base, variants, [0, 1], str(tmp_path))
  _warmed_up(found, {'warmup': ([2., 1., 1.], [2., None, 2.])} | (
      {'other': ([2., .5, .5], [2., .25, .25])} if own else {}))
  drawn = {}
  monkeypatch.setattr(comparison_figures.style, 'save',
                      lambda figure, _, name: drawn.update({name: figure}))
  study.write_report(found)
  assert 'learning' not in drawn  # no step of RL
  assert ('warmup' in drawn) == own
  if own:
    lines = drawn['warmup'].axes[0].lines
    np.testing.assert_array_equal([x.get_ydata() for x in lines], [
        [2., 1., 1.], [2., np.nan, 2.], [2., .5, .5], [2., .25, .25]])
    assert [x.get_label() for x in lines][::2] == ['shared', 'other']
    assert len({x.get_color() for x in lines}) == 2


def test_a_garbled_warm_up_is_named(tmp_path):
  base = conftest.tiny_config(warmup=dict(steps=3), rl=dict(steps=0))
  found = study.Study(base, grid.free_variants(
      base, 'a:warmup.mtp_coef=0;b:warmup.mtp_coef=2'), [0], str(tmp_path))
  _warmed_up(found, {'a': ([2., 1.],)})
  path = os.path.join(found.path('a', 0), 'warmup.jsonl')
  with open(path, 'a', encoding='utf-8') as f:
    f.write('{"step": 2}\n{"step": 3, "warmup/loss": 1.0}\n')
  with pytest.raises(config_lib.ConfigError, match=r'warmup\.jsonl'):
    study.write_report(found)


@pytest.mark.filterwarnings('error')
@pytest.mark.long
def test_figures_do_without_the_runs_of_a_variant(real, tmp_path):
  runs = summary.collect(real.variants, real.seeds, real.path)
  runs['still'] = {}
  rows = summary.compare(real.variants, runs)
  comparison_figures.draw_all(real.variants, runs, rows, str(tmp_path),
                              'title')
  assert 'against' in rows[1] and not rows[1]['against']['rl_only']
  assert (tmp_path / 'learning.png').exists()


@pytest.mark.long
def test_a_missing_run_is_named_and_its_seed_left_out(real, monkeypatch):
  with monkeypatch.context() as patch:
    hidden = real.path('cut', 1)
    complete = summary.is_complete
    patch.setattr(summary, 'is_complete',
                  lambda w: w != hidden and complete(w))
    with open(study.write_report(real, {}), encoding='utf-8') as f:
      text = f.read()
    assert 'Without a complete run: cut/seed_1.' in text
    started = []
    patch.setattr(jobs, 'run', lambda todo, *_: started.extend(todo) or {})
    study.run(real, 2)
  assert [job.name for job in started] == ['cut/seed_1']
  assert started[0].after == ''


@pytest.mark.long
def test_another_config_in_the_same_workdir_is_refused(real):
  with pytest.raises(config_lib.ConfigError, match='differs in rl.lr'):
    study.run(_study(real.workdir, lr=.5), 2)


@pytest.mark.long
def test_a_second_comparison_in_one_workdir_is_refused(real):
  with (study._alone(real.workdir),
        pytest.raises(config_lib.ConfigError, match='another comparison')):
    study.run(real, 2)


@pytest.mark.long
def test_a_signal_stops_a_comparison_and_nothing_is_reported_failed(
    real, tmp_path, monkeypatch):
  slow = [_job(tmp_path, 'slow', 'print("ready", flush=True); time.sleep(60)')]
  monkeypatch.setattr(study, 'plan', lambda _: slow)
  log = tmp_path / 'logs' / 'slow'

  def interrupt():
    while not (log.exists() and 'ready' in log.read_text()):
      time.sleep(.05)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=interrupt)
  thread.start()
  assert study.run(real, 1) == ({}, True)
  thread.join()
  with pytest.raises(config_lib.ConfigError, match='no complete run'):
    study.write_report(real._replace(workdir=str(tmp_path)))
