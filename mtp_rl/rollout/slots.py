"""Sampling with slots: rows that end leave, waiting ones take their places.

All prompts are read once. Then windows of a few steps run on the device, with
as many rows as there are slots; between them the host takes the rows that have
ended, hands them on, and seats waiting samples, which get a copy of their
prompt's cache. When none waits and at most half of the slots are alive, these
are gathered into fewer slots. What is drawn does not depend on any of this.

On a mesh each device that holds rows has its own slots and its own queue, of
the prompts that it holds.
"""

import collections
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, prng, sharding, types
from mtp_rl.rollout import decode, draft, layout, sampler

STEPS = 8  # of a window


def take_rows(x, index, axis):
  """Return rows of an array, each device's from its own.

  Args:
    x: array with D * n rows on `axis`, n on each device.
    index: int32 [D, m], rows among a device's n.
    axis: of the rows.

  Returns:
    The same with D * m rows.
  """
  d, m = index.shape
  if d == 1:
    return jnp.take(x, index[0], axis)
  apart = x.reshape(*x.shape[:axis], d, -1, *x.shape[axis + 1:])
  out = jax.vmap(lambda part, i: jnp.take(part, i, axis), (axis, 0), axis)(
      apart, index)
  return out.reshape(*x.shape[:axis], d * m, *x.shape[axis + 1:])


def _placed(state):
  """Return a state with its rows split over the devices."""
  caches = (state.cache, state.ahead)
  state = jax.tree.map(
      lambda x: sharding.constrain_batch(x) if x.ndim else x,
      state._replace(cache=None, ahead=None, counts=None, keys=None)
      )._replace(counts=state.counts, keys=state.keys)
  state = state._replace(cache=caches[0], ahead=caches[1])
  return decode.over_columns(lambda x, _: x, state)


def enter(state, prompts, keys, which, sample, entering, *,
          config: config_lib.Config, ends, greedy):
  """Return a state with new rows in some slots.

  Args:
    state: `decode.SamplingState` of D * m slots.
    prompts: `sampler.Prompts`, all of them.
    keys: PRNG keys [B], of all samples.
    which: int32 [D, m], the prompt of each slot among its device's.
    sample: int32 [D, m], the sample among its device's.
    entering: bool [D, m], slots that take a new row.
    config, ends, greedy: see `sampler.generate`.
  """
  fresh = sampler.seat(
      sampler.over_rows(functools.partial(take_rows, index=which), prompts),
      take_rows(keys, sample, 0), config=config, ends=ends, greedy=greedy)
  mask = entering.reshape(-1)

  def put(new, old, rows, columns):
    """`new` where a slot is entered; it may have fewer columns."""
    shape = [-1 if i == rows else 1 for i in range(old.ndim)]
    part = jax.lax.slice_in_dim(old, 0, new.shape[columns], axis=columns)
    mixed = jnp.where(mask.reshape(shape), new, part)
    return jax.lax.dynamic_update_slice(old, mixed, (0,) * old.ndim)

  caches = lambda new, old: jax.tree.map(lambda a, b: put(a, b, 1, 3), new, old)
  small = {name: put(getattr(fresh, name), getattr(state, name), 0, 1)
           for name in ('tokens', 'prompt', 'logprobs')}
  flat = {name: jnp.where(mask, getattr(fresh, name), getattr(state, name))
          for name in ('column', 'done', 'keys')}
  if state.states is not None:
    small['states'] = put(fresh.states, state.states, 0, 1)
  ahead = state.ahead
  if ahead is not None:
    ahead = caches(fresh.ahead, ahead)
  return _placed(state._replace(
      cache=caches(fresh.cache, state.cache), ahead=ahead, **small, **flat))


def window(params, state, *, config: config_lib.Config, ends, greedy, drafts):
  """Return the state after `STEPS` steps, or when all rows have ended."""
  fixed = dict(config=config, ends=ends, greedy=greedy)
  step = draft.speculate if drafts else decode.extend
  out, _ = jax.lax.while_loop(
      lambda at: (at[1] < STEPS) & ~jnp.all(at[0].done),
      lambda at: (step(params, at[0], **fixed), at[1] + 1),
      (state, jnp.int32(0)))
  return out


