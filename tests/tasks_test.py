"""Tasks: headroom by construction, splits, strict scoring, the worker."""

import os
import signal
import threading
import time

import pytest

from mtp_rl import config as config_lib
from mtp_rl import tasks
from mtp_rl.tasks import generated, workers


def _make(seed=0, **kw):
  return tasks.make(config_lib.Config(seed=seed, task=config_lib.Task(**kw)))


def _sums(prompt):
  digits = [int(c) for c in prompt[:-1]]
  return ''.join(str(sum(digits[:i + 1]) % 10) for i in range(len(digits)))


def test_arithmetic_solutions_are_running_sums():
  task = _make()
  for example in task.prompts(3, 50) + task.held_out()['arithmetic']:
    assert example.solution == _sums(example.prompt)
    assert example.answer == example.solution[-1]
    assert 4 <= len(example.prompt) - 1 <= 6
  texts = [example.solution, f' {example.answer} ', '', 'x' + example.answer,
           example.answer + 'a']
  assert task.rewards([example] * 5, texts) == [1, 1, 0, 0, 0]


def test_prompts_are_a_function_of_seed_and_step():
  a, b = _make(), _make()
  assert a.prompts(7, 9) == b.prompts(7, 9) != a.prompts(8, 9)
  assert a.prompts(7, 9) != _make(seed=1).prompts(7, 9)
  assert a.supervised(7, 9) == b.supervised(7, 9)


def test_no_held_out_prompt_is_trained_on():
  task = _make(min_terms=2, max_terms=3, held_out=40)
  held_out = {e.prompt for e in task.held_out()['arithmetic']}
  trained = {e.prompt for step in range(30) for e in
             task.prompts(step, 50) + task.supervised(step, 50)}
  assert len(held_out) == 40 and not held_out & trained
  assert all(generated.is_held_out(p) for p in held_out)


def test_noise_is_as_ordered():
  """Noisy facts go wrong at the asked rate, always to the same sum."""
  task = _make(noisy_facts=40, noise=.5, held_out=8)
  seen = {}
  for step in range(60):
    for e in task.supervised(step, 50):
      for i in range(1, len(e.solution)):
        fact = int(e.solution[i - 1]), int(e.prompt[i])
        right = str(sum(fact) % 10)
        seen.setdefault(fact, []).append(
            (e.solution[i] == right, e.solution[i]))
  noisy = {f: v for f, v in seen.items() if not all(ok for ok, _ in v)}
  assert len(seen) == 100 and len(noisy) == 40
  for values in noisy.values():
    assert len({s for ok, s in values if not ok}) == 1
  flat = [ok for v in noisy.values() for ok, _ in v]
  assert abs(sum(flat) / len(flat) - .5) < .03
  assert all(e.solution == _sums(e.prompt)
             for e in _make(noisy_facts=0).supervised(0, 50))


@pytest.mark.parametrize('options, said', [
    (dict(min_terms=1, max_terms=1), 'empty'),
    (dict(min_terms=5, max_terms=4), 'task.min_terms=5'),
    (dict(noisy_facts=101), 'task.noisy_facts=101')])
def test_impossible_arithmetic_is_named(options, said):
  with pytest.raises(config_lib.ConfigError, match=said):
    _make(**options)


GYM = dict(name='reasoning_gym', dataset='spell_backward', size=200, held_out=9)


def test_reasoning_gym_splits_by_question_and_scores_strictly():
  task = _make(**GYM)
  held_out = task.held_out()['spell_backward']
  train = task.prompts(0, 300)
  assert len(held_out) == 9
  assert not {e.prompt for e in held_out} & {e.prompt for e in train}
  example = next(e for e in train if len(e.answer) > 4)
  part = example.answer[:-1] + '?'
  try:
    got = task.rewards([example] * 4, [
        example.answer, f'  {example.answer}\n', part, ''])
    assert got == [1., 1., 0., 0.]
    assert task.counts() == {'errors': 0, 'timeouts': 0, 'crashes': 0}
  finally:
    task.close()
  assert task.supervised(1, 5)[0].solution
  longest = max(len(e.prompt) for e in train)
  assert max(len(e.prompt) for e in task.probe()) >= longest


@pytest.mark.parametrize('options, said', [
    (dict(dataset=''), 'none of the .* data sets .*DATASETS'),
    (dict(dataset='spell_backwards'), 'such as spell_backward.* lists them'),
    (dict(options='{"min_word_len": -3}'), 'min_word_len'),
    (dict(options='{"colour": 1}'), 'colour'),
    (dict(options='[1]'), 'no JSON object'),
    (dict(dataset='countdown'), 'task.allow_eval=true'),
    (dict(dataset='spiral_matrix'), 'task.allow_eval=true'),
    (dict(dataset='composite', options='{"datasets": 1}'), 'cannot make'),
    (dict(dataset='complex_arithmetic', options='{}'), "score to 'nan'"),
    (dict(dataset='game_of_life_halting', options='{}'), "score to '"),
    (dict(dataset='coin_flip', options='{}'), 'the beginning of an answer'),
    (dict(size=1), 'raise task.size|is empty')])
