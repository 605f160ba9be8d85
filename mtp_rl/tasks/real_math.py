r"""Math problems with a boxed answer: prompts from data sets, verified.

Left out of training, and counted in `report`:
  problems of an evaluation set (the row says so, or the folder has an
    evaluation set with the same problem up to case, spaces and punctuation)
  problems with conflicting answers (the row says so, or the same problem occurs
    with another answer), since one of the answers gives wrong rewards
  repetitions
  prompts of more than rollout.max_prompt tokens; of evaluation sets as well

The prompt's words are those of DAPO (Yu et al. 2025, arXiv 2503.14476).
"""

import collections
import logging
import os
import re

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tokenizers, types
from mtp_rl.tasks import datasets, verifiers

PROMPT = (
    'Solve the following math problem step by step. The last line of your '
    'response should be of the form Answer: \\boxed{{$Answer}} where $Answer '
    'is the answer to the problem.\n\n{problem}\n\nRemember to put your answer '
    'on its own line after "Answer:".')
_TRAIN, _CUT = range(2)


def fingerprint(problem):
  """Return a problem's letters and digits, lower-cased."""
  return re.sub(r'[\W_]+', '', problem.lower())


def render(text, tokenizer, template):
  """Return the prompt that asks for `text`.

  Args:
    text: what the user says.
    tokenizer: see `tokenizers`.
    template: 'chat', the tokenizer's chat template; 'plain', the text alone.

  Raises:
    config.ConfigError: the template fails, or there is none.
  """
  if template == 'plain':
    return text
  if not isinstance(tokenizer, tokenizers.SubwordTokenizer):
    raise config_lib.ConfigError(
        'task.template=chat needs the chat template of a tokenizer; set '
        'task.tokenizer to its folder or GGUF file, or task.template=plain')
  return tokenizer.chat([{'role': 'user', 'content': text}])


def names(text):
  """Return the set names of a comma-separated field."""
  return [n for n in (part.strip() for part in text.split(',')) if n]


def make(task_config: config_lib.Task, seed):
  """Return the `Math` task of a `config.Task`.

  Raises:
    config.ConfigError: a set, the tokenizer, its template or a package is
      missing or damaged, or no row is left to train on.
  """
  t = task_config
  train, evals = names(t.train), names(t.evals)
  if not train or not evals:
    raise config_lib.ConfigError(
        f'task.train={t.train!r} and task.evals={t.evals!r} must name a set '
        'each')
  both = set(train) & set(evals)
  if both:
    raise config_lib.ConfigError(
        f'{", ".join(sorted(both))} cannot be both trained on and evaluated; '
        'change task.train or task.evals')
  verifiers.check_installed()
  # Every evaluation set in the folder is kept out of training, used or not.
  kept_out = evals + [n for n in datasets.HELD_BACK if n not in evals + train
                      and datasets.find(n, t.data_dir)]
  sets = {n: datasets.load(n, t.data_dir, t.cache_dir)
          for n in dict.fromkeys(train + kept_out)}
  return Math(t, seed, sets, train, evals, kept_out)


