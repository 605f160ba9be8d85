"""Tasks that need a look ahead: problems solved by hand, splits, scores."""

import collections
import itertools

import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import tasks, types
from mtp_rl.tasks import generated, path_finding

PATH = dict(name='path_finding', degree=3, arm=2, nodes=9, held_out=30)
SUBSET = dict(name='subset_sum', min_terms=3, max_terms=5, largest=4,
              held_out=30)
DAG = dict(name='dag_planning', nodes=30, edge_prob=.2, held_out=40)


def _make(seed=0, **kw):
  return tasks.make(config_lib.Config(seed=seed, task=config_lib.Task(**kw)))


def _walk(prompt):
  """Return the path to the goal, found from the goal back to the start."""
  edges, (start, goal, _) = prompt.split('|')
  before = {edges[i + 1]: edges[i] for i in range(0, len(edges), 2)}
  path = goal
  while before[path[0]] != start:
    path = before[path[0]] + path
  return path


@pytest.mark.parametrize('degree, arm', [(2, 4), (3, 2)])
def test_prompts_are_stars_and_solutions_their_paths(degree, arm):
  task = _make(**{**PATH, 'degree': degree, 'arm': arm})
  for e in task.supervised(0, 60) + task.held_out()['path_finding']:
    edges, query = e.prompt.split('|')
    assert len(edges) == 2 * degree * arm and len(query) == 3
    degrees = collections.Counter(edges)
    assert degrees.pop(query[0]) == degree
    assert sorted(degrees.values()) == [1] * degree + [2] * degree * (arm - 1)
    assert degrees[query[1]] == 1  # the goal is a leaf
    assert e.solution == e.answer == _walk(e.prompt)
    assert len(e.solution) == arm
    assert set(e.prompt + e.solution) <= set(task.tokenizer.characters)
  assert len(task.probe()[0].prompt) == 2 * degree * arm + 4


def test_only_the_whole_path_is_rewarded():
  # a -> b -> c and a -> d -> e, asked from a to e.
  example = types.Example('bcdeabad|ae=', _walk('bcdeabad|ae='))
  assert example.answer == 'de'
  texts = ['de', ' de', 'bc', 'dc', 'be', 'd', 'dee', 'ade', '']
  task = _make(**PATH)
  assert task.rewards([example] * 9, texts) == [1, 1] + [0] * 7
  right = [path_finding.first_hop(example, t) for t in texts]
  assert right == [True, True, False, True, False, True, True, False, False]
  assert task.extract(' de') == 'de'


def test_the_goal_is_on_no_arm_more_often():
  """The place of the right first edge in the prompt gives nothing away."""
  task, ranks = _make(**PATH), collections.Counter()
  for e in task.prompts(0, 3000):
    edges, (start, *_) = e.prompt.split('|')
    heads = [edges[i + 1] for i in range(0, 12, 2) if edges[i] == start]
    ranks[heads.index(e.answer[0])] += 1
  assert all(abs(ranks[i] / 3000 - 1 / 3) < .04 for i in range(3))


def test_subset_sums_add_up():
  task = _make(**SUBSET)
  lengths = set()
  for e in task.supervised(0, 200) + task.held_out()['subset_sum']:
    digits, target = e.prompt[:-1].split('|')
    kept = [int(d) for d, c in zip(digits, e.solution, strict=True) if c == '+']
    assert sum(kept) == int(target) == int(e.answer) and len(target) == 2
    assert set(digits) <= set('1234')
    assert set(e.prompt + e.solution) <= set(task.tokenizer.characters)
    lengths.add(len(digits))
  assert lengths == {3, 4, 5}
  assert max(map(len, (e.prompt for e in task.probe()))) == 5 + 4


def test_every_solution_of_a_subset_sum_counts():
  # 3 + 2 = 1 + 4 = 5: of 16 choices, by hand.
  example = types.Example('3142|05=', '05')
  texts = [''.join(c) for c in itertools.product('+-', repeat=4)]
  scores = _make(**SUBSET).rewards([example] * 16, texts)
  right = [t for t, s in zip(texts, scores) if s]
  assert right == ['+--+', '-++-'] and set(scores) == {0, 1}
  bad = ['+--', '+--++', '', '+--x', '3  2', '5']
  assert _make(**SUBSET).rewards([example] * 6, bad) == [0] * 6


def _successors(task):
  """Return {node's name: its successors' names}."""
  name = task._name_of
  return {name[a]: {name[b] for b in np.flatnonzero(row)}
          for a, row in enumerate(task.edges)}


def test_reach_is_the_sum_of_the_powers_of_the_edges():
  task = _make(**DAG)
  edges, total = task.edges.astype(int), 0
  for length in range(1, 30):
    total = total + np.linalg.matrix_power(edges, length)
  np.testing.assert_array_equal(task.reach, total > 0)
  assert task.edges.sum() and not np.diag(task.reach).any()


def test_walks_follow_edges_and_any_path_counts():
  task = _make(**DAG)
  after = _successors(task)
  walks = task.supervised(0, 300)
  for e in walks:
    path = e.prompt[0] + e.solution
    assert all(b in after[a] for a, b in itertools.pairwise(path))
    assert path[-1] == e.prompt[1] == e.answer
  assert task.rewards(walks, [e.solution for e in walks]) == [1.] * 300
  # Two edges in a row, by a node other than the goal; and what is no path.
  start, middle = next((a, b) for a in after for b in after[a] if after[b])
  goal = min(after[middle])
  example = types.Example(f'{start}{goal}=', goal)
  right = [middle + goal] + [goal] * (goal in after[start])
  wrong = ['', middle, start + middle + goal, middle + goal + goal,
           middle + '=' + goal, middle + goal + '?', goal + middle]
  assert task.rewards([example] * len(right), right) == [1.] * len(right)
  assert task.rewards([example] * 7, wrong) == [0.] * 7


