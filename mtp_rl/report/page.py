"""report.html: one self-contained page of a run, from its files alone.

The page is template.html with the data as JSON in a script tag. Text of a run
reaches the reader as text: `escaped` keeps it inside the tag, and the page
shows it by textContent. The browser draws the curves.
"""

import datetime
import importlib.resources
import json
import os

from mtp_rl import config as config_lib
from mtp_rl import config_io
from mtp_rl.report import series, style
from mtp_rl.run import metrics

POINTS = 1000  # of a curve
_TOKENS = 1_500_000  # bytes of JSON for the token view
_PARTS = ('rollout', 'reward', 'score', 'update', 'reshard', 'eval')
_STATES = {
    'complete': ('complete', 'All steps are done.'),
    'interrupted': ('stopped', 'The same command resumes.'),
    'diverged': ('diverged', 'Too many updates in a row were not finite.'),
    'pretrained': ('warm-up complete', 'experiments.pretrain: the warm-up '
                   'alone; others start from it by warmup.init.'),
    'running': ('running', 'As of the last evaluation; load the page again.'),
    '': ('unfinished', 'Still running, or ended without a summary.')}
_REFERENCES = {'main_old': 'log π of the main head at rollout',
               'mtp_old': 'its own log π at rollout'}


def escaped(values):
  """Return values as JSON that nothing in a script tag can end or open."""
  text = json.dumps(values, separators=(',', ':'), allow_nan=False)
  for c in '<>&':
    text = text.replace(c, f'\\u{ord(c):04x}')
  return text


def render(values):
  """Return the page of a payload, see template.html for its keys."""
  template = importlib.resources.files('mtp_rl.report').joinpath(
      'template.html').read_text(encoding='utf-8')
  before, after = template.split('__DATA__')
  return before + escaped(values) + after


def write(path, values):
  """Write a page: a reader sees the old one or the new one."""
  with open(path + '.part', 'w', encoding='utf-8') as f:
    f.write(render(values))
  os.replace(path + '.part', path)


class Curves:
  """The series of a page, each once, with the steps that they share.

  Attributes:
    series: name -> [key of steps, values] or [.., .., spreads].
    steps: list of lists of steps.
  """

  def __init__(self):
    self.series, self.steps, self._known = {}, [], {}

  def add(self, name, x, y, spread=None):
    """Add a series; x are steps, y numbers or None."""
    key = self._known.setdefault(tuple(x), len(self._known))
    if key == len(self.steps):
      self.steps.append(list(x))
    more = [] if spread is None else [metrics.to_json(spread, 5)]
    self.series[name] = [key, metrics.to_json(y, 5), *more]

  def add_rows(self, prefix, rows, spacing=1):
    """Add every metric of the rows of a JSONL file."""
    for name in series.names(rows):
      x, y = series.thinned(*series.series(rows, name, spacing), POINTS)
      if name != 'step' and not all(v is None for v in y):
        self.add(prefix + name, x, y)


def chart(title, unit, names, x='RL step', **more):
  """Return a chart's description for template.html.

  Args:
    title: above it.
    unit: what its y axis counts.
    names: list of (series, label).
    x: what the x axis counts.
    **more: low, high (ends that y covers at least), bounds (lines), log.
  """
  return {'title': title, 'unit': unit, 'x': x, **more, 'series': [
      {'name': name, 'label': label,
       **style.SERIES[i % len(style.SERIES)]._asdict()}
      for i, (name, label) in enumerate(names)]}


def _depths(rows, end, label='depth {}'):
  return [('rl:' + n, label.format(n.split('/')[0][4:]))
          for n in series.names(rows, 'mtp_', '/' + end)]


def _warmup_charts(rows):
  x, pre = 'update', lambda found: [('warmup:' + n, label)
                                    for n, label in found]
  modules = [(n, f'depth {n.split("/")[0][4:]}')
             for n in series.names(rows, 'mtp_', '/loss')]
  return [
      chart('cross-entropy', 'nats a token', pre(
          [('warmup/loss', 'main head'), *modules]), x),
      chart('acceptance of drafts', 'share of tokens', pre(
          [(n, f'depth {n.split("/")[0][4:]}')
           for n in series.names(rows, 'mtp_', '/accept_expected')]), x,
          low=0, high=1)]


