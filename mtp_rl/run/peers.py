"""Watches the processes of a run: where one stops, hangs or ends, all end.

JAX's runtime notices a process that no longer runs, by its heartbeats, and then
aborts the others with a stack trace. Here each process also writes signs of
life into the runtime's key-value store and reads those of the others. So all
end earlier, by one sentence and an exit code, and also where a process lives
but makes no step.
"""

import json
import os
import sys
import threading
import time

from mtp_rl.run import endings

LOST_S = 60.  # seconds without a sign of life after which a process is lost
_BEAT_S = 2.  # between signs of life; longer with hundreds of processes
# Seconds in which a process that reads how another ended may say so itself, and
# that process 0, which keeps the store, waits for the others to read.
_GRACE_S = 3.
_WAIT_S = 10.
_LEAVE_S = 1.  # that it gives them to go after they have said that they do
_STORE = 'mtp_rl/peers'
_GO_ON = 'the same command goes on from the last checkpoint'


class Watch:
  """Two threads: one tells and asks, one judges, as asking may block."""

  def __init__(self, client, index, count, patience):
    """Begin to watch; all processes are there.

    Args:
      client: of the key-value store that the processes share.
      index: of this process.
      count: of processes.
      patience: seconds without progress after which a process hangs; it may
        be changed later.
    """
    self.patience = patience
    self._client, self._index = client, index
    self._beat = max(_BEAT_S, count / 100)
    self._progress, self._ended = 0, None
    self._said = {i: {} for i in range(count)}  # by each process
    self._heard = dict.fromkeys(range(count), time.monotonic())
    self._moved = time.monotonic()
    self._over = threading.Event()
    self._threads = [threading.Thread(target=f, daemon=True)
                     for f in (self._talk, self._judge)]
    for thread in self._threads:
      thread.start()

  def progress(self):
    """Note that the main thread works; called where the processes meet."""
    self._progress += 1
    self._moved = time.monotonic()

  def stop(self):
    """End the watch, before the store is gone."""
    self._over.set()
    self._threads[0].join(self._beat)

  def depart(self, code, text):
    """Tell the others how this process ends, and end it at once.

    Args:
      code: the exit code.
      text: one sentence, which the others repeat.
    """
    self._ended = [code, text]
    telling = threading.Thread(target=self._tell, daemon=True)
    telling.start()
    telling.join(_GRACE_S)
    if self._index == 0:  # JAX aborts those that are still there after it
      deadline = time.monotonic() + _WAIT_S
      while time.monotonic() < deadline and not all(
          x.get('ended') for i, x in self._said.items() if i):
        time.sleep(.1)
      time.sleep(_LEAVE_S)
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os._exit(code)

  def follow(self):
    """Wait until word of another process's end would be here and acted on."""
    time.sleep(2 * self._beat + _GRACE_S)

  def _tell(self):
    self._client.key_value_set(
        f'{_STORE}/{self._index}',
        json.dumps({'time': time.monotonic(), 'progress': self._progress,
                    'ended': self._ended}), allow_overwrite=True)

  def _talk(self):
    while not self._over.wait(self._beat):
      try:
        self._tell()
        found = self._client.key_value_dir_get(_STORE)
      except Exception:  # process 0 is gone: the judge counts the silence
        continue
      for key, text in found:
        i, said = int(key.rsplit('/', 1)[1]), json.loads(text)
        if said != self._said[i]:
          self._said[i], self._heard[i] = said, time.monotonic()

  def _judge(self):
    read = {}  # when this process first read how another ended
    while not self._over.wait(.5):
      now = time.monotonic()
      for i, said in self._said.items():
        if i == self._index or self._ended:
          continue
        if said.get('ended') and now - read.setdefault(i, now) > _GRACE_S:
          code, text = said['ended']
          self._end(code, f'process {i} ended the run: {text}')
        elif now - self._heard[i] > LOST_S:
          self._end(endings.ENVIRONMENT,
                    f'process {i} of the run has shown no sign of life for '
                    f'{LOST_S:.0f} s; {_GO_ON}')
      if now - self._moved > self.patience and not self._ended:
        behind = min(self._said, key=lambda i: self._said[i].get('progress', 0))
        self._end(endings.ENVIRONMENT,
                  f'the processes have waited {self.patience / 60:.0f} minutes '
                  f'(run.hang_minutes) for each other, the last is process '
                  f'{behind}; {_GO_ON}')

  def _end(self, code, text):
    print(f'error: {text}', file=sys.stderr, flush=True)
    self.depart(code, text)
