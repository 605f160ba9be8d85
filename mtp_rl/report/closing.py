"""The last lines of a run on the terminal: what was reached, where to look."""

from mtp_rl.report import series

_MEANS = {'complete': '', 'interrupted': '; the same command resumes'}


def _change(rows, name, digits=3):
  """Return 'first -> last' of a metric."""
  found = [r[name] for r in rows if r.get(name) is not None]
  if not found:
    return 'not measured'
  return f'{found[0]:.{digits}f} -> {found[-1]:.{digits}f}'


def lines(rows, summary, workdir):
  """Return five lines, and one on the warm-up where its floor is known.

  Args:
    rows: of metrics.jsonl.
    summary: see `trainer.finish`.
    workdir: of the run.
  """
  names = series.names(rows, 'val/', '/greedy')
  shown = ', '.join(f'{n[4:-7]} {_change(rows, n)}' for n in names[:3])
  more = f', and {len(names) - 3} more sets' if len(names) > 3 else ''
  last = {}
  for row in rows:
    last |= {k: v for k, v in row.items() if v is not None}
  failed = sum(r.get(f'reward/{n}') or 0 for r in rows
               for n in ('errors', 'timeouts', 'crashes', 'not_finite'))
  lam, floor = last.get('occ/lambda'), last.get('after_warmup/floor')
  warm = [] if floor is None else [
      f'loss of the main head at the end of the warm-up: '
      f'{last["after_warmup/loss"]:.3f} nats a token; its floor, where '
      f'nothing is memorised, is about {floor:.3f}']
  return [
      f'{summary["status"]}: step {summary["step"]} of {summary["steps"]}, '
      f'{summary["train_seconds"]:.0f} s of training'
      + _MEANS.get(summary['status'], ''),
      *warm,
      f'held-out greedy, warm-up -> now: {shown or "not measured"}{more}',
      f'reward {_change(rows, "reward/mean")}; '
      f'skipped updates: {last.get("skipped_updates", 0)}; '
      f'answers that the verifier failed on: {int(failed)}',
      f'chance of acceptance, depth 1: '
      f'{_change(rows, "mtp_1/accept_expected")}; lambda: '
      + ('none' if lam is None else f'{lam:+.4f} in the last step'),
      f'see {workdir}/report.html (curves, every token); the numbers are in '
      'metrics.jsonl']