def gather(state, index):
  """Return a state of the slots `index`, int32 [D, m], of each device."""
  take = functools.partial(take_rows, index=index)
  caches = lambda pair: jax.tree.map(lambda c: take(c, axis=1), pair)
  out = jax.tree.map(lambda x: take(x, axis=0), state._replace(
      cache=None, ahead=None, counts=None))
  return _placed(out._replace(cache=caches(state.cache), counts=state.counts,
                              ahead=caches(state.ahead)))


def begin_drafts(params, state, *, config: config_lib.Config):
  """Return a state decoded without drafts with what drafts need."""
  return _placed(state._replace(ahead=draft.read_columns(
      params, state.states, state.tokens, decode.there(state), config=config)))


def empty(prompts, keys, slots, drafts, config: config_lib.Config):
  """Return a state of so many slots, all of them free."""
  s, more = config.rollout.max_response, config.rollout.draft
  columns = prompts.tokens.shape[1] + s + more
  # A whole number of tiles; else XLA for TPU copies the cache of every window.
  columns += -columns % 8
  wide = lambda c: jnp.zeros((c.shape[0], slots, c.shape[2], columns,
                              c.shape[4]), c.dtype)
  caches = lambda pair: jax.tree.map(wide, pair)
  states = prompts.states
  if states is not None:
    states = jnp.zeros((slots, columns, states.shape[2]), states.dtype)
  return _placed(decode.SamplingState(
      jnp.zeros((slots, columns), jnp.int32),
      jnp.zeros((slots, prompts.tokens.shape[1]), bool),
      jnp.zeros((slots,), jnp.int32), jnp.zeros((slots, s), jnp.float32),
      jnp.ones((slots,), bool), jnp.broadcast_to(keys[0], (slots,)),
      caches(prompts.cache), states, caches(prompts.ahead) if drafts else None,
      jnp.zeros((3 + more,), jnp.int32)))


class _Programs:
  """The jitted parts, compiled for each number of slots when first used."""

  def __init__(self, config, mesh, ends, group, greedy):
    options = layout.compiler_options(mesh)
    fixed = dict(config=config, ends=ends, greedy=greedy)
    self.read = jax.jit(functools.partial(sampler.read, config=config))
    self.keys = jax.jit(functools.partial(prng.row_keys, group=group))
    self.empty = jax.jit(functools.partial(empty, config=config),
                         static_argnums=(2, 3))
    self.enter = jax.jit(functools.partial(enter, **fixed), donate_argnums=0)
    self.window = jax.jit(functools.partial(window, **fixed),
                          static_argnames='drafts', donate_argnums=1,
                          compiler_options=options)
    self.gather = jax.jit(gather)
    self.begin_drafts = jax.jit(functools.partial(begin_drafts, config=config))


class _Table:
  """Which sample sits in which slot, on the host; results as they come.

  Samples are numbered 0 .. B - 1, those of a prompt adjacent; each of the D
  devices has B / D of them in its queue.
  """

  def __init__(self, samples, devices, slots, group):
    self.own, self.group = samples // devices, group
    self.seats = np.full((devices, slots), -1)
    self.queue = [collections.deque(range(d * self.own, (d + 1) * self.own))
                  for d in range(devices)]

  def leave(self, done):
    """Free the slots of rows that have ended; return (slots, samples)."""
    over = done.reshape(self.seats.shape) & (self.seats >= 0)
    slots, samples = np.flatnonzero(over), self.seats[over]
    self.seats[over] = -1
    return slots, samples

  def fill(self):
    """Seat waiting samples; return which, sample, entering; None if nobody."""
    entering = np.zeros(self.seats.shape, bool)
    for d, waiting in enumerate(self.queue):
      for slot in np.flatnonzero(self.seats[d] < 0)[:len(waiting)]:
        self.seats[d, slot], entering[d, slot] = waiting.popleft(), True
    if not entering.any():
      return None
    sample = np.maximum(self.seats - self.own * np.arange(
        len(self.seats))[:, None], 0).astype(np.int32)
    return sample // self.group, sample, entering

  def shrink(self):
    """Keep fewer slots if that suffices; return their places, or None."""
    if any(self.queue):
      return None
    alive = (self.seats >= 0).sum(1).max()
    size = self.seats.shape[1]
    while size % 2 == 0 and size // 2 >= alive:
      size //= 2
    if size == self.seats.shape[1] or not alive:
      return None
    index = np.argsort(self.seats < 0, axis=1, kind='stable')[:, :size]
    self.seats = np.take_along_axis(self.seats, index, 1)
    return index.astype(np.int32)


