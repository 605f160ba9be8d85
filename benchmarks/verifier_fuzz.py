r"""Fuzz the math verifier with hostile answers: speed, failures, waits.

    python -m benchmarks.verifier_fuzz --count=10000 --clock=2 --processes=2

Every answer is boxed and compared with a reference that is not an integer, so
every answer with a closed box reaches math-verify. After each batch the pool
must still tell right from wrong. The exit code is 1 if it cannot, or if an
answer was awaited more than a second longer than --clock.
"""

import argparse
import random
import sys
import time

from mtp_rl.tasks import verifiers

_LATEX = (
    r'\frac \sqrt \int \sum \lim \infty \pi \sin \log ^ _ { } ( ) [ ] \{ \} | '
    r'\cup \cap \le \ge = < > + - * / ! , . ; : & \\ \% \$ $ x y n 0 1 2 7 99 '
    r'\begin{pmatrix} \end{pmatrix} \left( \right) \text{ \mathbb{R} \boxed{ '
    r'\binom \mod \cdot \to \pm \neq \in \emptyset \overline \circ')
_TOKENS = tuple(_LATEX.split())
REFERENCES = (r'\frac{1}{2}', r'\sqrt{2}+x', '(1,2)', r'[0,\infty)',
              r'\begin{pmatrix}1\\2\end{pmatrix}', r'x=\pm 3', '0.123')
_SANE = ((r'\frac{1}{2}', r'\boxed{0.5}', 1.),
         (r'\frac{1}{2}', r'\boxed{\frac{1}{3}}', 0.),
         ('(1,2)', r'\boxed{\left(1, 2\right)}', 1.))


def hostile(rng):
  """Return one hostile answer (the content of a box); rng: random.Random."""
  n = rng.choice((3, 30, 120, 450))
  kinds = (
      lambda: '^{'.join(['9'] * n) + '}' * (n - 1),
      lambda: f'({"9" * n})^{{{"9" * n}}}',
      lambda: f'({10 ** rng.randrange(10)}){"!" * (n % 7 + 1)}',
      lambda: '(' * n + '1' + ')' * n,
      lambda: '(' * n,
      lambda: r'\sqrt{' * (n // 3) + '2' + '}' * (n // 3),
      lambda: r'\frac{1}{1+' * (n // 4) + 'x' + '}' * (n // 4),
      lambda: '+'.join(f'x^{{{i}}}' for i in range(n // 4)),
      lambda: rf'(x+y+z+w)^{{{n}}}-(w+z+y+x)^{{{n}}}',
      lambda: rf'\int_0^{{{n}}} \frac{{\sin(x^x)}}{{\log(x+{n})}} dx',
      lambda: rf'\sum_{{k=1}}^{{10^{{{n}}}}} \frac{{1}}{{k^k}}',
      lambda: rf'\lim_{{x\to 0}} (\sin(x)/x)^{{x^{{-{n}}}}}',
      lambda: rf'\binom{{10^{{{n % 13}}}}}{{{n * 1000}}}',
      lambda: ','.join(str(rng.randrange(10 ** 9)) for _ in range(n // 5)),
      lambda: r'\begin{pmatrix}' + '&'.join('x' * 3 for _ in range(n // 5)) +
              r'\end{pmatrix}^{-1}',
      lambda: '\0' * (n % 9) + r'\frac{1}{2}' + '\0',
      lambda: '\ud800' * (n % 5 + 1) + '1/2' + '\udfff',
      lambda: ''.join(chr(rng.randrange(0x110000)) for _ in range(n)),
      lambda: ''.join(rng.choices(_TOKENS, k=n)),
      lambda: ' '.join(rng.choices(_TOKENS, k=n // 2)),
      lambda: '__import__("os").system("exit 1")',
      lambda: r'\boxed{' * (n % 50) + '1/2',
      lambda: '0.' + '3' * n,
      lambda: f'1e{"9" * (n % 12 + 1)}',
      lambda: f'{"1" * n}_{{2}}',
      lambda: r'\frac{1}{2}' * (n // 11 + 1),
  )
  return rng.choice(kinds)()


def balanced(text):
  """Return text with its braces closed, so that the box around it closes."""
  depth, out = 0, []
  for c in text.replace('\\{', '(').replace('\\}', ')'):
    depth += (c == '{') - (c == '}')
    if depth < 0:
      depth = 0
      continue
    out.append(c)
  return ''.join(out) + '}' * depth


def fuzz(count, clock_s, processes, seed=0, batch=200):
  """Score `count` hostile answers; return a dict of what was seen.

  'sane': whether known answers were judged correctly after every batch;
  'asked': how many answers reached math-verify; 'longest_s': the longest wait
  for an answer in seconds.
  """
  rng, earned, sane, asked = random.Random(seed), 0., True, 0
  verifier = verifiers.MathVerifier(clock_s, processes)
  start = time.perf_counter()
  try:
    for first in range(0, count, batch):
      size = min(batch, count - first)
      references = [rng.choice(REFERENCES) for _ in range(size)]
      texts = [rf'\boxed{{{balanced(hostile(rng))}}}' for _ in range(size)]
      asked += sum(bool(verifiers.answer(t)) for t in texts)
      earned += sum(verifier.rewards(references, texts))
      got = verifier.rewards(*([s[i] for s in _SANE] for i in (0, 1)))
      sane &= got == [s[2] for s in _SANE]
      if sys.stderr.isatty():
        print(f'\r{first + size}/{count} {verifier.counts}', end='',
              file=sys.stderr)
  finally:
    verifier.close()
  return {'answers': count, 'asked': asked, 'earned': earned, 'sane': sane,
          'seconds': time.perf_counter() - start,
          'longest_s': verifier.longest_s, **verifier.counts}


def main():
  """Fuzz, and print what was seen."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--count', type=int, default=10000)
  parser.add_argument('--clock', type=float, default=2.)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  seen = fuzz(args.count, args.clock, args.processes, args.seed)
  print(f'{seen["answers"] / seen["seconds"]:.1f} answers/s')
  for name, value in seen.items():
    print(f'{name:10s} {value:.2f}' if isinstance(value, float)
          else f'{name:10s} {value}')
  if not seen['sane'] or seen['longest_s'] > args.clock + 1:
    sys.exit('error: the pool did not hold')


if __name__ == '__main__':
  main()