def _rl_charts(rows, config: config_lib.Config):
  rl = lambda found: [('rl:' + n, label) for n, label in found]
  held_out = [(n, n[4:]) for n in series.names(rows, 'val/')
              if n.rsplit('/', 1)[1].startswith(('greedy', 'avg@'))]
  bounds = [{'y': y, 'label': name} for name, y in (
      ('lambda_min', config.occ.lambda_min),
      ('lambda_max', config.occ.lambda_max)) if abs(y) < float('inf')]
  if not config.mtp.regime.startswith('occ'):
    bounds = []
  share = dict(low=0, high=1)
  products = [chart(f'c as {n} measures it', 'product of gradients',
                    rl([(name, n)]), log=True)
              for name, n in series.measured(rows, 'c')
              if n not in ('logprob', 'authors')]
  return [
      chart('reward', 'mean of the rollout', rl(
          [('reward/mean', 'samples')]), **share),
      chart('held-out accuracy', 'share of the reward', rl(held_out), **share),
      chart('entropy of the policy', 'nats a token', rl(
          [('actor/entropy', 'main head')]), low=0),
      chart('λ', 'coefficient of the MTP gradient', rl(
          [('occ/lambda', 'λ as used'),
           *((n, f'λ of depth {n[11:]}')
             for n in series.names(rows, 'occ/lambda_')),
           *((n, 'before bounds')
             for n, _ in series.measured(rows, 'lambda_star'))]),
          bounds=bounds),
      chart('c by log-probs, ⟨δ_RL, δ_MTP⟩', 'nats², sum of a minibatch', rl(
          [('occ/dot', 'log-probs')]), log=True),
      *products,
      chart('cosine of RL and MTP', '−1 to 1', rl(  # noqa: RUF001
          [('occ/cos', 'log-probs'), *(
              (n, f'gradients ({e})') for n, e in series.measured(rows, 'cos')
              if e not in ('logprob', 'authors'))]), low=-1, high=1),
      chart('acceptance by draft position', 'chance, the drafts before it kept',
            _depths(rows, 'accept_expected'), **share),
      chart('foreseen by the argmax', 'share of tokens',
            _depths(rows, 'accept_top1'), **share),
      chart('length of a completion', 'tokens', rl(
          [('response_length/mean', 'mean'),
           ('response_length/max', 'longest')]), low=0),
      chart('seconds of a step, by part', 's', rl(
          [(f'timing_s/{p}', p) for p in _PARTS]), log=True)]


def _facts(rows, config: config_lib.Config, step):
  """Return [(name, text)] of what a run reached."""
  last = {}
  for row in rows:
    last |= {k: v for k, v in row.items() if v is not None}
  total = lambda n: sum(r.get(n) or 0 for r in rows)
  out = [('step', f'{step} of {config.rl.steps}'),
         ('regime', config.mtp.regime), ('seed', str(config.seed))]
  for name in series.names(rows, 'val/', '/greedy'):
    first = next(r[name] for r in rows if name in r)
    show = lambda x: '–' if x is None else f'{x:.3f}'  # noqa: RUF001
    out.append((f'held-out {name[4:-7]}, greedy',
                f'{show(first)} → {show(last.get(name))}'))
  if 'reward/mean' in last:
    out.append(('reward of the last step', f'{last["reward/mean"]:.3f}'))
  out += [('seconds of training', f'{total("timing_s/step"):.0f}'),
          ('skipped updates', str(last.get('skipped_updates', 0))),
          ('verifier: errors, timeouts, crashes',
           ', '.join(str(int(total(f'reward/{n}')))
                     for n in ('errors', 'timeouts', 'crashes')))]
  if bad := total('reward/not_finite'):
    out.append(('rewards not finite', str(int(bad))))
  return out


