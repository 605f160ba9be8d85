"""Clean stops on Ctrl-C and SIGTERM."""

import contextlib
import signal
import sys


@contextlib.contextmanager
def interruptible():
  """Yield a function () -> bool: whether SIGINT or SIGTERM has arrived.

  The first signal asks for a clean stop after the step in progress; a second
  one has the effect it would have without this handler.
  """
  caught, previous = [], {}

  def handler(number, unused_frame):
    caught.append(number)
    signal.signal(number, previous[number])
    print('\nstopping after this step; once more to stop at once',
          file=sys.stderr, flush=True)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.getsignal(number)
    with contextlib.suppress(ValueError):  # not in the main thread
      signal.signal(number, handler)
  try:
    yield lambda: bool(caught)
  finally:
    for number, old in previous.items():
      with contextlib.suppress(ValueError):
        signal.signal(number, old)
