"""Math problem sets as TFDS builders, prepared and read without TensorFlow.

A set is one file in a folder, NAME.jsonl or NAME.parquet, of rows with
`problem` and `answer` (texts; the answer without `$` or box) and optionally
`id`, `overlaps` (evaluation sets that have the same problem) and
`conflicting_answers`. It is prepared once as array_record into a cache keyed
by the file's SHA-256, with rows in the file's order. The metadata of the
prepared set lists the rows that cannot be used, with line and reason.

`SETS` gives the public origin of each set and its number of rows. The checksums
are those of *processed copies* (one JSON object per line with these fields,
made from the named files), not of the files at the origin, so nothing is
downloaded here. Other files under these names are read as well, and reported
as `unlisted`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from typing import NamedTuple

from mtp_rl import config as config_lib

_QWEN = 'QwenLM/Qwen2.5-Math @ a45202bd16f1ec06f433442dc1152d0074773465 : '


class Source(NamedTuple):
  """What is known about a set.

  Attributes:
    rows: of the processed copy.
    sha256: of the processed copy.
    origin: public repository @ commit : path of the file it was made from.
  """
  rows: int
  sha256: str
  origin: str


SETS = {
    'dapo_math_17k': Source(
        17255,
        '0d353cf17975e92c750157c18cc59bc8af069a30fac1f83138c23bb3a4fa8062',
        'MasterVito/SvS @ 9fd8f35375b31b8632b52e715296c264a3ad4176 : '
        'data/dapo_math_17k.parquet'),
    'math_train': Source(
        7472,
        'be609652317668f9e2548f64f21faa34bea212cd3668672c852576acc14a068a',
        'agentica-project/rllm @ 874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5 : '
        'rllm/data/train/math/math.json'),
    'math_test_minus500': Source(
        4500,
        '7f79de81797596a37f9d3477a81391b40c21e6ac89da95e145d78f022fc1889f',
        'ZubinGou/math-evaluation-harness @ '
        'db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5 : data/math/test.jsonl'),
    'gsm8k_train': Source(
        7473,
        'e3db63009b71c98edbb9b4a66b86a68105299fd058e15cabe3e727dacaf8ae7d',
        'openai/grade-school-math @ 3101c7d5072418e28b9008a6636bde82a006892c '
        ': grade_school_math/data/train.jsonl'),
    'gsm8k_test': Source(
        1319,
        '75068b5d9c850011855bc5cb6705c60b546733de37cf5dae16c6e9e0493fa042',
        'openai/grade-school-math @ 3101c7d5072418e28b9008a6636bde82a006892c '
        ': grade_school_math/data/test.jsonl'),
    'aime24': Source(
        30, '78b9081621aae02b2038626e5d5872798c179d7e3a2776a7a206835f297312fd',
        _QWEN + 'evaluation/data/aime24/test.jsonl'),
    'aime25': Source(
        30, '8c2130b08ba777c838d289c10c5a80c5987646a603f714a7898c0dda85b5e171',
        'armenjeddi/mcd @ 76771f969048ebd77a1b4261b0a3469192c6f92a : '
        'evaluation/data/aime25/test.jsonl'),
    'amc23': Source(
        40, '8d405bea52da0e08f28969c9658e7027442edf35aa6b3f405bf620a497ce129d',
        _QWEN + 'evaluation/data/amc23/test.jsonl'),
    'amc22_23_aimo83': Source(
        83, '73ac096c3b2a67e7c6586b8e1349135a2330832f1cfd849bd4b4504ed49c3583',
        'PRIME-RL/PRIME @ 18ad596f08d487bb546d80d738d99ec697bd2e75 : eval/data/'
        'AI-MO/aimo-validation-amc/aimo-validation-amc.jsonl'),
    'math500': Source(
        500,
        '090ef6dcf122b7372c60e9dea9203cca5d55f6176b9b018390faa4a8c52ae143',
        'hkust-nlp/simpleRL-reason @ cf1c7858bfc145a27aa733e75d930d34f0d318a6 '
        ': examples/simplelr_math_eval/data/math500/test.jsonl'),
    'minerva_math': Source(
        272,
        'dbafb15e04841acaaf715e9080cfb61c14bc423a4ac6411c8e4e8ab234ec06c8',
        _QWEN + 'evaluation/data/minerva_math/test.jsonl, answers of GAIR-NLP/'
        'LIMO @ 2284c6a0e6653aa8894bd12fdecc1212ba706c3a : '
        'eval/data/minerva/test.jsonl'),
    'olympiadbench': Source(
        675,
        '4108a259155a645d467545b879ee892770adabf8d9787965d0b23ac06fa74b06',
        _QWEN + 'evaluation/data/olympiadbench/test.jsonl'),
}
EVALUATIONS = ('aime24', 'aime25', 'amc23', 'math500', 'minerva_math',
               'olympiadbench')
HELD_BACK = (*EVALUATIONS, 'amc22_23_aimo83', 'gsm8k_test')


@dataclasses.dataclass(frozen=True)
class Row:
  """One problem of a set.

  Attributes:
    line: its line (JSONL) or row (parquet) in the source, from 1.
    id: as the source names it.
    problem: text.
    answer: text.
    overlaps: comma-separated evaluation sets with the same problem.
    conflicting: whether the source gives it several answers.
  """
  line: int
  id: str
  problem: str
  answer: str
  overlaps: str
  conflicting: bool


class Prepared(NamedTuple):
  """A set as it was read.

  Attributes:
    rows: list of `Row`, in the order of the source.
    rejected: list of {'file', 'line', 'reason'}.
    listed: whether the source is the copy that `SETS` lists.
    sha256: of the source.
  """
  rows: list[Row]
  rejected: list[dict]
  listed: bool
  sha256: str


def find(name, data_dir):
  """Return the path of a set's file in a folder, None if there is none."""
  paths = [os.path.join(data_dir, name + end) for end in ('.jsonl', '.parquet')]
  return next((p for p in paths if data_dir and os.path.isfile(p)), None)


