"""Paths between two nodes of one random graph that the model must remember.

    prompt    st=       solution   abt       for the edges s-a, a-b, b-t

The graph is acyclic, drawn once from the seed: an edge from each node to every
later one with probability `edge_prob`. The prompt names only start and goal; a
right answer follows edges of the graph from the start and ends with the goal.

Source: the setting of arXiv 2405.09220 and 2509.23186. Supervised data are
random walks between a share of the pairs, so some goals are reachable from a
node by a path that no walk showed whole: the *degree* of a pair is the least
number of edges from the start to a node that some walk to the same goal went
on to (a walk's own start does not count: the model does not learn to name it).
Degree 1 needs what was shown; from degree 2 on the reachability of the goal
must be composed of several walks. Next-token training learns the edges and what
was shown, and falls short of the rest. What differs from the papers: rotary
positions and gated MLPs, the model's own, and the answer does not repeat the
start before it goes on.

The pairs without an edge are split three ways: `taught` of them are supervised,
`task.held_out` at random are for evaluation (sets by degree), and RL draws its
prompts from all others. Pairs with an edge are always supervised. Degree counts
the supervised walks alone, not the paths that RL rewards later.
"""

import itertools
import math

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

# One character a node: letters, from plain Latin to the extended ones.
ALPHABET = [c for c in map(chr, range(0x41, 0x250)) if c.isalpha()]
WALKS = 20  # supervised walks of a pair, as in the papers
_GRAPH = 7  # stream of random numbers, besides those of `generated`


def make(task_config: config_lib.Task, seed):
  """Return the `DagPlanning` task of a `config.Task`."""
  return DagPlanning(task_config, seed)


