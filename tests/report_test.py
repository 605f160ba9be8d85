"""The page of a run, token by token: numbers of the batch, text as text."""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess

import jax
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, forward, gradients, occ, tokenizers
from mtp_rl.compare import grid, summary
from mtp_rl.report import (
  closing,
  comparison_figures,
  comparison_page,
  journal,
  page,
  parabola,
  series,
  style,
)
from mtp_rl.rollout import packing, token_rows
from mtp_rl.run import metrics
from mtp_rl.run import workdir as workdir_lib
from tests import batches, conftest

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
LETTERS = tokenizers.CharTokenizer('0123456789')  # V = 13
HOSTILE = ('</script><script>console.error("hostile")</script>'
           '<img src=x onerror=console.error(1)><!--<script>'
           '\N{RIGHT-TO-LEFT OVERRIDE}\N{HEBREW LETTER ALEF}\u2028&lt;'
           '\N{GRINNING FACE}\ud800')


@pytest.fixture(scope='module', name='two', params=[1, 2])
def _two(request):
  """A batch of K modules, its scores, and those after an update."""
  k = request.param
  config = batches.config('detach', mtp=dict(modules=k))
  batch = batches.batch(k)
  score = jax.jit(lambda p, rows: forward.score(
      p, rows, config=config, entropy=True, acceptance=True))
  params = batches.params(k)
  moved = jax.tree.map(lambda x: x * 1.05, params)
  before, after = jax.tree.map(np.asarray, (
      score(params, batch.rows), score(moved, batch.rows)))
  batch = batch._replace(old_main=before.main, old_mtp=before.mtp)
  return config, batch, before, after, moved


def test_token_rows_have_the_numbers_of_the_batch(two):
  config, batch, before, after, _ = two
  more = token_rows.updates(batch, after, config)
  depths = batch.old_mtp.shape[-1]
  for i, mask in enumerate(batch.mask):
    row = token_rows.row(i, batch.rows, before, LETTERS, batches.S, more)
    n = row['length']
    assert n == mask.sum() == len(row['tokens'])
    ids = batch.tokens[i, batches.R:][mask]
    assert row['tokens'] == LETTERS.pieces(ids)
    assert ''.join(row['prompt_tokens']) == LETTERS.decode(
        batch.tokens[i, :batches.R])
    close = lambda got, want: np.testing.assert_allclose(
        np.asarray(got, float), want, rtol=1e-5, atol=1e-9)
    close(row['main'], batch.old_main[i][mask])
    close(row['entropy'], before.entropy[i][mask])
    close(row['advantage'], batch.advantages[i][mask])
    close(row['d_rl'], (after.main - batch.old_main)[i][mask])
    for k in range(depths):
      seen = [v is not None for v in row['mtp'][k]]
      # Depth k reads the column k + 1 before the token.
      at = np.flatnonzero(mask) + batches.R - k - 2
      np.testing.assert_array_equal(
          seen, (at >= 0) & batch.valid[i][np.maximum(at, 0)])
      for name, want in (('mtp', batch.old_mtp), ('top1', before.top1),
                         ('overlap', before.overlap),
                         ('d_mtp', after.mtp - batch.old_main[..., None])):
        got = row[name][k]
        assert [v is not None for v in got] == seen
        close([v for v in got if v is not None],
              want[i, :, k][mask][seen].astype(float))
  metrics_row = json.dumps(row, allow_nan=False)
  assert json.loads(metrics_row) == row


def test_what_was_not_scored_is_null(two):
  config, batch, before, after, _ = two
  bare = before._replace(entropy=None, top1=None, overlap=None)
  row = token_rows.row(0, batch.rows, bare, LETTERS, batches.S,
                       token_rows.updates(batch, after, config))
  whole = token_rows.row(0, batch.rows, before, LETTERS, batches.S)
  assert row['main'] == whole['main'] and None not in row['d_rl']
  assert set(row['entropy']) == {None} and set(row['mtp'][0]) == {None}