def make_generate(config: config_lib.Config, mesh, abstract, ends, group,
                  greedy=False):
  """Return the function (params, prompts, valid, key, finished) -> `Drawn`.

  The arguments are those of `sampler.make_generate`. With rollout.slots=0 that
  is the function. `finished` is None, or a function (int [n] numbers of rows,
  int32 [n, S] their responses) that is called as rows end.
  """
  if not config.rollout.slots:
    return sampler.make_generate(config, mesh, abstract, ends, group, greedy)
  mesh, trained = layout.sampling_mesh(config, mesh), mesh
  programs = _Programs(config, mesh, ends, group, greedy)

  def run(params, prompts, valid, key, finished=None):
    if mesh is not trained:  # a key is bound to the mesh it was made on
      key = np.asarray(jax.random.key_data(key))
    with jax.set_mesh(mesh):
      if mesh is not trained:
        key = jax.random.wrap_key_data(key)
      return _run(programs, config, mesh, group, params, prompts, valid, key,
                  finished)

  return run


def _run(programs, config, mesh, group, params, prompts, valid, key, finished):
  """Sample all rows; see `make_generate`."""
  (count, r), s = prompts.shape, config.rollout.max_response
  margin = max(draft.window(config) - r, 0)
  names = prng.identify(prompts, valid)
  prompts, valid = (np.pad(x, ((0, 0), (margin, 0))) for x in (prompts, valid))
  rows = sharding.batch_sharding(mesh)
  place = lambda *x: distributed.put(x, rows)
  devices = sharding.batch_size(mesh)
  own = min(config.rollout.slots, count * group) // devices
  table = _Table(count * group, devices, own, group)
  speculates = lambda: bool(sampler.with_drafts(
      config, table.seats.size).rollout.draft)
  seconds, last = collections.Counter(), time.perf_counter()

  def spent(name):
    nonlocal last
    now = time.perf_counter()
    seconds[name] += now - last
    last = now

  asked, there, named = place(prompts, valid, names)
  seen, keys = programs.read(params, asked, there), programs.keys(key, named)
  drafts = speculates()
  state = programs.empty(seen, keys, table.seats.size, drafts)
  end = margin + r + s
  tokens = np.zeros((count * group, end), np.int32)
  column = np.zeros(count * group, np.int32)
  logprobs = np.zeros((count * group, s), np.float32)
  done = np.ones(table.seats.size, bool)
  jax.block_until_ready(seen)
  spent('prefill')
  while True:
    if (places := table.fill()) is not None:
      state = programs.enter(state, seen, keys, *place(*places))
    elif (places := table.shrink()) is not None:
      state = programs.gather(state, *place(places))
      if speculates() and not drafts:
        state, drafts = programs.begin_drafts(params, state), True
    if (table.seats < 0).all():
      break
    spent('wait')
    state = programs.window(params, state, drafts=drafts)
    columns, done = distributed.fetch((state.column, state.done))
    spent('draft' if drafts else 'decode')
    slots, samples = table.leave(np.asarray(done))
    if not len(samples):
      continue
    texts, scores = distributed.fetch((state.tokens, state.logprobs))
    tokens[samples], column[samples] = texts[slots, :end], columns[slots]
    logprobs[samples] = scores[slots]
    if finished is not None:
      finished(samples, tokens[samples, margin + r:])
  spread = np.repeat(valid, group, 0)
  written = np.arange(margin + r, end) <= column[:, None]
  kept = np.concatenate([spread, written], 1)[:, margin:]
  return sampler.Drawn(types.Tokens(tokens[:, margin:], kept), logprobs,
                       np.asarray(jax.device_get(state.counts)), dict(seconds))