def token_rows(rows, budget=_TOKENS):
  """Return rows of tokens.jsonl that take at most `budget` bytes as JSON.

  Steps are left out evenly (the first and last stay) down to eight, then long
  rows are cut short, then more of both.
  """
  size = lambda some: sum(len(escaped(r)) for r in some)
  by_step = {}
  for row in rows:
    by_step.setdefault(row['step'], []).append(row)
  sizes = {s: size(by_step[s]) for s in by_step}
  steps, length = sorted(by_step), max(
      (len(r['tokens']) for r in rows), default=0)
  for fewest, shortest in ((8, 128), (2, 16)):
    while len(steps) > fewest and sum(sizes[s] for s in steps) > budget:
      steps = steps[:-1:2] + steps[-1:]
    while length > shortest and sum(sizes[s] for s in steps) > budget:
      length = max(length // 2, shortest)
      by_step = {s: [_cut(r, length) for r in by_step[s]] for s in steps}
      sizes = {s: size(by_step[s]) for s in steps}
  return [r for s in steps for r in by_step[s]]


def _cut(row, count):
  """Return a row of tokens.jsonl with the first tokens alone."""
  cut = lambda v: [x[:count] for x in v] if v and isinstance(
      v[0], list) else v[:count]
  return {k: cut(v) if isinstance(v, list) and k != 'prompt_tokens' else v
          for k, v in row.items()}


def warm_rows(workdir, config: config_lib.Config):
  """Return the metrics of the warm-up that a run begins with."""
  return metrics.read(os.path.join(config.warmup.init or workdir,
                                   'warmup.jsonl'))


def payload(workdir, status=None):
  """Return the page's data from the files of a workdir.

  Args:
    workdir: directory of a run, of any age.
    status: of `trainer.finish`, 'pretrained' or 'running'; None: as
      summary.json says.

  Raises:
    config.ConfigError: there is no run.
  """
  path = lambda name: os.path.join(workdir, name)
  config = config_io.load(path('config.json'))
  rows, warm = metrics.read(path('metrics.jsonl')), warm_rows(workdir, config)
  step = rows[-1]['step'] if rows else 0
  if status is None:
    status = _known_status(path('summary.json'), step)
  state, note = _STATES.get(status, _STATES[''])
  default, curves = config_lib.Config(), Curves()
  curves.add_rows('rl:', rows)
  curves.add_rows('warmup:', warm, 20)
  seconds = [(p, sum(r.get(f'timing_s/{p}') or 0 for r in rows))
             for p in _PARTS]
  tokens = token_rows(metrics.read(path('tokens.jsonl')))
  now = datetime.datetime.now().astimezone()
  return {
      'title': style.title(config), 'state': state,
      'note': f'{note} Written {now:%Y-%m-%d %H:%M %Z}.',
      'facts': _facts(rows, config, step),
      'charts': [
          {'id': 'curves', 'title': 'RL', 'charts': _rl_charts(rows, config)},
          {'id': 'warmup', 'title': 'Warm-up', 'charts': _warmup_charts(warm)}],
      'series': curves.series, 'steps': curves.steps,
      'plain': style.SERIES[0]._asdict(),
      'seconds': [(p, s) for p, s in seconds if s],
      'tokens': tokens,
      'depths': max((len(r['mtp']) for r in tokens), default=0),
      'reference': _REFERENCES[config.mtp.reference],
      'config': [[n, str(config_io.field(config, n)),
                  str(config_io.field(default, n))]
                 for n in config_io.differences(config, default)]}


def _known_status(path, step):
  """Return the status in summary.json, '' where it is older than the run."""
  try:
    with open(path, encoding='utf-8') as f:
      summary = json.load(f)
    return summary['status'] if summary['step'] == step else ''
  except (OSError, ValueError, KeyError, TypeError):
    return ''


def write_run(workdir, status=None):
  """Write report.html of a run and return its path; see `payload`."""
  path = os.path.join(workdir, 'report.html')
  write(path, payload(workdir, status))
  return path
