"""The notebooks run from top to bottom, anywhere, and their numbers hold."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import nbclient
import nbformat
import packaging
import pytest

ROOT = pathlib.Path(__file__).parent.parent
COLAB = ROOT / 'experiments' / 'colab'
# What is asked of each notebook's variables after its last cell.
CHECKS = {
    'occ_lab': '''
for sign, (star, best) in zip((1, -1), quadratic.values(), strict=True):
  assert np.sign(star) == sign and abs(star - best) < .01, (star, best)
assert set(lambdas) == {*estimators.ESTIMATORS, 'oracle'}
assert np.all(np.isfinite(list(lambdas.values())))
# The noise shared by both gradients of a minibatch is seen in c_same alone.
assert c_same.mean() - c_cross.mean() > 2 * error(c_same - c_cross)
assert set(runs) == {'detach', 'occ'}
for rows in runs.values():
  assert rows[-1]['step'] == trained.rl.steps
assert any(r.get('occ/lambda') for r in runs['occ'])
''', 'train_and_watch': '''
for name, workdir in runs.items():
  rows = metrics.read(str(workdir / 'metrics.jsonl'))
  accuracy = [r['val/arithmetic/greedy'] for r in rows
              if 'val/arithmetic/greedy' in r]
  assert rows[-1]['step'] == config.rl.steps and accuracy[-1] > accuracy[0]
  lambdas = [r['occ/lambda'] for r in rows if 'occ/lambda' in r]
  assert (set(lambdas) == {1.}) == (name == 'λ = 1')
assert 'srcdoc="&lt;!' in show(first).data
''', 'own_task': '''
accuracy = [summary[x]['val/sort_digits/greedy']
            for x in ('after_warmup', 'last')]
assert accuracy[1] > accuracy[0] + .1, accuracy
'''}
FIGURES = {'occ_lab': 4, 'train_and_watch': 1, 'own_task': 1}


def _read(name):
  notebook = nbformat.read(COLAB / f'{name}.ipynb', 4)
  nbformat.validate(notebook)
  return notebook


def _first_cell():
  text = (COLAB / 'first_cell.py').read_text(encoding='utf-8')
  return text.split('"""\n', 1)[1].strip()


def test_every_notebook_is_run_here():
  assert {p.stem for p in COLAB.glob('*.ipynb')} == set(CHECKS)


@pytest.mark.parametrize('name', CHECKS)
def test_notebooks_share_a_first_cell_and_have_no_outputs(name):
  cells = [c for c in _read(name).cells if c.cell_type == 'code']
  assert cells[0].source == _first_cell(), (
      'python experiments/colab/copy_first_cell.py copies it')
  assert not any(c.outputs or c.execution_count for c in cells)


@pytest.mark.long
@pytest.mark.parametrize('name', CHECKS)
def test_a_notebook_runs_from_top_to_bottom(name):
  notebook = _read(name)
  notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name]))
  # The kernel chooses its own backend (inline).
  env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
  client = nbclient.NotebookClient(notebook, timeout=240,
                                   kernel_name='python3')
  client.execute(env=env, cwd=str(COLAB))
  outputs = [o for c in notebook.cells for o in c.get('outputs', [])]
  assert sum('image/png' in o.get('data', {}) for o in outputs) >= (
      FIGURES[name])