def test_packed_rows_have_the_same_products(two):
  """What an update of packed rows would see is what the rows say."""
  config, batch, _, after, moved = two
  more = token_rows.updates(batch, after, config)
  names = np.broadcast_to(np.arange(batches.ROWS, dtype=np.float32)[:, None],
                          batch.mask.shape)
  packed = packing.pack(batch._replace(reference=names))
  work = jax.jit(lambda p, b: gradients.score(p, b, config).deltas)(
      moved, packed)
  d_rl, d_mtp = map(np.asarray, work)
  for i, mask in enumerate(batch.mask):
    here = packed.mask & (packed.reference == i)
    np.testing.assert_allclose(d_rl[here], more['d_rl'][i][mask], atol=1e-5)
    np.testing.assert_allclose(d_mtp[here], more['d_mtp'][i][mask], atol=1e-5)
  again = token_rows.updates(packed, types_of(packed, d_rl, d_mtp), config)
  np.testing.assert_allclose(again['d_mtp'], d_mtp, atol=1e-6)
  np.testing.assert_allclose(
      occ.logprob_products(*work).c,
      np.einsum('bs,bsk->k', more['d_rl'], more['d_mtp']), rtol=1e-3,
      atol=1e-5)


def types_of(batch, d_rl, d_mtp):
  """Return the `LogProbs` whose deltas on a batch are these."""
  from mtp_rl.objectives import logprobs
  return logprobs.LogProbs(batch.old_main + d_rl,
                           batch.old_main[..., None] + d_mtp)


def test_rows_are_the_best_and_the_worst_of_a_prompt():
  rewards = np.asarray([1, 1, 1, 1., 0, 1, 0, 0])
  assert token_rows.contrasting(rewards, 4) == [5, 4, 0, 3]
  assert token_rows.contrasting(np.zeros(6), 1) == [0, 1, 2, 3]


def _row(step=1, text='1', n=3, **more):
  values = [-.5] * n
  return {'step': step, 'kind': 'rollout', 'row': 0, 'prompt': text,
          'answer': text, 'extracted': text, 'reward': 1.,
          'prompt_tokens': [text], 'tokens': [text] * n, 'length': n,
          'main': values, 'entropy': values, 'mtp': [values],
          'top1': [[1] * n], 'overlap': [values], 'advantage': values,
          'd_rl': values, 'd_mtp': [values], **more}


def _workdir(path, rows=(), tokens=(), summary=None):
  config = conftest.tiny_config(seed=7)
  metrics.write_json(os.path.join(path, 'config.json'),
                     config_io.to_dict(config))
  for name, lines in (('metrics', rows), ('tokens', tokens)):
    pathlib.Path(path, name + '.jsonl').write_text(
        ''.join(json.dumps(r) + '\n' for r in lines))
  if summary:
    metrics.write_json(os.path.join(path, 'summary.json'), summary)
  return str(path)


def _data(path):
  text = pathlib.Path(path).read_text(encoding='utf-8')
  found = re.findall(r'<script type="application/json" id="data">'
                     r'(.*?)</script>', text, re.S)
  assert len(found) == 1 and text.count('<script') == 2
  return json.loads(found[0]), text


def test_hostile_text_stays_text(tmp_path):
  workdir = _workdir(tmp_path, [{'step': 0}, {'step': 1, 'reward/mean': 1.}],
                     [_row(text=HOSTILE + 'x' * 10_000)])
  values, text = _data(page.write_run(workdir))
  assert values['tokens'][0]['tokens'][0] == HOSTILE + 'x' * 10_000
  assert 'hostile")</' not in text and '<img' not in text
  assert values['state'] == 'unfinished'
  assert ['seed', '7', '0'] in values['config']


