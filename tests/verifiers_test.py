r"""What counts as an answer, strict integers, math-verify in its workers."""

import json
import os
import pathlib

import pytest

from benchmarks import verifier_fuzz
from mtp_rl.tasks import verifiers

DATA = os.environ.get('MTP_RL_DATA', '')


@pytest.fixture(scope='module', name='verifier')
def _verifier():
  verifier = verifiers.MathVerifier(timeout_s=20., processes=1)
  yield verifier
  verifier.close()


@pytest.mark.parametrize('text, box', [
    (r'so \boxed{5}.', '5'), (r'\boxed{5} no, \boxed {6}', '6'),
    (r'\boxed{\frac{1}{2}} x}', r'\frac{1}{2}'), (r'\boxed{5} \boxed{6', None),
    (r'\boxed{\boxed{7}}', '7'), (r'\boxed{\{1\}}', r'\{1\}'), ('5', None),
    (r'\boxed{', None), (r'\boxed 5', None), ('', None), (r'\boxed{}', ''),
    (r'\boxed{\}}', r'\}'), (r'\boxed{a\\}b}', r'a\\'), ('\0' * 9, None)])
def test_the_last_box_counts(text, box):
  assert verifiers.last_box(text) == box


@pytest.mark.parametrize('text, value', [
    ('5', '5'), (' -05 ', '-5'), ('+5', '5'), ('-0', '0'), ('1,234', '1234'),
    (r'\$1{,}050.00', '1050'), (r'10,\!080', '10080'), ('$7$', '7'),
    (r'28^\circ', '28'), (r'28^{\circ}', '28'), (r'3\text{ cm}', '3'),
    (r'3 \mathrm{~km}', '3'), ('9' * 900, '9' * 900), ('1+1', None),
    (r'2\%', None), ('4/2', None), ('2^1', None), ('2.5', None), ('', None),
    ('x=5', None), ('1,2', None), ('12,34', None), ('1 2', None), ('५', None),
    (r'3\text{2}', None), (r'1\;2', None), ('1$2', None), ('1\n2', None),
    (r'2\text{ million}', None), (r'5\text{ or six}', None),
    (r'2\text{\%}', None), (r'1\,234', '1234'), (r'1\,2', None),
    ('--5', None), ('5,', None), (r'\frac{10}{2}', None),
    (r'20\text{ cm}^2', '20'), (r'20 \text{ cm}^{3}', '20'),
    (r'5\mathrm{i}', None), (r'5\text{ hundredths}', None),
    (r'5\text{ tenths}', None), (r'5\text{ per cent}', None),
    (r'5\text{ millions}', None), (r'5\text{ Million}', None),
    (r'5\text{ Percent}', None), (r'5\text{ trillion}', None)])
def test_integers_are_written_out_digits(text, value):
  assert verifiers.integer(text) == value


