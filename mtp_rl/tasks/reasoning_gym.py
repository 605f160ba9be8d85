"""Any data set of the package reasoning-gym, scored strictly.

Questions are drawn once (task.size of them), duplicates dropped, and split by
question text. The package's own scorer judges the stripped completion; only
its full score earns the reward of 1. Scorers may parse what the model wrote,
so they run in worker processes with limits on time and memory; those that would
run it as Python are refused unless task.allow_eval is set.
"""

import contextlib
import difflib
import inspect
import json
import re
import sys
import warnings
import zlib

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tokenizers, types
from mtp_rl.tasks import verifiers, workers

HELD_OUT_SHARE = 8  # one question in 8, by checksum, is never trained on
_TRAIN, _SUPERVISED = range(2)
# Functions that run text as Python, sympy's as well.
_EVALUATES = re.compile(r'\b(?:eval|exec|parse_expr|sympify)\(')
_JUNK = 'nan', '?', ''  # no answer to anything
_PROBED = 64  # questions that junk is tried on
_GENEROUS = 'coin_flip',  # also gives its full score to '0' for 0.25


def _create(dataset, options, size, seed):
  import reasoning_gym  # an extra: imported when the task is used
  return reasoning_gym.create_dataset(dataset, size=size, seed=seed, **options)


def scorer(dataset, options, size, seed):
  """Return the package's scorer (index, completion) -> score, for a worker."""
  data = _create(dataset, options, size, seed)
  return lambda index, text: data.score_answer(text, data[index])


def evaluates(data):
  """Return whether a data set's own scorer may run an answer as Python.

  Read is the source of its module, so one that evaluates elsewhere counts too.
  """
  import reasoning_gym
  own, base = type(data), reasoning_gym.dataset.ProceduralDataset
  return own.score_answer is not base.score_answer and bool(_EVALUATES.search(
      inspect.getsource(sys.modules[own.__module__])))


def rewards_junk(data, entries):
  """Return text that earns a full score without answering, or None."""
  for entry in entries[:_PROBED]:
    for text in _JUNK:
      with (contextlib.suppress(Exception),  # a scorer may raise anything
            warnings.catch_warnings(action='ignore')):
        if str(entry['answer']).strip() != text and (
            data.score_answer(text, entry) >= 1.):
          return text
  return None


def make(task_config: config_lib.Task, seed):
  """Return the `ReasoningGym` task of a `config.Task`.

  Raises:
    config.ConfigError: the package is missing, the data set or its options
      are unknown, or its scorer evaluates answers or rewards junk.
  """
  try:
    options = json.loads(task_config.options)
    if not isinstance(options, dict):
      raise ValueError('not a JSON object')
  except ValueError as e:
    raise config_lib.ConfigError(
        f'task.options={task_config.options!r} is no JSON object: {e}') from e
  args = (task_config.dataset, options, task_config.size, seed)
  try:
    from reasoning_gym import factory
    data = _create(*args)
    entries = [data[i] for i in range(len(data))]
  except ImportError as e:
    raise config_lib.ConfigError(
        'task.name=reasoning_gym needs the package reasoning-gym; install it '
        f"with pip install -e '.[gym]' ({e})") from e
  except Exception as e:  # a data set can raise anything
    known = factory.DATASETS
    if task_config.dataset not in known:
      near = difflib.get_close_matches(task_config.dataset, known)
      raise config_lib.ConfigError(
          f'task.dataset={task_config.dataset!r} is none of the {len(known)} '
          f'data sets of reasoning_gym, such as '
          f'{", ".join(near or sorted(known)[:3])}; python -c "from '
          'reasoning_gym import factory; print(*factory.DATASETS)" lists them'
      ) from e
    raise config_lib.ConfigError(
        f'reasoning_gym cannot make task.dataset={task_config.dataset!r} with '
        f'task.options={task_config.options}: {e}') from e
  if evaluates(data) and not task_config.allow_eval:
    raise config_lib.ConfigError(
        f"reasoning_gym's scorer of {task_config.dataset!r} may run answers as "
        'Python, with the rights of this user; set task.allow_eval=true where '
        'that can do no harm, such as in a container (experiments.diagnose: '
        '--allow_eval), or choose another task.dataset')
  junk = rewards_junk(data, entries)
  if junk is not None or task_config.dataset in _GENEROUS:
    what = "the beginning of an answer" if junk is None else repr(junk)
    raise config_lib.ConfigError(
        f"reasoning_gym's scorer of {task_config.dataset!r} gives its full "
        f'score to {what}, so a model would learn to write that; choose '
        'another task.dataset')
  return ReasoningGym(task_config, seed, entries, workers.Pool(
      scorer, args, task_config.timeout_s, task_config.processes,
      verifiers.MEMORY_MB, preload=['reasoning_gym']))


class ReasoningGym:
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config: config_lib.Task, seed, entries, pool):
    self._name, self._seed, self._pool = task_config.dataset, seed, pool
    unique = {}
    for index, entry in enumerate(entries):
      answer = entry['answer']
      example = types.Example(entry['question'], str(answer),
                              None if answer is None else str(answer), index)
      unique.setdefault(entry['question'], example)
    test = [e for q, e in unique.items()
            if zlib.crc32(q.encode()) % HELD_OUT_SHARE == 0]
    self._test = test[:task_config.held_out]
    held_out = {e.prompt for e in test}
    self._train = [e for q, e in unique.items() if q not in held_out]
    if not self._train:
      raise config_lib.ConfigError(
          f'reasoning_gym {self._name!r} gave no training question; raise '
          f'task.size={task_config.size}')
    self._solved = [e for e in self._train if e.solution is not None]
    self.tokenizer = tokenizers.CharTokenizer(
        ''.join(e.prompt + (e.solution or '') for e in self._train))

  def _pick(self, pool, stream, step, count):
    rng = np.random.default_rng([self._seed, stream, step])
    return [pool[i] for i in rng.integers(0, len(pool), count)]

  def prompts(self, step, count):
    """Return training questions, drawn with replacement."""
    return self._pick(self._train, _TRAIN, step, count)

  def supervised(self, step, count):
    """Return training questions whose solution is the data set's answer.

    Raises:
      config.ConfigError: the data set gives no answers to imitate.
    """
    if not self._solved:
      raise config_lib.ConfigError(
          f'reasoning_gym {self._name!r} gives no answers to imitate; set '
          'warmup.steps=0')
    return self._pick(self._solved, _SUPERVISED, step, count)

  def held_out(self):
    """Return {data set's name: questions}."""
    return {self._name: self._test}

  def probe(self):
    """Return the examples with the longest question and longest answer."""
    pool = self._train + self._test
    return [max(pool, key=lambda e: len(e.prompt)),
            max(pool, key=lambda e: len(e.solution or ''))]

  def extract(self, completion):
    """Return the stripped completion."""
    return completion.strip()

  def rewards(self, examples, completions):
    """Return 1.0 for the scorer's full score, else 0.0."""
    scores = self._pool.score_all(
        [e.meta, c.strip()] for e, c in zip(examples, completions, strict=True))
    return [float(s >= 1.) for s in scores]

  def counts(self):
    """Return how often the scorer raised, hung or crashed so far."""
    return dict(self._pool.counts)

  def start(self):
    """Start the worker processes; raises config.ConfigError."""
    self._pool.start()

  def close(self):
    """End the worker processes."""
    self._pool.close()
