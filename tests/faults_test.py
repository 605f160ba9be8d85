"""benchmarks.faults: its reader of events and its table."""

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from benchmarks import faults


def _event(step, **values):
  return event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[
      summary_pb2.Summary.Value(tag=k, simple_value=v)
      for k, v in values.items()]))


def _write(path, *events):
  writer = event_file_writer.EventsWriter(str(path))
  for event in events:
    writer.write_event(event)
  writer.close()


def test_events_are_read_as_tensorboard_shows_them(tmp_path):
  (tmp_path / 'rl').mkdir()
  _write(tmp_path / 'rl' / '000000', _event(1, a=1.), _event(2, a=2.),
         _event(3, a=3.))
  for path in (tmp_path / 'rl').iterdir():
    path.write_bytes(path.read_bytes()[:-3])  # cut off by a kill
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  _write(tmp_path / 'rl' / '000001', event_pb2.Event(step=2, session_log=start),
         _event(2, a=5., **{'timing_s/step': 9.}))
  assert faults.points(tmp_path) == {
      ('rl', 'a', 1): 1., ('rl', 'a', 2): 5., ('rl', 'timing_s/step', 2): None}


def test_the_table_counts_faults_by_kind():
  trials = {
      'kill_1': {'faults': 5, 'survived': True, 'differs': []},
      'kill_2': {'faults': 4, 'survived': True, 'differs': ['events']},
      'kill_3': {'faults': 2, 'survived': False},
      'verifier_1': {'faults': 3, 'survived': True},
      'disk_1': {'skipped': 'only root'}}
  cells = [[c.strip() for c in line.split('|')[2:-1]]
           for line in faults.table(trials).splitlines()[2:]]
  assert cells == [['11', '9', '9', '5'], ['skipped: only root', '', '', ''],
                   ['3', '3', 'not compared', 'not compared']]
