r"""What a math answer is, and whether it is right.

The answer of a completion is the content of its last `\boxed{...}`. Rules:

  several boxes            the last one to open counts, even inside another
  an unclosed last box     no answer, whatever was boxed before
  no box, an empty box     no answer
  over MAX_ANSWER chars    no answer; the completion itself may have any length
  `\boxed 5`               no box: braces are required

If the reference is an integer, the answer is matched strictly, as text: digits,
around which a sign, thousands separators, `.0`, a currency or degree sign or a
unit in `\text{}` may stand. So `1+1`, `4/2`, `2^1`, `1 2` and `2\%` do not earn
the reward of 2 or 12, which copying from the problem must not earn.

Other numbers (`2.5`, `3e8`, `1.6 \times 10^{-19}`) are compared as numbers, to
a millionth of the reference. Any other pair is compared as text first, without
spacing and size commands, then by math-verify (except against a number below
1e-3, which it would round to 0). Math-verify parses both sides with its own
grammar and compares them in sympy; as the text is untrusted, it runs in worker
processes with limits on time and memory. An expression that is copied from the
problem (`1/4+1/4`, `t^2-49`) earns nothing unless it is the reference's own
text. Source: github.com/huggingface/Math-Verify.
"""

import decimal
import functools
import logging
import re

from mtp_rl import config as config_lib
from mtp_rl.tasks import workers

MAX_ANSWER = 1000  # characters; the longest reference has 210
MEMORY_MB = 1024  # of a worker, beyond the packages

_BOX = re.compile(r'\\boxed\s*\{')
_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
_SPACING = re.compile(
    r'\\(?:[,!;: ]|left(?![a-z])|right(?![a-z])|displaystyle)')
_GROUPING = re.compile(
    r'(?<=[0-9])(?:,\\!|\\!,|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))')
_UNIT = re.compile(
    r'(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|'
    r'\\(?:text|mathrm|mbox)\{([^{}0-9%]*)\}(?:\^(?:[23]|\{[23]\}))?)$')
_NO_UNIT = re.compile(
    r'\b(?:or|and|to|half|per\s*cents?|dozens?|hundreds?|thousands?|'
    r'(?:m|b|tr)illions?|(?:ten|hundred|thousand)ths?|[eix])\b', re.IGNORECASE)
_FRACTION = re.compile(
    r'([+-]?)\\frac(?:\{([0-9]+)\}\{([0-9]+)\}|([0-9])([0-9]))')
_INTEGER = re.compile(r'([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)?')
_NUMBER = re.compile(
    r'([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))'
    r'(?:[eE]([+-]?[0-9]{1,3})|'
    r'\\(?:times|cdot)10\^(?:\{([+-]?[0-9]{1,3})\}|([0-9])))?')
_SMALL = decimal.Decimal('1e-3')


def last_box(text):
  r"""Return the content of the last `\boxed{}` of a text, or None."""
  starts = [opened.end() for opened in _BOX.finditer(text)]
  if not starts:
    return None
  depth = 1
  for brace in _BRACE.finditer(text, starts[-1]):
    depth += {'{': 1, '}': -1}.get(brace[0], 0)
    if not depth:
      return text[starts[-1]:brace.start()]
  return None


def _plain(text):
  text = _SPACING.sub(' ', _GROUPING.sub(',', text)).strip()
  if len(text) > 1 and text[0] == text[-1] == '$':
    text = text[1:-1].strip()
  return text


def integer(text):
  r"""Return the integer that a text writes out, as canonical digits, or None.

  `\$1{,}050.00` gives '1050', `-07^\circ` '-7', `2\%` and `1+1` None.
  """
  text = _plain(text).removeprefix(r'\$').strip()
  unit = _UNIT.search(text)
  if unit and not _NO_UNIT.search(unit[1] or ''):
    text = text[:unit.start()].strip()
  match = _INTEGER.fullmatch(text)
  if match is None:
    return None
  digits = match[2].replace(',', '').lstrip('0') or '0'
  return '-' + digits if match[1] == '-' and digits != '0' else digits


def number(text):
  r"""Return the Decimal that a text writes out, or None.

  `2.50`, `3e8` and `3 \times 10^{8}` are numbers, `5/2` and `1 2` are none.
  """
  text = re.sub(r'\s*(\\times|\\cdot)\s*', r'\1', _plain(text))
  match = _NUMBER.fullmatch(text)
  if match is None:
    return None
  return decimal.Decimal(match[1]).scaleb(
      int(match[2] or match[3] or match[4] or 0))


