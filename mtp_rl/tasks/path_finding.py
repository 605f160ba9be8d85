"""Paths in star graphs: the first step needs the whole path.

    prompt    adahkehbbldk|al=      solution   hbl

`degree` arms of `arm` edges leave one centre. The prompt lists the edges in
random order, two characters each and the end nearer the centre first, then
the centre and the goal, which is the leaf of one arm. The answer names the
nodes after the centre up to the goal.

Source: Bachmann and Nagarajan 2024, arXiv 2403.06963. Every node but the
first follows from the one before it by one look at the edges; the first is
one of `degree` successors of the centre, and only the way back from the goal
says which. Next-token training learns the easy nodes, stops being told
anything by them, and is left to guess the first: greedy accuracy about
1 / degree.
"""

import string

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

ALPHABET = string.ascii_lowercase + string.ascii_uppercase


def make(task_config, seed):
  """Return the `PathFinding` task of a `config.Task`."""
  return PathFinding(task_config, seed)


def first_hop(example, completion):
  """Return whether the first node of a completion is on the right arm."""
  return completion.strip()[:1] == example.answer[0]


class PathFinding(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config, seed):
    t = task_config
    if t.degree < 2 or t.arm < 2:
      raise config_lib.ConfigError(
          f'task path_finding with task.degree={t.degree} and task.arm={t.arm} '
          'leaves nothing to look ahead for; both need at least 2')
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
    path = ''.join(paths[0])  # the names are random: so is the first arm
    shuffled = ''.join(edges[i] for i in rng.permutation(len(edges)))
    return types.Example(f'{shuffled}|{centre}{path[-1]}=', path, path)

  def score(self, example, text):
    """Return 1.0 for the path itself, else 0.0."""
    return float(text == example.answer)
