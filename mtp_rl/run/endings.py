"""How a run ends: exit codes, and the errors that stand for them."""

from mtp_rl import config as config_lib

COMPLETE = 0
DEFECT = 1  # of this code: a traceback
SETTING = 2  # a setting, file or workdir that cannot work
DIVERGED = 3
ENVIRONMENT = 4  # a full disk, a lost process
STOPPED = 75  # with a checkpoint, the same command resumes (EX_TEMPFAIL)


class DivergedError(config_lib.ConfigError):
  """Too many updates in a row were not finite."""
  exit_code = DIVERGED


class EnvironmentFault(config_lib.ConfigError):
  """What the machines did, not the settings."""
  exit_code = ENVIRONMENT


def exit_code(error):
  """Return the exit code of a `config.ConfigError`."""
  return getattr(error, 'exit_code', SETTING)


def error(code, text):
  """Return the error of an exit code, as `exit_code` reads it."""
  kind = {DIVERGED: DivergedError, ENVIRONMENT: EnvironmentFault}.get(
      code, config_lib.ConfigError)
  return kind(text)


def refuse_diverged(config: config_lib.Config, skipped_in_a_row, phase, step,
                    last_good, last=False):
  """Raise `DivergedError` where run.max_skipped updates in a row were bad.

  Args:
    config: `config.Config`.
    skipped_in_a_row: see `types.Skipped`.
    phase: 'rl' or 'warmup', the section with the learning rate.
    step: of the phase.
    last_good: path of its last checkpoint, or None.
    last: whether the phase ends here; then one bad update is enough, as what
      follows would start from these parameters.
  """
  if skipped_in_a_row < (1 if last else config.run.max_skipped):
    return
  rate = getattr(config, phase).lr
  good = (f'the last good checkpoint is {last_good}' if last_good
          else 'there is no checkpoint before that')
  raise DivergedError(
      f'the {"warm-up" if phase == "warmup" else "run"} diverged at step '
      f'{step}: {skipped_in_a_row} updates in a row were not finite and were '
      f'skipped (run.max_skipped={config.run.max_skipped}); lower '
      f'{phase}.lr={rate} in another workdir; {good}')
