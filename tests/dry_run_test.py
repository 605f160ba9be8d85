"""What a run would take here, compiled but not run."""

import re

import pytest

from mtp_rl import config as config_lib
from mtp_rl.aot import dry_run
from tests import conftest


def test_it_says_what_a_run_takes_and_by_how_much_that_is_too_much(
    monkeypatch):
  config = conftest.tiny_config(model=dict(n_layers=1),
                                mtp=dict(regime='occ'),
                                occ=dict(estimator='exact', measure=1))
  here = dry_run.Room(1, 'cpu', 8 * 2 ** 30, True)
  monkeypatch.setattr(dry_run, 'room', lambda mesh: here)
  found = list(dry_run.needs(dry_run._resolved(config),
                             dry_run.sharding.make_mesh(config.mesh)))
  assert [n.name for n in found] == ['update', 'hold', 'rollout']
  # 4 bytes a parameter, and as many for each of Adam's two moments.
  monkeypatch.setattr(dry_run, 'needs', lambda *_: found)
  *_, last = lines = list(dry_run.lines(config))
  assert last == 'this fits'
  count = int(re.search('parameters: ([\\d,]+)', lines[0])[1].replace(',', ''))
  for need in found:
    assert 12 * count <= need.state < 12 * count + 200
    assert need.peak >= need.state + need.temporaries
  assert '384 (32 completions of 12), in 2 updates' in lines[1]

  small = here._replace(devices=2, total=max(n.peak for n in found))
  monkeypatch.setattr(dry_run, 'room', lambda mesh: small)
  with pytest.raises(config_lib.ConfigError, match='does not fit.* more than'):
    list(dry_run.lines(config))


def test_with_slots_the_whole_loop_is_not_compiled():
  config = conftest.tiny_config(rollout=dict(slots=8), mtp=dict(
      regime='detach'))
  assert dry_run.names(config) == ('update', 'prefill', 'window')


def test_the_room_is_what_the_machine_has_free():
  mesh = dry_run.sharding.make_mesh(config_lib.Mesh())
  here = dry_run.room(mesh)
  assert here.shared and here.devices == 1 and here.total > 2 ** 28
