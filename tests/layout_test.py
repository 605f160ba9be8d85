"""The shape of the house: floors, sizes, docstrings."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A file imports only from lower floors, or from its own where listed first.
FLOORS = (
    ('types', 'tree', 'masked', 'intervals', 'hlo'),
    ('config',),
    ('sharding', 'tokenizers', 'validate', 'signals', 'distributed'),
    ('models.attention', 'models.moe', 'models.presets', 'models.sources'),
    ('models.transformer',),
    ('models.mtp', 'models.pretrained'),
    ('objectives.logprobs', 'objectives.advantages', 'objectives.policy',
     'tasks.workers', 'tasks.generated'),
    ('tasks.verifiers', 'tasks.datasets'),
    ('tasks.math',),
    ('objectives.mtp', 'tasks.arithmetic', 'tasks.path_finding',
     'tasks.reasoning_gym', 'tasks.subset_sum', 'tasks.sums'),
    ('tasks',),
    ('occ', 'optim', 'rollout.sampler', 'rollout.layout', 'rollout.packing',
     'forward'),
    ('estimators',),
    ('gradients',),
    ('rollout.experience', 'train_step', 'evaluate', 'checkpoint', 'metrics',
     'plots', 'compare.grid', 'compare.figures', 'compare.jobs'),
    ('warmup', 'aot'),
    ('trainer', 'compare.report', 'diagnose.measure'),
    ('compare.study', 'scoring', 'diagnose.summary', 'diagnose.figures'),
    ('diagnose.study',),
)
LEVEL = {name: i for i, floor in enumerate(FLOORS) for name in floor}
PACKAGES = ('', 'models', 'objectives', 'rollout', 'compare', 'diagnose')
FILES = sorted((ROOT / 'mtp_rl').rglob('*.py'))


def _name(path):
  parts = path.relative_to(ROOT / 'mtp_rl').with_suffix('').parts
  return '.'.join(p for p in parts if p != '__init__')


def _imports(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module.split('.')[0] == 'mtp_rl':
        for alias in node.names:
          yield f'{node.module}.{alias.name}'.split('.', 1)[1]


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_a_file_imports_only_from_floors_below(path):
  name = _name(path)
  found = list(_imports(ast.parse(path.read_text())))
  if name in PACKAGES:
    assert not found
    return
  assert name in LEVEL, f'{name} stands on no floor'
  for other in found:
    assert LEVEL[other] < LEVEL[name], f'{name} imports {other}'


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_files_and_functions_stay_small(path):
  text = path.read_text()
  assert text.count('\n') <= 400
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 90, node.name


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_public_names_have_docstrings(path):
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree)
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      assert node.name.startswith('_') or ast.get_docstring(node), node.name
