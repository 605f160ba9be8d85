"""Launchers in a process of their own: bad input ends in one sentence."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
QUICK = '--config=configs/quickstart.py'


def _run(module, *flags):
  start = time.monotonic()
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{module}', *flags], cwd=ROOT,
      capture_output=True, text=True, timeout=120, check=False)
  return done, time.monotonic() - start


@pytest.mark.parametrize('module, flags, said', [
    ('train', (QUICK, '--config.rl.lrr=1'), 'lrr'),
    ('train', (QUICK, '--config.rl.lr=fast'), 'fast'),
    ('train', (QUICK, '--config.mtp.heads=2'), 'is now called mtp.modules'),
    ('train', (QUICK, '-config.occ.pieces', '4'), 'occ.disjoint_parts'),
    ('train', (QUICK + ':dopo',), 'dopo'),
    ('train', ('--config=configs/none.py',), 'configs/none.py'),
    ('train', (QUICK, 'stray'), 'stray'),
    ('train', (QUICK, '--distributed'), 'do not find each other'),
    ('train', (QUICK, '--process=1'), 'go together'),
    ('diagnose', ('--distributed',), 'distributed'),
    ('train', (QUICK, '--config.mtp.modules=0'), 'mtp.modules=0'),
    ('train', (QUICK, '--config.mesh.data=3'), 'mesh.data'),
    ('train', (QUICK, '--config.rollout.max_prompt=3'), 'rollout.max_prompt=3'),
    ('pretrain', (QUICK, '--config.task.name=chess'), 'chess'),
    ('evaluate', (), 'config.json'),
    ('diagnose', (), 'config.json'),
    ('diagnose', ('--steps=first',), '--steps takes whole numbers'),
    ('compare', (QUICK,), '--preset'),
    ('compare', (QUICK, '--preset=table1', '--config.mtp.regime=ce'),
     '--config.mtp.regime is overruled by variant dapo-paper-rl_only'),
    ('compare', (QUICK, '--preset=table2', '--report_only'), 'no complete run'),
    ('compare', (QUICK, '--preset=pareto', '--clips=paper'),
     '--clips is read by --preset=table1,table2,trace alone'),
    ('train', ('--config=configs/from_json.py:nowhere',), 'nowhere'),
])
def test_bad_input_is_one_sentence_within_seconds(module, flags, said,
                                                  tmp_path):
  done, seconds = _run(module, f'--workdir={tmp_path}', *flags)
  assert done.returncode == 2, done.stderr
  assert said in done.stderr and 'Traceback' not in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert seconds < 60 and not list(tmp_path.glob('checkpoints'))


@pytest.mark.parametrize('text, said', [
    ('def get_config(:', 'own.py, line 1: '),
    ('import nothing_like_it', 'own.py, line 1: No module'),
    ('get = 1', "no attribute 'get_config'"),
    ('def get_config():\n  pass', '--config=FILE must be given, and its'),
    ('from ml_collections import ConfigDict as get_config',
     'must return a config.Config of mtp_rl, not a ConfigDict')])
def test_a_faulty_config_file_is_one_sentence(text, said, tmp_path):
  (tmp_path / 'own.py').write_text(text + '\n')
  done, _ = _run('train', f'--config={tmp_path}/own.py',
                 f'--workdir={tmp_path}/run')
  *before, last = done.stderr.strip().splitlines()
  assert done.returncode == 2 and last.startswith('error: ') and said in last
  assert 'Traceback' not in ' '.join(before)  # absl's own warning may be there


@pytest.mark.parametrize('flags', [(), ('--workdir=',)])
def test_a_workdir_is_required(flags):
  done, _ = _run('train', QUICK, *flags)
  assert done.returncode == 2 and '--workdir=DIR must be' in done.stderr


def test_a_launcher_started_elsewhere_says_where_it_runs(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.train', QUICK, '--workdir=run'],
      cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
      capture_output=True, timeout=120, check=False)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert f'run from the root of a checkout, which is {ROOT}' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
