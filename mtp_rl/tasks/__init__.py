"""Tasks: prompts and verifiers. To add one, write a module and name it here.

A task is any object with the members of `Task`. `prompts(step, count)` depends
only on the seed and its arguments, so a resumed run needs the step alone.
Model output is untrusted text: a verifier never evaluates it in this process
(see workers.py).
"""

import importlib
from typing import Protocol

from mtp_rl import config as config_lib
from mtp_rl import tokenizers, types

MODULES = {'arithmetic': 'mtp_rl.tasks.arithmetic',
           'dag_planning': 'mtp_rl.tasks.dag_planning',
           'math': 'mtp_rl.tasks.real_math',
           'path_finding': 'mtp_rl.tasks.path_finding',
           'reasoning_gym': 'mtp_rl.tasks.reasoning_gym',
           'subset_sum': 'mtp_rl.tasks.subset_sum',
           'sums': 'mtp_rl.tasks.sums'}


class Task(Protocol):
  """The interface of a task.

  A task may have four more members: `fit(max_prompt)`, which drops prompts of
  more tokens, `start()`, which starts the verifier's processes before long work
  and raises config.ConfigError where they do not start, `report`, a dict about
  its data that the workdir keeps, and `floor`, the main head's least loss in
  the warm-up without memorising single solutions, nats a token.
  """

  tokenizer: tokenizers.CharTokenizer | tokenizers.SubwordTokenizer

  def prompts(self, step: int, count: int) -> list[types.Example]:
    """Return `count` training problems of a step."""

  def supervised(self, step: int, count: int) -> list[types.Example]:
    """Return `count` training problems with solutions for the warm-up."""

  def held_out(self) -> dict[str, list[types.Example]]:
    """Return the evaluation sets by name; no problem is a training one."""

  def probe(self) -> list[types.Example]:
    """Return examples that include the longest, for the length check."""

  def rewards(self, examples: list[types.Example],
              completions: list[str]) -> list[float]:
    """Return each completion's reward in [0, 1]."""

  def extract(self, completion: str) -> str:
    """Return the answer that a completion gives, for majority votes."""

  def counts(self) -> dict[str, int]:
    """Return the verifier's failures so far, {name: count}."""

  def close(self) -> None:
    """End the verifier's processes, if it has any."""


def make(config: config_lib.Config):
  """Return the task of a config.

  Args:
    config: `config.Config`.

  Raises:
    config.ConfigError: the task is unknown, empty, or its options are wrong.
  """
  name = config.task.name
  if name not in MODULES:
    raise config_lib.ConfigError(
        f'task.name={name!r} is none of {", ".join(MODULES)}')
  task = importlib.import_module(MODULES[name]).make(config.task, config.seed)
  if hasattr(task, 'fit'):
    task.fit(config.rollout.max_prompt)
  for set_name, examples in task.held_out().items():
    if not examples:
      raise config_lib.ConfigError(
          f'task {name}: the held-out set {set_name!r} is empty; widen the '
          'task (more terms, a larger task.size, rollout.max_prompt)')
  return task