def _squeezed(text):
  text = re.sub(r'\\[dt]frac', r'\\frac', _plain(text))
  apart = re.sub(r'(?<=[0-9])\s+(?=[0-9])', '\0', text)  # `1 2` is not 12
  return re.sub(r'\s+', '', apart).rstrip('.').replace('\0', ' ')


def normal(text):
  """Return a normal form: answers with equal normal forms are the same."""
  whole = integer(text)
  if whole:
    return whole
  text = _squeezed(text)
  fraction = _FRACTION.fullmatch(text)
  if not fraction:
    return text
  sign, *parts = fraction.groups('')
  return f'{sign}{parts[0] + parts[2]}/{parts[1] + parts[3]}'


def copied(box, problem):
  """Return whether an expression occurs in a problem, spacing aside.

  Numbers do not count: a problem may contain the number that it asks for.
  """
  if integer(box) or number(box) is not None:
    return False
  return re.search(
      rf'(?<![0-9A-Za-z]){re.escape(_squeezed(box))}(?![0-9A-Za-z])',
      _squeezed(problem)) is not None


def answer(completion):
  """Return the normalised answer of a completion, '' if it gives none."""
  box = last_box(completion)
  return '' if box is None or len(box) > MAX_ANSWER else normal(box)


def scorer():
  """Return math-verify as (reference, box) -> 0.0 or 1.0, for a worker."""
  import math_verify  # an extra: imported when it is used
  # Its own timeout uses a signal in this process; the pool's timeout decides.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  parse = functools.partial(math_verify.parse, parsing_timeout=None)
  reference_of = functools.lru_cache(maxsize=4096)(
      lambda text: parse(f'${text}$'))
  # Only the box counts: do not search the words around it for a number.
  boxed = [math_verify.LatexExtractionConfig(
      boxed_match_priority=0, try_extract_without_anchor=False)]

  def score(reference, box):
    found = parse(rf'\boxed{{{box}}}', extraction_config=boxed)
    return float(math_verify.verify(reference_of(reference), found,
                                    timeout_seconds=None))

  score(r'\frac{1}{2}', '0.5')  # the parser builds its tables when first used
  return score


def check_installed():
  """Raise config.ConfigError where math-verify is missing."""
  config_lib.optional('math_verify', 'the math verifier', 'math')


class MathVerifier:
  """Rewards of completions; see the module's text.

  Attributes:
    counts: failures in the workers, see `workers.Pool`.
  """

  def __init__(self, timeout_s, processes):
    """Set up the pool; processes start when first needed.

    Args:
      timeout_s: seconds that one answer may take.
      processes: workers.
    """
    self._pool = workers.Pool(scorer, (), timeout_s, processes, MEMORY_MB,
                              preload=[__name__, 'math_verify'])
    self.counts = self._pool.counts

  @property
  def longest_s(self):
    """Longest time in seconds that an answer took or was awaited."""
    return self._pool.longest_s

  def rewards(self, references, completions, problems=None):
    """Return 1.0 for a right answer, else 0.0.

    Args:
      references: the right answers, texts without a box.
      completions: as many texts of the model.
      problems: as many texts; expressions copied from them earn nothing. None:
        copying is not checked.
    """
    rewards, asked = [0.] * len(references), []
    problems = problems or [''] * len(references)
    for i, (reference, text, problem) in enumerate(
        zip(references, completions, problems, strict=True)):
      given, right = answer(text), normal(reference)
      if not given or given == right or integer(reference):
        rewards[i] = float(bool(given) and given == right)
        continue
      box, known = last_box(text), number(reference)
      found = number(box)
      if known is not None and found is not None:
        rewards[i] = float(abs(found - known) <= abs(known) / 10 ** 6)
      elif copied(box, problem):
        continue
      elif known is None:
        asked.append((i, [reference, box]))
      elif abs(known) >= _SMALL:
        asked.append((i, [f'{known:f}', box]))
    scores = self._pool.score_all(request for _, request in asked)
    for (i, _), score in zip(asked, scores):
      rewards[i] = score
    return rewards

  def start(self):
    """Start the workers; raises config.ConfigError."""
    self._pool.start()

  def close(self):
    """End the workers."""
    self._pool.close()
