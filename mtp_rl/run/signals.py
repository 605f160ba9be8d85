"""Clean stops on Ctrl-C, SIGTERM and SIGHUP."""

import contextlib
import os
import signal
import sys
import threading
import time

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A terminal that goes away may say so several times.
_ECHO_S = 1.


@contextlib.contextmanager
def interruptible(leave=(), at_once=None):
  """Yield a function () -> bool: whether a signal of NUMBERS has arrived.

  The first signal asks for a clean stop after the step in progress; a second
  one of any kind ends the process at once, with exit code 128 + its number. A
  thread sees to that, because the main thread runs no handler while it waits
  for a compilation.

  Args:
    leave: signals that somebody else handles.
    at_once: function (), called before the second signal ends the process, from
      another thread; None: nothing.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  caught, previous = [], {}
  read, write = os.pipe()
  os.set_blocking(write, False)
  for number in NUMBERS:  # nohup has SIGHUP ignored
    if number not in leave and signal.getsignal(number) != signal.SIG_IGN:
      previous[number] = signal.signal(number, lambda n, _: caught.append(n))
  wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  watch = threading.Thread(target=_watch, args=(read, set(previous), at_once),
                           daemon=True)
  watch.start()
  try:
    yield lambda: bool(caught)
  finally:
    signal.set_wakeup_fd(wakeup)
    for number, old in previous.items():
      signal.signal(number, old)
    os.close(write)
    watch.join()
    os.close(read)


def _watch(read, numbers, at_once):
  """Announce the first signal that the C handler writes, exit at the second."""
  first, when = None, 0.
  while number := os.read(read, 1):
    number = number[0]
    if number not in numbers:
      continue
    if first is None:
      first, when = number, time.monotonic()
      with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        print('\nstopping after this step; once more to stop at once',
              file=sys.stderr, flush=True)
    elif not (first == number == signal.SIGHUP
              and time.monotonic() - when < _ECHO_S):
      if at_once is not None:
        at_once()
      os._exit(128 + number)