def load(name, data_dir, cache_dir=''):
  """Return the `Prepared` set of a name, preparing it if it is new.

  Args:
    name: of the set, as in `SETS`, or any other.
    data_dir: folder with NAME.jsonl or NAME.parquet.
    cache_dir: of prepared sets; '': ~/.cache/mtp_rl (XDG_CACHE_HOME).

  Raises:
    config.ConfigError: there is no such file, it has no usable row, or the
      cache cannot be written.
  """
  path = find(name, data_dir)
  if path is None:
    origin = (f' (made from {SETS[name].origin})' if name in SETS else
              f'; known sets: {", ".join(SETS)}')
    raise config_lib.ConfigError(
        f'task.data_dir={data_dir!r} has no {name}.jsonl or {name}.parquet; '
        'put it there, or set task.data_dir to where it is; its rows have '
        f'"problem" and "answer"{origin}')
  with open(path, 'rb') as f:
    digest = hashlib.file_digest(f, 'sha256').hexdigest()
  cache = cache_dir or os.path.join(
      os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
      'mtp_rl')
  make, prepared = _builder(), os.path.join(
      os.path.expanduser(cache), f'{name}-{digest[:16]}')
  try:
    builder = make(path, data_dir=prepared, file_format='array_record')
  except Exception as e:  # of many kinds, where a file in it is damaged
    raise _damaged(prepared, path, e) from e
  if not builder.is_prepared():
    builder.source = _usable(path)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its progress
      builder.download_and_prepare()
  except OSError as e:
    if not builder.is_prepared():  # else another process was faster
      raise config_lib.ConfigError(
          f'the prepared {path} cannot be written to {builder.data_dir} '
          f'({e}); set task.cache_dir') from e
  try:
    rows = [_row(features) for features in builder.as_data_source('rows')]
  except (OSError, RuntimeError, TypeError, ValueError) as e:
    raise _damaged(builder.data_dir, path, e) from e
  listed = name in SETS and digest == SETS[name].sha256
  return Prepared(rows, builder.info.metadata['rejected'], listed, digest)


