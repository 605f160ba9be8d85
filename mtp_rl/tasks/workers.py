"""A verifier in a process of its own, with a clock outside it.

A hang or a crash costs the answer that caused it its reward and is counted;
the process is replaced and the batch goes on. Messages are JSON bytes, so
nothing that comes back is ever unpickled.
"""

import json
import multiprocessing
import signal

START_S = 120.  # a fresh process imports the verifier's packages


def _serve(connection, factory, args):
  """Run in the child: build the scorer once, then answer until the end."""
  # Ctrl-C reaches the whole process group; the trainer alone decides.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  scorer = factory(*args)
  connection.send_bytes(b'ready')
  while True:
    try:
      request = json.loads(connection.recv_bytes())
    except EOFError:
      return
    try:
      answer = {'score': float(scorer(*request))}
    except Exception as e:  # the verifier's own errors on hostile text
      answer = {'error': f'{type(e).__name__}: {e}'[:200]}
    connection.send_bytes(json.dumps(answer).encode())


class Worker:
  """One persistent scoring process.

  Attributes:
    counts: 'errors' (the scorer raised), 'timeouts' and 'crashes' so far.
  """

  def __init__(self, factory, args, timeout_s):
    """Remember how to build the scorer; the process starts when needed.

    Args:
      factory: importable function, args -> scorer(*request) -> float.
      args: its arguments, picklable.
      timeout_s: seconds that one answer may take.
    """
    self._factory, self._args, self._timeout = factory, args, timeout_s
    self._process = self._connection = None
    self.counts = {'errors': 0, 'timeouts': 0, 'crashes': 0}

  def start(self):
    """Start the process if it does not run.

    Raises:
      RuntimeError: it did not come up.
    """
    if self._process is not None:
      return
    context = multiprocessing.get_context('spawn')
    self._connection, theirs = context.Pipe()
    self._process = context.Process(
        target=_serve, args=(theirs, self._factory, self._args), daemon=True)
    self._process.start()
    theirs.close()
    try:
      if self._connection.poll(START_S):
        self._connection.recv_bytes()
        return
    except EOFError:
      pass
    self.close()
    raise RuntimeError('the verifier process did not start; run the scorer in '
                       'a Python shell to see its error')

  def score(self, *request):
    """Return the scorer's value, or 0.0 where it raised, hung or crashed.

    Args:
      *request: JSON-ready arguments of the scorer.
    """
    self.start()
    try:
      self._connection.send_bytes(json.dumps(request).encode())
      if not self._connection.poll(self._timeout):
        self.counts['timeouts'] += 1
        self.close()
        return 0.
      answer = json.loads(self._connection.recv_bytes())
    except (EOFError, OSError):
      self.counts['crashes'] += 1
      self.close()
      return 0.
    if 'error' in answer:
      self.counts['errors'] += 1
      return 0.
    return answer['score']

  def close(self):
    """Kill the process; the next `score` starts another."""
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._connection.close()
      self._process = self._connection = None
