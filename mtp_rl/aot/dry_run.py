"""What a run would take of the devices at hand, compiled but not run."""

import math
import os
import time
from typing import NamedTuple

import jax

from mtp_rl import config as config_lib
from mtp_rl import forward, regimes, sharding, tasks, tree, validate
from mtp_rl.aot import programs


def _size(count):
  """Return a number of bytes as text."""
  unit, name = (2 ** 30, 'GiB') if count >= 2 ** 28 else (2 ** 20, 'MiB')
  return f'{count / unit:,.1f} {name}'


class Need(NamedTuple):
  """What a program needs, in bytes of one device.

  Attributes:
    name: 'update', 'hold' (an update that keeps lambda), 'rollout', or with
      rollout.slots 'prefill' and 'window'.
    seconds: of compilation.
    peak: everything on the device while it runs, state included.
    state: parameters and optimiser state.
    temporaries: intermediate values.
  """
  name: str
  seconds: float
  peak: float
  state: float
  temporaries: float


class Room(NamedTuple):
  """The memory here.

  Attributes:
    devices: number of them in the mesh.
    kind: such as 'cpu'.
    total: bytes of all of them together that are there to be used.
    shared: whether they share it, as CPU devices do.
  """
  devices: int
  kind: str
  total: float
  shared: bool


def room(mesh):
  """Return the `Room` of a mesh, or None where nothing tells the memory."""
  devices = list(mesh.devices.flat)
  first = devices[0]
  stats = first.memory_stats() if first.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return Room(len(devices), first.device_kind,
                len(devices) * stats['bytes_limit'], False)
  try:
    with open('/proc/meminfo', encoding='utf-8') as f:
      free = next(line.split()[1] for line in f
                  if line.startswith('MemAvailable'))
    free = int(free) * 1024
  except (OSError, StopIteration):
    free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return Room(len(devices), first.platform, free, True)


def _resolved(config: config_lib.Config):
  """Return the config with a vocabulary, the task's where it sets none."""
  if config.model.vocab_size:
    return config
  task = tasks.make(config)
  try:
    return config_lib.with_vocabulary(config, task.tokenizer.vocab_size)
  finally:
    task.close()


def names(config: config_lib.Config):
  """Return the names of the programs that a run spends its time in."""
  hold = ('hold',) if regimes.holds(config) else ()
  sampling = ('prefill', 'window') if config.rollout.slots else ('rollout',)
  return 'update', *hold, *sampling


def needs(config: config_lib.Config, mesh):
  """Compile the updates and the sampler; yield a `Need` each.

  Args:
    config: `config.Config`, its vocabulary resolved.
    mesh: the device mesh of training.
  """
  for name in names(config):
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
      lowered, _, _, beside = programs.program(name, config, mesh)
      compiled = lowered.compile()
    m = compiled.memory_analysis()
    moved = (m.argument_size_in_bytes + m.output_size_in_bytes
             - m.alias_size_in_bytes)
    state = programs.state_bytes(config, mesh)
    # Parameters that a program does not read are no arguments, but stay.
    peak = max(moved + beside, state) + m.temp_size_in_bytes
    yield Need(name, time.perf_counter() - begun, peak, state,
               m.temp_size_in_bytes)


def lines(config: config_lib.Config):
  """Yield lines of text on what a run of a config would take here.

  Raises:
    config.ConfigError: it cannot work, or it does not fit, and by how much.
  """
  validate.validate(config)
  mesh = sharding.make_mesh(config.mesh)
  config = _resolved(config)
  params = jax.eval_shape(lambda: forward.init(config, jax.random.key(0)))
  size = lambda x: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(x))
  r, row = config.rl, config.rollout.max_prompt + config.rollout.max_response
  rows = r.prompts * r.group
  here = room(mesh)
  yield (f'parameters: {size(params):,}, of them {size(tree.psi(params)):,} in '
         'MTP modules')
  yield (f'tokens a step: at most {rows * row:,} ({rows:,} completions of '
         f'{row:,}), in {r.minibatches} updates')
  yield (f'devices: {here.devices} ({here.kind}), {_size(here.total)} of '
         'memory ' + ('that they share' if here.shared else 'together'))
  worst = None
  for need in needs(config, mesh):
    yield (f'{need.name}: {_size(need.peak)} a device (state '
           f'{_size(need.state)}, intermediate values '
           f'{_size(need.temporaries)}), on all '
           f'{_size(need.peak * here.devices)}; compiled in '
           f'{need.seconds:.0f} s')
    if worst is None or need.peak > worst.peak:
      worst = need
  whole = worst.peak * here.devices
  if whole > here.total:
    raise config_lib.ConfigError(
        f'this does not fit: the {worst.name} needs {_size(whole)} on '
        f'{here.devices} devices, {_size(whole - here.total)} more than there '
        'are; use more devices (mesh.fsdp), more rl.minibatches or '
        'rl.microbatches, rollout.slots, or a smaller model')
  yield 'this fits'