def _damaged(prepared, path, error):
  return config_lib.ConfigError(
      f'the prepared copy {prepared} of {path} is damaged '
      f'({type(error).__name__}); remove it')


def _usable(path):
  """Return what `read` does; raise config.ConfigError if there is no row."""
  try:
    rows, rejected = read(path)
  except (OSError, ValueError) as e:
    raise config_lib.ConfigError(f'{path} cannot be read: {e}') from e
  if not rows:
    first = ', '.join(f'line {r["line"]}: {r["reason"]}' for r in rejected[:3])
    raise config_lib.ConfigError(
        f'{path} has no usable row ({first or "it is empty"}); each needs '
        '"problem" and "answer"')
  return rows, rejected


def _row(features):
  values = {k: v.decode() if isinstance(v, bytes) else int(v)
            for k, v in features.items()}
  return Row(**values | {'conflicting': bool(values['conflicting'])})


def parse(line, values):
  """Return the `Row` of a decoded object; raises ValueError with the reason."""
  if not isinstance(values, dict):
    raise ValueError('not an object')
  texts = {}
  for name in ('problem', 'answer'):
    value = values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
      value = str(value)
    if not isinstance(value, str) or not value.strip():
      raise ValueError(f'{name} is missing or empty')
    texts[name] = value.strip()
  overlaps = values.get('overlaps')
  overlaps = [] if overlaps is None else overlaps
  if not isinstance(overlaps, list):
    raise ValueError('overlaps is no list')
  row = Row(line, str(values.get('id', line)), **texts,
            overlaps=','.join(map(str, overlaps)),
            conflicting=bool(values.get('conflicting_answers')))
  for text in (row.id, row.problem, row.answer, row.overlaps):
    text.encode()  # raises a ValueError on lone surrogates
  return row


def read(path):
  """Return the rows of a source file and what was rejected in it.

  Returns:
    list of `Row`, list of {'file', 'line', 'reason'}.
  """
  rows, rejected = [], []
  for line, decode in enumerate(_lines(path), 1):
    try:
      values = decode()
      if values is not None:
        rows.append(parse(line, values))
    except (ValueError, RecursionError) as e:
      rejected.append({'file': os.path.basename(path), 'line': line,
                       'reason': f'{type(e).__name__}: {e}'[:200]})
  return rows, rejected


def _lines(path):
  """Yield a function per row that decodes it (to None if it is blank)."""
  if path.endswith('.jsonl'):
    with open(path, 'rb') as f:
      for text in f:
        yield lambda: json.loads(text) if text.strip() else None
    return
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise config_lib.ConfigError(
        f'{path} needs the package pyarrow; install it, or give JSONL '
        f'({e})') from e
  for batch in parquet.ParquetFile(path).iter_batches():
    for values in batch.to_pylist():
      yield lambda: values


@functools.cache
def _builder():
  """Return the builder's class; TFDS is slow to import and often not used."""
  import numpy as np
  tfds = config_lib.optional('tensorflow_datasets', 'a math set', 'math')
  tfds.disable_progress_bar()

  class MathSet(tfds.core.GeneratorBasedBuilder):
    """Builds one set from one file; `source` is what `read` made of it."""
    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, path, **kwargs):
      self._path, self.source, self._rejected = path, ([], []), []
      super().__init__(**kwargs)

    def _info(self):
      text = tfds.features.Text()
      return tfds.core.DatasetInfo(
          builder=self, description=f'Rows of {self._path}.',
          features=tfds.features.FeaturesDict(
              dict(line=np.int64, id=text, problem=text, answer=text,
                   overlaps=text, conflicting=np.int64)),
          metadata=tfds.core.MetadataDict({'rejected': self._rejected}),
          disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {'rows': self._generate_examples()}

    def _generate_examples(self):
      rows, rejected = self.source
      self._rejected.extend(rejected)
      for row in rows:
        yield row.line, dataclasses.asdict(row) | {
            'conflicting': int(row.conflicting)}

  return MathSet