@pytest.mark.parametrize('status', ['complete', 'interrupted', 'diverged'])
def test_the_page_says_how_a_run_ended(status, tmp_path):
  workdir = _workdir(tmp_path, [{'step': 0}],
                     summary={'status': status, 'step': 0})
  state = page.payload(workdir)['state']
  assert state == {'interrupted': 'stopped'}.get(status, status)
  # A summary of an earlier end says nothing of a run that went on.
  _workdir(tmp_path, [{'step': 0}, {'step': 1}])
  assert page.payload(workdir)['state'] == 'unfinished'
  with pytest.raises(config_lib.ConfigError, match='does not exist'):
    page.payload(str(tmp_path / 'nowhere'))


def test_a_long_run_stays_below_three_megabytes(tmp_path):
  rng = np.random.default_rng(0)
  rows = [{'step': s} | {f'a/metric_{i}': rng.normal() for i in range(80)}
          for s in range(1001)]
  tokens = [_row(step, n=1024) for step in range(0, 1001, 50)
            for _ in range(8)]
  path = page.write_run(_workdir(tmp_path, rows, tokens))
  assert os.path.getsize(path) < 3_000_000
  kept = {r['step'] for r in _data(path)[0]['tokens']}
  assert {0, 1000} <= kept and len(kept) >= 5


def test_thinned_curves_keep_means_and_gaps():
  x, y = series.thinned([1, 2, 3, 4, 5], [1., 3., None, 5., 7.], 3)
  assert (x, y) == ([2, 4, 4, 5], [2., 5., None, 7.])
  rows = [{'step': 20, 'a': 1.}, {'step': 40, 'a': 2.}, {'step': 80, 'a': 3.}]
  assert series.series(rows, 'a', 20) == ([20, 40, 60, 80], [1., 2., None, 3.])


# Every choice of every menu, and a pointer over a token and a curve.
_DRIVE = '''<script>
const rest = [], menus = () => [...document.querySelectorAll('select')],
  fire = (e, kind) => e.dispatchEvent(new PointerEvent(
  kind, {bubbles: true, clientX: 200, clientY: 200}));
for (let i = 0; i < menus().length; i++)
  for (let j = 0; j < menus()[i].options.length; j++) {
    menus()[i].selectedIndex = j;
    menus()[i].dispatchEvent(new Event('change'));
    document.querySelectorAll('.answer span').forEach(
      e => fire(e, 'pointerover'));
    rest.push(document.getElementById('tip').textContent.length > 0);
  }
document.querySelectorAll('.chart svg').forEach(e => fire(e, 'pointermove'));
menus().slice(3, 4).forEach(m => {  // any reward
  m.selectedIndex = 0;
  m.dispatchEvent(new Event('change'));
});
const wide = document.documentElement.scrollWidth > innerWidth;
document.title = `driven ${rest.length} ${rest.some(x => x)} ${wide}`;
</script>'''


def _browse(path, width):
  """Open a page in a browser, drive it, and return its DOM as text."""
  html = path.read_text(encoding='utf-8')
  path.write_text(html.replace('</body>', _DRIVE + '</body>'))
  done = subprocess.run(
      [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu',
       '--no-first-run', '--disable-background-networking',
       '--enable-logging=stderr',
       f'--user-data-dir={path.parent / "profile"}', '--dump-dom',
       f'--window-size={width},900', '--virtual-time-budget=2000',
       path.as_uri()], capture_output=True, text=True, timeout=60)
  assert 'CONSOLE' not in done.stderr, done.stderr
  return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed')