class Math:
  """See the module's text; members as in `tasks.Task`.

  Attributes:
    report: dict of counts and rejected rows, written to the workdir.
  """

  def __init__(self, task_config: config_lib.Task, seed, sets, train, evals,
               kept_out):
    """Choose the rows; `fit` later drops prompts that are too long.

    Args:
      task_config: `config.Task`.
      seed: int.
      sets: {name: datasets.Prepared}.
      train: names of training sets.
      evals: names of evaluation sets.
      kept_out: names of sets whose problems are not trained on.
    """
    t = task_config
    self._seed = seed
    seen = {fingerprint(r.problem) for n in kept_out for r in sets[n].rows}
    self.report = {
        'overlapping': 0, 'conflicting': 0, 'repeated': 0, 'too_long': {},
        'sha256': {n: s.sha256 for n, s in sets.items()},
        'unlisted': [n for n, s in sets.items() if not s.listed],
        'rejected': [r for s in sets.values() for r in s.rejected]}
    pool = [(fingerprint(r.problem), r) for n in train for r in sets[n].rows]
    answers = collections.defaultdict(set)
    for key, row in pool:
      answers[key].add(verifiers.normal(row.answer))
    chosen = {}
    for key, row in pool:
      if row.overlaps or key in seen:
        self.report['overlapping'] += 1
      elif row.conflicting or len(answers[key]) > 1:
        self.report['conflicting'] += 1
      elif key in chosen:
        self.report['repeated'] += 1
      else:
        chosen[key] = row
    chosen = list(chosen.values())
    tests = {n: _cut(sets[n].rows, t.held_out) for n in evals}
    if t.tokenizer:
      self.tokenizer = tokenizers.load(os.path.expanduser(t.tokenizer))
    else:
      self.tokenizer = tokenizers.CharTokenizer(PROMPT + ''.join(
          r.problem + r.answer
          for rows in (chosen, *tests.values()) for r in rows))
    ask = lambda row: types.Example(
        render(PROMPT.format(problem=row.problem), self.tokenizer, t.template),
        row.answer, meta=row.id)
    self._train = [ask(r) for r in chosen]
    self._tests = {n: [ask(r) for r in rows] for n, rows in tests.items()}
    self._verifier = verifiers.MathVerifier(t.timeout_s, t.processes)

  def fit(self, max_prompt):
    """Drop the prompts of more than max_prompt tokens.

    Raises:
      config.ConfigError: no training prompt is left.
    """
    def short(name, examples):
      kept = [e for e in examples
              if len(self.tokenizer.encode(e.prompt)) <= max_prompt]
      if len(kept) < len(examples):
        self.report['too_long'][name] = len(examples) - len(kept)
      return kept
    self._train = short('train', self._train)
    self._tests = {n: short(n, some) for n, some in self._tests.items()}
    self.report['prompts'] = {'train': len(self._train)} | {
        n: len(some) for n, some in self._tests.items()}
    if any(self.report[k] for k in ('too_long', 'rejected', 'unlisted')):
      logging.getLogger(__name__).warning(
          'math sets: %s', {k: v if k != 'rejected' else v[:5]
                            for k, v in self.report.items()})
    if not self._train:
      raise config_lib.ConfigError(
          'task math has no prompt to train on; raise rollout.max_prompt='
          f'{max_prompt} or change task.train ({self.report})')

  def prompts(self, step, count):
    """Return training problems, without repetition if there are enough."""
    rng = np.random.default_rng([self._seed, _TRAIN, step])
    n = len(self._train)
    return [self._train[i] for i in rng.choice(n, count, replace=count > n)]

  def supervised(self, step, count):
    """Raise config.ConfigError: the sets give answers, not solutions."""
    raise config_lib.ConfigError(
        'task math gives no solutions to imitate; set warmup.steps=0 and start '
        'from a pre-trained model')

  def held_out(self):
    """Return the evaluation sets by name."""
    return self._tests

  def probe(self):
    """Return the example with the longest prompt."""
    pool = [e for some in (self._train, *self._tests.values()) for e in some]
    return [max(pool, key=lambda e: len(self.tokenizer.encode(e.prompt)))]

  def extract(self, completion):
    """Return the normalised content of the last box."""
    return verifiers.answer(completion)

  def rewards(self, examples, completions):
    """Return 1.0 for a verified answer, else 0.0."""
    return self._verifier.rewards([e.answer for e in examples], completions,
                                  [e.prompt for e in examples])

  def counts(self):
    """Return the verifier's failures so far, {name: count}."""
    return dict(self._verifier.counts)

  def start(self):
    """Start the verifier's processes; raises config.ConfigError."""
    self._verifier.start()

  def close(self):
    """End the verifier's processes."""
    self._verifier.close()


def _cut(rows, most):
  """Return at most `most` rows, in order; the same rows for every seed."""
  if len(rows) <= most:
    return rows
  order = np.random.default_rng([_CUT]).permutation(len(rows))[:most]
  return [rows[i] for i in sorted(order.tolist())]