def test_an_integer_is_matched_strictly_and_at_once(verifier):
  texts = [r'\boxed{2}', r'\boxed{02}', r'\boxed{1+1}', r'\boxed{2\%}',
           r'\boxed{2}, or \boxed{3}', r'\boxed{3}, no \boxed{2}', r'\boxed{2',
           '', '2', r'\boxed{}', 'x' * 10 ** 6, r'\boxed{2}' * 10 ** 5,
           r'\boxed{' * 10 ** 5, rf'\boxed{{{"2" * 10 ** 6}}}',
           'x' * 10 ** 6 + r'\boxed{2}']
  want = [1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
  assert verifier.rewards(['2'] * len(texts), texts) == want
  assert verifier.longest_s == 0.  # no worker was asked


def test_expressions_go_to_math_verify(verifier):
  cases = [
      ('3e8', r'\boxed{3 \times 10^{8}}', 1), ('3e8', r'\boxed{24e}', 0),
      ('3e8', r'\boxed{300000000}', 1), ('1e-3', r'\boxed{0.001}', 1),
      ('1.6\\times10^{-19}', r'\boxed{0.0}', 0), ('2.5', r'\boxed{2.50}', 1),
      ('2.5', r'\boxed{\frac{5}{2}}', 1), ('12', r'\boxed{1 2}', 0),
      (r'\frac{1}{2}', r'\boxed{0.5}', 1), (r'\frac{1}{2}', r'\boxed{2/4}', 1),
      (r'\frac{1}{2}', r'\boxed{\dfrac{1}{2}}', 1),
      (r'\frac{1}{2}', r'\boxed{\frac{1}{3}}', 0),
      (r'\frac{1}{2}', r'0.5', 0), (r'\frac{1}{2}', r'\boxed{0.5', 0),
      (r'\frac{1}{2}', r'\boxed{\text{maybe } 1/3, 1/2}', 0),
      (r'\sqrt{2}+x', r'\boxed{x+2^{1/2}}', 1), ('(1,2)', r'\boxed{(2,1)}', 0),
      (r'\left( 3, \frac{\pi}{2} \right)', r'\boxed{(3,\frac{\pi}{2})}', 1),
      (r'\text{Monday}', r'\boxed{\text{Monday}}', 1),
      (r'\text{Monday}', r'\boxed{\text{Sunday}}', 0),
      ('1,-2', r'\boxed{-2, 1}', 1), ('1,-2', r'\boxed{1}', 0),
      (r'\frac{1}{2}', rf'\boxed{{{"1+" * 10 ** 5}1}}', 0)]
  got = verifier.rewards([c[0] for c in cases], [c[1] for c in cases])
  assert got == [c[2] for c in cases]


def test_what_stands_in_the_problem_earns_nothing(verifier):
  """But for numbers, and for the reference's own text."""
  problem = (r'Compute $\dfrac{1}{4} + \frac 14$ or factor $t^2-49$; is it '
             r'$(t-7)(t+7)$, and $x = 0.25$?')
  cases = [('1/2', r'\frac{1}{4}+\frac14', 0), ('1/2', r'\frac12', 1),
           ('1/2', r'\tfrac{1}{4} +\frac 14', 0), ('1/2', '2/4', 1),
           ('(t+7)(t-7)', 't^2-49', 0), ('(t+7)(t-7)', '(t-7)(t+7)', 0),
           ('(t-7)(t+7)', '(t-7) (t+7)', 1), ('(t+7)(t-7)', '-49+t^2', 1),
           (r'\frac{1}{4}', '0.25', 1), ('x+t^2', 't^2+x', 1)]
  got = verifier.rewards([c[0] for c in cases],
                         [rf'\boxed{{{c[1]}}}' for c in cases],
                         [problem] * len(cases))
  assert got == [c[2] for c in cases]


def test_equal_answers_have_one_name():
  same = [r'\boxed{\dfrac{1}{2}}', r'\boxed{ \frac{1}{2}. }', r'\boxed{1/2.}',
          r'\boxed{$\frac {1}{2}$}', r'\boxed{\frac12}']
  assert len({verifiers.answer(t) for t in same}) == 1
  assert verifiers.answer(r'\boxed{\$1,000}') == verifiers.answer(
      r'\boxed{1000}') == '1000'
  assert verifiers.answer('1000') == '' == verifiers.answer(r'\boxed{.}')


@pytest.mark.long
def test_the_pool_holds_against_hostile_answers():
  """The whole fuzz is benchmarks/verifier_fuzz.py."""
  seen = verifier_fuzz.fuzz(200, clock_s=.4, processes=2, batch=100)
  assert seen['sane'] and seen['asked'] > 150
  assert seen['longest_s'] < 10  # a busy machine, but no hang


@pytest.mark.skipif(not DATA, reason='MTP_RL_DATA names no folder')
@pytest.mark.parametrize('path', sorted(pathlib.Path(DATA or '.').glob(
    '*.jsonl')) if DATA else [], ids=lambda p: p.stem)
def test_every_reference_verifies_against_itself(path, verifier):
  with open(path, encoding='utf-8') as f:
    answers = [json.loads(line)['answer'] for line in f]
  boxed = [rf'Therefore \boxed{{{a}}}.' for a in answers]
  assert verifier.rewards(answers, boxed) == [1.] * len(answers)