@pytest.mark.parametrize('width', [1280, 400])
def test_a_browser_shows_the_page_without_an_error(width, tmp_path):
  rng = np.random.default_rng(0)
  text = HOSTILE.strip('\ud800') + 'x' * 10_000
  value = lambda s: None if s == 3 else rng.normal()
  rows = [{'step': s} | {n: value(s) for n in (
      'reward/mean', 'occ/lambda', 'occ/dot', 'timing_s/update',
      'val/a/greedy')} for s in range(6)]
  held_out = [_row(s, text, kind='held_out', set='a') for s in (0, 5)]
  held_out = [{k: v for k, v in r.items()
               if k not in ('advantage', 'd_rl', 'd_mtp')} for r in held_out]
  workdir = _workdir(tmp_path, rows, [*held_out, _row(5), _row(5, text)])
  path = pathlib.Path(page.write_run(workdir))
  dom = _browse(path, width)
  title = re.search('<title>driven (\\d+) true false</title>', dom)
  assert title and int(title[1]) > 20, dom[:300]
  body = dom.split('<main', 1)[1].split('</main>')[0]
  assert '<script' not in body and '<img' not in body
  assert '&lt;/script&gt;&lt;script&gt;console.error("hostile")' in body
  assert 'x' * 10_000 in body and '\N{HEBREW LETTER ALEF}' in body
  assert '\N{GRINNING FACE}' in body


def _comparison():
  """Made-up runs of three regimes, two seeds, one with a gap."""
  rng = np.random.default_rng(0)
  variants, runs = [], {}
  for regime in ('rl_only', 'detach', 'occ'):
    config = conftest.tiny_config(mtp=dict(regime=regime))
    variants.append(grid.Variant(f'{regime}_x', 'group <b>', regime, config))
    runs[f'{regime}_x'] = {seed: [
        {'step': s, 'reward/mean': rng.uniform(), 'occ/lambda': rng.normal(),
         **({'val/a/greedy': rng.uniform()} if s % 5 == 0 else {})}
        for s in range(21)] for seed in (0, 1)}
  runs['occ_x'][1][7]['reward/mean'] = None
  return variants, runs


@pytest.mark.filterwarnings('error')
def test_a_comparison_has_lines_by_regime_gaps_and_links(tmp_path):
  variants, runs = _comparison()
  rows = summary.compare(variants, runs)
  values = comparison_page.payload(
      variants, runs, rows, lambda n, s: f'{tmp_path}/{n}/seed_{s}',
      str(tmp_path), 'made up', ['occ_x/seed_2'])
  assert values['series']['reward/occ_x'][1][7] is None
  assert ['seed 1', 'occ_x/seed_1/report.html'] in values['links'][
      'rows'][2]
  drawn = [(s['label'], s['colour']) for c in values['charts'][0]['charts']
           for s in c['series']]
  assert drawn and all(c == style.REGIMES[n].colour for n, c in drawn)
  path = tmp_path / 'comparison.html'
  page.write(str(path), values)
  comparison_figures.draw_all(variants, runs, rows, str(tmp_path), 'made up')
  if CHROMIUM:
    dom = _browse(path, 400)
    assert 'false</title>' in dom and 'group &lt;b&gt;' in dom


def test_lines_differ_in_grey_and_beyond_colour():
  lines = list(style.REGIMES.values())
  assert len({(x.dash, x.marker) for x in lines}) == len(lines)
  light = sorted(sum(w * int(x.colour[i:i + 2], 16) for w, i in (
      (.3, 1), (.59, 3), (.11, 5))) for x in lines)
  assert min(np.diff(light)) > 12
  more = style.variants({'a': 'occ', 'b': 'occ', 'c': 'detach'})
  assert more['a'] == style.REGIMES['occ'] and more['c'] == style.REGIMES[
      'detach']
  assert more['b'] not in lines


def test_an_error_of_the_report_is_a_sentence(tmp_path, capsys, monkeypatch):
  workdir = _workdir(tmp_path, [{'step': 0}])
  config = config_io.load(os.path.join(workdir, 'config.json'))
  run = workdir_lib.Run(config, workdir, None, None, None)
  journal.write_page(run, 'running')
  assert _data(os.path.join(workdir, 'report.html'))[0]['state'] == 'running'
  monkeypatch.setattr(page, 'render', lambda values: 1 / 0)
  journal.write_page(run, 'complete')
  said = capsys.readouterr().err.strip()
  assert 'report.html could not be written (ZeroDivisionError' in said
  assert 'the run goes on' in said and len(said.splitlines()) == 1