def test_impossible_reasoning_gym_is_named(options, said):
  with pytest.raises(config_lib.ConfigError, match=said):
    _make(**{**GYM, **options})


def hostile_scorer():
  """Return a scorer that hangs, dies, raises or answers, as it is told."""
  def score(what):
    if what == 'hang':
      time.sleep(60)
    if what == 'slow':
      time.sleep(.6)
      return 1.
    if what == 'die':
      os._exit(1)
    if what == 'raise':
      raise ValueError('bad text')
    return float(what)
  return score


def test_a_pool_survives_hangs_crashes_and_errors():
  pool = workers.Pool(hostile_scorer, (), timeout_s=1., workers=2)
  score = lambda *texts: pool.score_all([t] for t in texts)
  try:
    pool.start()
    start = time.monotonic()
    got = score('1', 'raise', '0.5', 'hang', 'die', '.25', '1', 'hang', '1')
    assert got == [1., 0., .5, 0., 0., .25, 1., 0., 1.]
    assert time.monotonic() - start < 10
    assert pool.counts == {'errors': 1, 'timeouts': 2, 'crashes': 1}
    assert score('1') == [1.] and score() == []
    # Ctrl-C and SIGTERM reach the whole process group, here at work.
    for signum in (signal.SIGINT, signal.SIGTERM):
      for worker in pool._workers:
        threading.Timer(.3, os.kill, (worker.process.pid, signum)).start()
      assert score(*['slow', '1'] * 2) == [1.] * 4
    for worker in pool._workers:
      worker.process.kill()
      worker.process.join()
    assert score('1', '1', '.5') == [1., 1., .5]
    assert pool.counts['crashes'] == 1  # no answer was lost by these two
  finally:
    pool.close()


def greedy_scorer():
  """Return a scorer that takes the asked MiB of memory."""
  return lambda size: float(len(bytearray(int(size) * 2 ** 20)) > 0)


def writing_scorer():
  """Return a scorer that prints, and writes to the file that it is given."""
  def score(path):
    print('no one reads this' * 9999)
    with open(path, 'w', encoding='utf-8') as f:
      f.write('x')
    return 1.
  return score


def test_a_worker_writes_no_file(tmp_path, capfd):
  pool = workers.Pool(writing_scorer, (), timeout_s=20.)
  try:
    assert pool.score_all([[str(tmp_path / 'x')]]) == [0.]
    assert pool.counts['errors'] == 1 and not capfd.readouterr().out
    assert (tmp_path / 'x').stat().st_size == 0
  finally:
    pool.close()


def test_workers_that_do_not_start_are_one_sentence(monkeypatch):
  def refuse(*unused):
    raise OSError('AF_UNIX path too long')
  monkeypatch.setattr(workers, '_Worker', refuse)
  with pytest.raises(config_lib.ConfigError, match='too long.*TMPDIR'):
    workers.Pool(greedy_scorer, (), timeout_s=20.).start()


def test_the_server_that_forks_may_die_while_a_worker_starts(monkeypatch):
  pool = workers.Pool(greedy_scorer, (), timeout_s=20.)
  start, failed = pool._context.Process.start, []
  def dies(process):
    if len(failed) < 2:
      failed.append(1)
      raise EOFError('unexpected EOF')
    start(process)
  monkeypatch.setattr(pool._context.Process, 'start', dies)
  try:
    assert pool.score_all([['8']]) == [1.] and len(failed) == 2
  finally:
    pool.close()


def test_a_worker_that_takes_too_much_memory_is_replaced():
  pool = workers.Pool(greedy_scorer, (), timeout_s=20., memory_mb=256)
  try:
    assert pool.score_all([['8'], ['2048'], ['8']]) == [1., 0., 1.]
    assert pool.counts == {'errors': 0, 'timeouts': 0, 'crashes': 1}
  finally:
    pool.close()


def broken_scorer():
  """Raise, as where a package is missing."""
  raise ImportError('no such package')


def test_a_scorer_that_cannot_be_built_ends_the_run(monkeypatch):
  monkeypatch.setattr(workers, '_STARTS', 2)
  with pytest.raises(RuntimeError, match='does not start'):
    workers.Pool(broken_scorer, (), timeout_s=1.).score_all([['1']])


def test_unknown_task_is_named():
  with pytest.raises(config_lib.ConfigError, match='poker'):
    _make(name='poker')
