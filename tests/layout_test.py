"""The shape of the house: floors, sizes, docstrings."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A file imports only from the floors below its own.
FLOORS = (
    ('types', 'tree', 'prng', 'aot.hlo', 'report.intervals', 'report.tables',
     'report.style', 'report.series'),
    ('config', 'report.run_figures', 'report.comparison_figures',
     'report.diagnosis_figures'),
    ('run.endings',),
    ('run.peers',),
    ('config_io', 'models.rope', 'models.config_keys', 'sharding',
     'models.expert_blocks',
     'tokenizers', 'run.signals', 'run.loggers', 'distributed',
     'objectives.masked',
     'aot.targets'),
    ('models.attention', 'models.moe', 'models.presets', 'models.sources',
     'models.settings', 'run.metrics', 'run.checksums', 'run.owner',
     'optim',
     'objectives.advantages', 'objectives.policy', 'objectives.acceptance',
     'tasks.workers', 'tasks.generated', 'occ', 'diagnose.oracle'),
    ('models.transformer', 'run.checkpoint', 'tasks.verifiers',
     'tasks.datasets',
     'objectives.mtp', 'rollout.layout', 'rollout.packing', 'rollout.prompts',
     'rollout.judge',
     'rivals', 'compare.summary', 'compare.jobs', 'report.page',
     'report.parabola',
     'report.closing'),
    ('estimators',),
    ('models.mtp', 'models.pretrained', 'run.inventory',
     'objectives.logprobs', 'report.comparison_page',
     'tasks.real_math', 'tasks.arithmetic', 'tasks.dag_planning',
     'tasks.path_finding',
     'tasks.reasoning_gym', 'tasks.subset_sum'),
    ('forward', 'tasks.sums', 'models.lora', 'rollout.describe'),
    ('tasks', 'curvature'),
    ('gradients', 'rollout.decode', 'rollout.token_rows'),
    ('rollout.draft',),
    ('rollout.sampler',),
    ('rollout.slots',),
    ('regimes', 'rollout.experience', 'evaluation.held_out'),
    ('train_step', 'validate'),
    ('run.workdir', 'aot.programs', 'compare.grid'),
    ('warmup', 'compare.study', 'report.journal', 'aot.dry_run'),
    ('trainer', 'diagnose.measure', 'compare.drafting'),
    ('evaluation.scoring', 'diagnose.summary'),
    ('diagnose.lookahead',),
    ('diagnose.study',),
)
LEVEL = {name: i for i, floor in enumerate(FLOORS) for name in floor}
PACKAGES = ('', 'models', 'objectives', 'rollout', 'compare', 'diagnose',
            'aot', 'report', 'evaluation', 'run')
# What a newcomer reads from the launcher to the optax update, in this order;
# mtp_rl/README.md says what each does.
ONE_STEP = ('experiments/train.py', 'mtp_rl/trainer.py',
            'mtp_rl/rollout/experience.py', 'mtp_rl/rollout/sampler.py',
            'mtp_rl/train_step.py', 'mtp_rl/regimes.py',
            'mtp_rl/gradients.py', 'mtp_rl/estimators.py', 'mtp_rl/occ.py',
            'mtp_rl/forward.py', 'mtp_rl/objectives/policy.py',
            'mtp_rl/objectives/mtp.py')
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


def test_the_top_level_holds_the_core_alone():
  assert len(list((ROOT / 'mtp_rl').glob('*.py'))) <= 22


def test_one_rl_step_is_a_dozen_files_that_the_readme_lists():
  assert len(ONE_STEP) <= 12
  lines = [(ROOT / name).read_text().count('\n') for name in ONE_STEP]
  assert sum(lines) <= 2500, ('move what one step does not need elsewhere, as '
                              'rivals.py and curvature.py are')
  text = (ROOT / 'mtp_rl' / 'README.md').read_text()
  places = [text.find(name.removeprefix('mtp_rl/')) for name in ONE_STEP]
  assert min(places) >= 0, ONE_STEP[places.index(min(places))]


def test_the_front_page_is_short_and_starts_with_a_command():
  lines = (ROOT / 'README.md').read_text().splitlines()
  assert len(lines) <= 150
  assert next(i for i, x in enumerate(lines) if x.startswith('```')) < 40
