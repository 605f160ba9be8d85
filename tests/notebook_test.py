"""The notebook runs from top to bottom, draws, and its numbers hold."""

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
CHECKS = '''
for sign, (star, best) in zip((1, -1), quadratic.values(), strict=True):
  assert np.sign(star) == sign and abs(star - best) < .01, (star, best)
assert set(lambdas) == set(estimators.ESTIMATORS)
assert np.all(np.isfinite(list(lambdas.values())))
# The noise shared by both gradients of a minibatch is seen in c_same alone.
assert c_same.mean() - c_cross.mean() > 2 * error(c_same - c_cross)
assert set(runs) == {'detach', 'occ'}
for rows in runs.values():
  assert rows[-1]['step'] == trained.rl.steps
assert any(r.get('occ/lambda') for r in runs['occ'])
'''


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom():
  notebook = nbformat.read(ROOT / 'experiments/colab/occ_lab.ipynb', 4)
  nbformat.validate(notebook)
  assert not any(c.outputs for c in notebook.cells if c.cell_type == 'code')
  notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
  # The kernel chooses its own backend (inline), and imports this checkout.
  env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
  env['PYTHONPATH'] = os.pathsep.join(
      filter(None, [str(ROOT), env.get('PYTHONPATH')]))
  client = nbclient.NotebookClient(notebook, timeout=240,
                                   kernel_name='python3')
  client.execute(env=env, cwd=str(ROOT / 'experiments/colab'))
  outputs = [o for c in notebook.cells for o in c.get('outputs', [])]
  assert sum('image/png' in o.get('data', {}) for o in outputs) >= 4