def test_a_disk_that_was_full_for_a_while_spoils_no_line(tmp_path, capsys):
  workdir = _workdir(tmp_path, [{'step': 0}])
  path = os.path.join(workdir, 'tokens.jsonl')
  for there in True, False:
    if not there:
      os.remove(path)
    notes = journal.Journal(
        workdir_lib.Run(None, workdir, None, None, None), None, 0)
    notes._append('tokens.jsonl', [{'step': 0}] * there)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
      with journal._spoken('tokens.jsonl', workdir):
        notes._append('tokens.jsonl', [{'step': 0, 'text': 'x' * 2000}])
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'tokens.jsonl could not be written' in capsys.readouterr().err
    notes._append('tokens.jsonl', [{'step': 0, 'more': 1}])
    assert metrics.read(path) == [{'step': 0}] * there + [
        {'step': 0, 'more': 1}]


def test_five_closing_lines_say_what_was_reached():
  rows = [{'step': 0, 'val/a/greedy': .25}, {
      'step': 1, 'reward/mean': .5, 'reward/errors': 2, 'occ/lambda': None},
      {'step': 2, 'reward/mean': .75, 'val/a/greedy': 1., 'occ/lambda': .5}]
  summary = {'status': 'interrupted', 'step': 2, 'steps': 9,
             'train_seconds': 7.2}
  lines = closing.lines(rows, summary, 'DIR')
  assert len(lines) == 5 and lines[0] == (
      'interrupted: step 2 of 9, 7 s of training; the same command resumes')
  assert 'a 0.250 -> 1.000' in lines[1] and '0.500 -> 0.750' in lines[2]
  assert lines[2].endswith('failed on: 2') and '+0.5000' in lines[3]
  assert 'DIR/report.html' in lines[4]
  assert len(closing.lines([], summary, 'DIR')) == 5
  rows[0] |= {'after_warmup/loss': .51, 'after_warmup/floor': .3249}
  lines = closing.lines(rows, summary, 'DIR')
  assert len(lines) == 6 and 'warm-up: 0.510 nats a token' in lines[1]
  assert lines[1].endswith('where nothing is memorised, is about 0.325')


def test_the_bar_says_that_it_compiles_until_the_first_step(capsys):
  config = conftest.tiny_config(run=dict(progress=True))
  with metrics.progress(config, 3, 0, 'RL') as bar:
    assert 'compiling (first step)' in capsys.readouterr().err
    bar.update()
    bar.refresh()
  assert 'compiling' not in capsys.readouterr().err


def test_the_picture_of_lambda_shows_what_the_equations_say(tmp_path):
  n = parabola.numbers()
  delta = lambda lam: occ.decomposition(lam, n['c'], n['v2'], parabola.ETA,
                                        parabola.L)
  grid = np.linspace(-3, 3, 6001)
  assert grid[np.argmax(delta(grid))] == pytest.approx(n['star'], abs=1e-3)
  assert delta(n['star']) == pytest.approx(n['gain'])
  assert delta(1e-6) / 1e-6 == pytest.approx(n['slope'], rel=1e-4)
  products = occ.gradient_products(parabola.G_RL, [parabola.G_MTP], np.dot)
  shrunk = occ.guard(np.array([n['star']]), products, parabola.RHO)
  assert float(shrunk[0]) == pytest.approx(n['guard'])
  # The numbers that mtp_rl/README.md names.
  assert (round(n['star'], 2), round(n['guard'], 2)) == (1.41, 1.21)
  parabola.draw(str(tmp_path))
  assert (tmp_path / 'parabola.png').read_bytes()[:4] == b'\x89PNG'