class DagPlanning(generated.Generated):
  """See the module's text; members as in `tasks.Task`.

  Attributes:
    edges: [nodes, nodes] bool array, from row to column.
    reach: [nodes, nodes] bool array, whether a path of one edge or more leads
      from row to column.
    floor: nats a token of the supervised walks under a uniform choice among the
      successors that reach the goal: about what a model reaches that does not
      remember single walks.
  """

  def __init__(self, task_config: config_lib.Task, seed):
    t = task_config
    if not 4 <= t.nodes <= len(ALPHABET):
      raise config_lib.ConfigError(
          f'task.nodes={t.nodes} must lie between 4 and {len(ALPHABET)} for '
          'task dag_planning')
    if not 0 < t.edge_prob < 1 or not 0 < t.taught < 1:
      raise config_lib.ConfigError(
          f'task.edge_prob={t.edge_prob} and task.taught={t.taught} must lie '
          'between 0 and 1')
    self._held_out = frozenset()
    super().__init__('dag_planning', ALPHABET[:t.nodes] + ['='], seed, 0)
    rng = self._rng(_GRAPH, 0)
    self.edges = np.triu(rng.random((t.nodes, t.nodes)) < t.edge_prob, 1)
    self.reach = _closure(self.edges)
    names = rng.permutation(t.nodes)  # a node's name does not tell its place
    self._name_of = [ALPHABET[i] for i in names]
    self._node_of = {c: i for i, c in enumerate(self._name_of)}
    far = rng.permutation(np.argwhere(self.reach & ~self.edges))
    taught = math.ceil(t.taught * len(far))
    if len(far) < taught + 2:
      raise config_lib.ConfigError(
          f'task dag_planning with task.nodes={t.nodes} and '
          f'task.edge_prob={t.edge_prob} has only {len(far)} pairs at a '
          f'distance of two edges or more, and task.taught={t.taught} leaves '
          'too few; raise task.nodes, or lower task.taught or task.edge_prob')
    near = np.argwhere(self.edges)
    self._taught = [self._walks(s, g, rng)
                    for s, g in np.concatenate([near, far[:taught]])]
    self.floor = self._floor()
    left = far[taught:]
    if len(left) <= t.held_out:
      raise config_lib.ConfigError(
          f'task.held_out={t.held_out} leaves none of the {len(left)} pairs '
          'that task dag_planning has for RL and evaluation to RL; lower it, '
          'or raise task.nodes')
    held, self._asked = left[:t.held_out], left[t.held_out:]
    self._held_out = {self._example(*pair).prompt for pair in held}
    self._test = self._by_degree(held)

  def keeps_out(self, prompt):
    """Return whether a prompt belongs to evaluation."""
    return prompt in self._held_out

  def _choices(self, node, goal):
    """Return the successors of a node from which the goal can be reached."""
    toward = self.edges[node] & self.reach[:, goal]
    toward[goal] = self.edges[node, goal]
    return np.flatnonzero(toward)

  def _walk(self, start, goal, rng):
    node, path = start, []
    while node != goal:
      node = rng.choice(self._choices(node, goal))
      path.append(int(node))
    return path

  def _walks(self, start, goal, rng):
    """Return (start, goal, `WALKS` paths); an edge is one of the paths."""
    direct = [[int(goal)]] if self.edges[start, goal] else []
    walks = [self._walk(start, goal, rng) for _ in range(WALKS - len(direct))]
    return int(start), int(goal), direct + walks

  def _floor(self):
    nats = tokens = 0
    for start, goal, walks in self._taught:
      for walk in walks:
        nats += sum(math.log(len(self._choices(node, goal)))
                    for node in [start, *walk[:-1]])
        tokens += len(walk) + 1  # and EOS, which is certain
    return nats / tokens

  def _by_degree(self, pairs):
    """Return {'degree_<d>': examples} of pairs; 3 is 3 and more."""
    shown = np.zeros_like(self.edges)  # [node, goal]: a walk to it went on to
    for _, goal, walks in self._taught:
      shown[[n for walk in walks for n in walk], goal] = True
    sets = {}
    for start, goal in pairs:
      degree, nodes = 0, np.arange(len(shown)) == start
      while not (nodes & shown[:, goal]).any():
        nodes, degree = self.edges[nodes].any(0), degree + 1
      name = f'degree_{min(degree, 3)}'
      sets.setdefault(name, []).append(self._example(start, goal))
    return dict(sorted(sets.items()))

  def _example(self, start, goal, path=()):
    name = self._name_of
    return types.Example(f'{name[start]}{name[goal]}=', name[goal],
                         ''.join(name[i] for i in path) or None)

  def prompts(self, step, count):
    """Return training problems: pairs that no walk was shown for."""
    rng = self._rng(generated.TRAIN, step)
    return [self._example(*self._asked[i])
            for i in rng.integers(len(self._asked), size=count)]

  def supervised(self, step, count):
    """Return walks, of the taught pairs with equal chance."""
    rng, out = self._rng(generated.SUPERVISED, step), []
    for i in rng.integers(len(self._taught), size=count):
      start, goal, walks = self._taught[i]
      out.append(self._example(start, goal, walks[rng.integers(WALKS)]))
    return out

  def held_out(self):
    """Return the evaluation sets, `degree_<d>`."""
    return self._test

  def probe(self):
    """Return the supervised example with the longest walk."""
    start, goal, walk = max(((s, g, w) for s, g, walks in self._taught
                             for w in walks), key=lambda x: len(x[2]))
    return [self._example(start, goal, walk)]

  def score(self, example, text):
    """Return 1.0 if the text follows edges from the start to the goal."""
    nodes = [self._node_of.get(c) for c in example.prompt[0] + text]
    if None in nodes or text[-1:] != example.answer:
      return 0.
    return float(all(self.edges[a, b] for a, b in itertools.pairwise(nodes)))


def _closure(edges):
  """Return which nodes are reachable by one edge or more (nodes in order)."""
  reach = edges.copy()
  for node in range(len(edges) - 2, -1, -1):
    reach[node] |= reach[edges[node]].any(0)
  return reach