def test_the_pairs_of_a_graph_are_split():
  task = _make(**DAG)
  name = task._name_of
  far = {f'{name[a]}{name[b]}=' for a, b in
         np.argwhere(task.reach & ~task.edges)}
  taught = {e.prompt for step in range(200) for e in task.supervised(step, 50)}
  asked = {e.prompt for step in range(200) for e in task.prompts(step, 50)}
  held = {e.prompt for some in task.held_out().values() for e in some}
  assert len(held) == 40 and held <= far and asked <= far
  assert set(filter(task.keeps_out, far)) == held
  assert not held & asked and not held & taught and not taught & asked
  assert held | asked | taught & far == far
  assert len(taught & far) == -(-len(far) // 5)  # task.taught = .2


def test_degree_counts_the_edges_to_what_was_shown():
  task = _make(**DAG)
  after, shown = _successors(task), collections.defaultdict(set)
  for step in range(400):  # all walks, with near certainty
    for e in task.supervised(step, 50):
      shown[e.answer] |= set(e.solution)
  degrees = collections.Counter()
  for label, some in task.held_out().items():
    for e in some:
      front, degree = {e.prompt[0]}, 0
      while not front & shown[e.answer]:
        front, degree = {b for a in front for b in after[a]}, degree + 1
      assert label == f'degree_{min(degree, 3)}'
      degrees[degree] += 1
  assert all(degrees[d] for d in range(4))


def test_the_floor_is_the_log_of_the_choices():
  """Of a uniform choice among the successors that reach the goal, by hand."""
  task = _make(**DAG)
  after, reach = _successors(task), {}
  for node in reversed(task._name_of):  # the nodes are in order
    reach[node] = after[node].union(*(reach[b] for b in after[node]))
  nats = tokens = 0
  for start, goal, walks in task._taught:
    goal = task._name_of[goal]
    for walk in walks:
      path = [task._name_of[i] for i in (start, *walk)]
      nats += sum(np.log(sum(b == goal or goal in reach[b] for b in after[a]))
                  for a in path[:-1])
      tokens += len(path)
  assert task.floor == pytest.approx(nats / tokens) and task.floor > .1


@pytest.mark.parametrize('options', [PATH, SUBSET])
def test_draws_are_stateless_and_the_split_holds(options):
  a, b = _make(**options), _make(**options)
  b.prompts(3, 5)
  assert a.prompts(7, 9) == b.prompts(7, 9) != a.prompts(8, 9)
  assert a.supervised(7, 9) == b.supervised(7, 9) != a.prompts(7, 9)
  assert a.prompts(7, 9) != _make(seed=1, **options).prompts(7, 9)
  held_out = {e.prompt for e in a.held_out()[options['name']]}
  trained = {e.prompt for step in range(20) for e in
             a.prompts(step, 50) + a.supervised(step, 50)}
  assert len(held_out) == 30 and not held_out & trained
  assert all(map(generated.is_held_out, held_out))
  assert a.counts() == {}


def test_draws_from_a_graph_are_stateless():
  a, b = _make(**DAG), _make(**DAG)
  b.prompts(3, 5)
  assert a.prompts(7, 9) == b.prompts(7, 9) != a.prompts(8, 9)
  assert a.supervised(7, 9) == b.supervised(7, 9) != a.supervised(8, 9)
  assert a.held_out() == b.held_out() != _make(seed=1, **DAG).held_out()


def test_a_small_task_ends_its_search_for_held_out_problems():
  """Of 8 digit strings with 2 to 7 targets each, about one in 8 is held out."""
  task = _make(name='subset_sum', min_terms=3, max_terms=3, largest=2)
  assert 1 <= len(task.held_out()['subset_sum']) < 20


@pytest.mark.parametrize('options, said', [
    (dict(PATH, degree=1), 'task.degree=1'),
    (dict(PATH, arm=1), 'task.arm=1'),
    (dict(PATH, nodes=6), 'task.nodes=6 must lie between the 7'),
    (dict(PATH, nodes=53), 'task.nodes=53'),
    (dict(DAG, nodes=3), 'task.nodes=3'),
    (dict(DAG, edge_prob=1.), 'task.edge_prob=1.0'),
    (dict(DAG, taught=1.), 'task.taught=1.0 must lie'),
    (dict(DAG, taught=.99), 'task.taught=0.99 leaves too few'),
    (dict(DAG, held_out=94), 'task.held_out=94 leaves none of the 94 pairs'),
    (dict(DAG, nodes=4, edge_prob=.01), 'pairs at a distance of two edges'),
    (dict(SUBSET, min_terms=6), 'task.min_terms=6'),
    (dict(SUBSET, max_terms=12), 'task.max_terms=12'),
    (dict(SUBSET, largest=10), 'task.largest=10'),
    (dict(SUBSET, largest=1), 'task.largest=1 ')])
def test_impossible_settings_are_named(options, said):
  with pytest.raises(config_lib.ConfigError, match=said):
    _make(**options)
