"""Paths in star graphs: the first step requires knowing the whole path.

    prompt    adahkehbbldk|al=      solution   hbl

`degree` arms of `arm` edges leave one centre. The prompt lists the edges in
random order, two characters each and the end nearer the centre first, then
the centre and the goal, which is the leaf of one arm. The answer names the
nodes after the centre up to the goal.

Source: Bachmann and Nagarajan 2024, arXiv 2403.06963. Every node but the first
follows from the node before it by one look-up in the edges. The first is one of
`degree` successors of the centre, and only tracing the path back from the goal
tells which. Next-token training learns the easy nodes, gets no more signal from
them, and guesses the first one: greedy accuracy about 1 / degree.
"""

import string

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

ALPHABET = string.ascii_lowercase + string.ascii_uppercase


def make(task_config: config_lib.Task, seed):
  """Return the `PathFinding` task of a `config.Task`."""
  return PathFinding(task_config, seed)


def first_hop(example, completion):
  """Return whether the first node of a completion is on the right arm."""
  return completion.strip()[:1] == example.answer[0]


class PathFinding(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  floor = 0.  # the prompt determines the path

  def __init__(self, task_config: config_lib.Task, seed):
    t = task_config
    if t.degree < 2 or t.arm < 2:
      raise config_lib.ConfigError(
          f'task path_finding with task.degree={t.degree} and task.arm={t.arm} '
          'needs no look-ahead; set both to 2 or more')
    least = t.degree * t.arm + 1
    if not least <= t.nodes <= len(ALPHABET):
      raise config_lib.ConfigError(
          f'task.nodes={t.nodes} must lie between the {least} nodes of a '
          f'graph (task.degree * task.arm + 1) and {len(ALPHABET)}')
    self._config = t
    super().__init__('path_finding', ALPHABET[:t.nodes] + '|=', seed,
                     t.held_out)

  def draw(self, rng):
    """Return one problem with its path."""
    degree, arm = self._config.degree, self._config.arm
    order = rng.permutation(self._config.nodes)[:degree * arm + 1]
    centre, *rest = (ALPHABET[i] for i in order)
    paths = [rest[i * arm:(i + 1) * arm] for i in range(degree)]
    edges = [a + b for path in paths for a, b in zip([centre] + path, path)]
    path = ''.join(paths[0])  # node names are random, so any arm will do
    shuffled = ''.join(edges[i] for i in rng.permutation(len(edges)))
    return types.Example(f'{shuffled}|{centre}{path[-1]}=', path, path)

  def score(self, example, text):
    """Return 1.0 for exactly the path, else 0.0."""
    return float(text == example.answer)