@pytest.fixture(scope='module', name='bare')
def _bare(tmp_path_factory):
  """A bare repository with this checkout's files as its one commit."""
  work = tmp_path_factory.mktemp('source')
  names = subprocess.run(
      ['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, check=True,
      capture_output=True, text=True).stdout.splitlines()
  for name in names:
    if (ROOT / name).is_file():
      (work / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(ROOT / name, work / name)
  path = tmp_path_factory.mktemp('bare') / 'mtp_rl.git'
  git = ['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost']
  for command in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all'],
                  ['clone', '-q', '--bare', '.', str(path)]):
    subprocess.run(git + command, cwd=work, check=True)
  return path.as_uri()


def _start(directory, python, url, then='', before=''):
  """Run the first cell alone in a directory; return the ended process."""
  source = _first_cell()
  assert source.count("'ADDRESS-OF-THE-REPOSITORY'") == 1
  source = source.replace('ADDRESS-OF-THE-REPOSITORY', url)
  script = directory.parent / 'cell.py'
  script.write_text('\n'.join([before, source, then]), encoding='utf-8')
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  # As in a kernel, the current folder is on the path, not that of a script.
  code = f'exec(compile(open({str(script)!r}).read(), "cell", "exec"))'
  return subprocess.run([python, '-c', code], cwd=directory, env=env,
                        capture_output=True, text=True)


def _environment(path, *packages):
  """Make an environment with some packages, and return its python and them."""
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(path)],
                 check=True)
  python = path / 'bin' / 'python'
  site = pathlib.Path(subprocess.run(
      [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
      check=True, capture_output=True, text=True).stdout.strip())
  for package in packages:
    shutil.copytree(pathlib.Path(package.__file__).parent,
                    site / package.__name__)
  return str(python), site


@pytest.fixture(name='empty')
def _empty(tmp_path):
  (tmp_path / 'empty').mkdir()
  return tmp_path / 'empty'


@pytest.mark.long
def test_the_first_cell_fetches_and_runs_where_packages_are(
    empty, tmp_path, bare):
  python, site = _environment(tmp_path / 'venv')
  # Packages as here, but not this checkout.
  (site / 'parent.pth').write_text('\n'.join(
      p for p in sys.path if p.endswith('-packages')))
  then = ('import mtp_rl.occ, configs.quickstart\n'
          'assert mtp_rl.__file__.startswith(str(checkout))')
  for fetches in True, False:  # the second time the checkout is found
    done = _start(empty, python, bare, then)
    assert done.returncode == 0, done.stderr
    assert ('fetching file:' in done.stdout) == fetches
    assert 'installing' not in done.stdout
    assert f'mtp_rl is at {empty}/mtp_rl_checkout' in done.stdout


# Stands in for pip: notes how it was called, and "installs" what is needed.
PIP = '''
import json, pathlib, sys, tomllib
from packaging.requirements import Requirement
site = pathlib.Path(__file__).parent.parent
(site / 'called.json').write_text(json.dumps(sys.argv[1:]))
project = tomllib.loads((pathlib.Path(sys.argv[-1]) / 'pyproject.toml')
                        .read_text())['project']
for need in map(Requirement, project['dependencies']):
  for old in site.glob(f'{need.name}-*.dist-info'):
    (old / 'METADATA').unlink()
    (old / 'top_level.txt').unlink()
    old.rmdir()
  info = site / f'{need.name}-99.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(f'Name: {need.name}\\nVersion: 99\\n')
'''


@pytest.mark.long
@pytest.mark.parametrize('loaded', [False, True])
def test_the_first_cell_installs_and_says_when_to_restart(
    empty, tmp_path, bare, loaded):
  python, site = _environment(tmp_path / 'venv', packaging)
  (site / 'pip').mkdir()
  (site / 'pip' / '__main__.py').write_text(PIP)
  (site / 'numpy.py').write_text('')
  (site / 'numpy-1.dist-info').mkdir()  # older than what is needed
  info = site / 'numpy-1.dist-info'
  (info / 'METADATA').write_text('Name: numpy\nVersion: 1\n')
  (info / 'top_level.txt').write_text('numpy\n')
  done = _start(empty, python, bare, before='import numpy' if loaded else '')
  called = json.loads((site / 'called.json').read_text())
  checkout = f'{empty}/mtp_rl_checkout'
  assert called == ['install', '-q', '-c', f'{checkout}/constraints.txt', '-e',
                    checkout]
  assert 'installing' in done.stdout and 'numpy' in done.stdout
  if loaded:
    assert done.returncode == 1 and 'Restart the kernel' in done.stderr
    assert done.stderr.count('\n') == 1 and 'versions of numpy are' in (
        done.stderr)
  done = _start(empty, python, bare)  # after the restart
  assert done.returncode == 0 and 'installing' not in done.stdout, done.stderr


def test_the_first_cell_without_an_address_says_what_to_do(empty):
  done = _start(empty, sys.executable, 'ADDRESS-OF-THE-REPOSITORY')
  assert done.returncode == 1 and done.stderr.count('\n') == 1
  assert 'set REPOSITORY above' in done.stderr
