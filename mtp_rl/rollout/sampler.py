"""Sampling completions: prefill and a while_loop, jitted as one function.

What is drawn at a place of a completion depends on the seed, the prompt, the
sample and the place alone: not on the other rows, their order or the mesh, up
to rounding of the logits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import distributed, forward, prng, sharding, types
from mtp_rl.models import transformer
from mtp_rl.rollout import decode, draft, layout


class Drawn(NamedTuple):
  """What `generate` returns.

  Attributes:
    rows: `types.Tokens` of B = P * G rows, a prompt's samples adjacent.
    logprobs: float32 [B, S], of the sampled tokens under the tempered,
      unrestricted distribution; 0 after a row's end.
    counts: see `decode.SamplingState`.
    seconds: what `slots` spent on its parts, else None.
  """
  rows: types.Tokens
  logprobs: jax.Array
  counts: jax.Array
  seconds: dict | None = None


class Prompts(NamedTuple):
  """Prompts that were read, P rows of R columns.

  Attributes:
    tokens: int32 [P, R].
    valid: bool [P, R].
    logits: float32 [P, 1, V], of the first response token.
    cache: keys and values [L, P, N, R, C].
    states, ahead: see `decode.SamplingState`; None without drafts.
  """
  tokens: jax.Array
  valid: jax.Array
  logits: jax.Array
  cache: Any
  states: jax.Array | None
  ahead: Any


def read(params, prompts, prompt_valid, *, config: config_lib.Config):
  """Return the `Prompts`; the arguments are those of `generate`."""
  net = forward.network(config)
  x, cache = net.apply(
      {'params': params}, prompts, transformer.positions_of(prompt_valid),
      prompt_valid, None, method='extend')
  h = net.apply({'params': params}, x, method='norm')
  states = ahead = None
  if config.rollout.draft:
    states = h if config.mtp.hidden == 'post_norm' else x
    ahead = draft.read_columns(params, states, prompts, prompt_valid,
                               config=config)
  return Prompts(prompts, prompt_valid, decode.head(params, h[:, -1:]), cache,
                 states, ahead)


def seat(prompts: Prompts, keys, *, config: config_lib.Config, ends,
         greedy=False):
  """Return the `decode.SamplingState` of B rows, their first tokens drawn.

  Its cache, states and ahead have the prompt's R columns alone.

  Args:
    prompts: `Prompts` of B rows.
    keys: PRNG keys [B].
    config, ends, greedy: see `generate`.
  """
  (rows, r), s = prompts.tokens.shape, config.rollout.max_response
  drafts = config.rollout.draft
  state = decode.SamplingState(
      tokens=jnp.pad(prompts.tokens, ((0, 0), (0, s + drafts)),
                     constant_values=ends.pad),
      prompt=prompts.valid, column=jnp.full((rows,), r - 1, jnp.int32),
      logprobs=jnp.zeros((rows, s), jnp.float32),
      done=jnp.zeros((rows,), bool), keys=keys, cache=prompts.cache,
      states=prompts.states, ahead=prompts.ahead,
      counts=jnp.zeros((3 + drafts,), jnp.int32))
  token, logp = decode.choose(prompts.logits, keys,
                              jnp.zeros((rows, 1), jnp.int32),
                              config.rollout, greedy)
  return decode.emit(state, token, logp, jnp.ones_like(state.column), ends)


def prefill(params, prompts, prompt_valid, names, key, *,
            config: config_lib.Config, ends, group=1, greedy=False):
  """Read every prompt once; return the `decode.SamplingState` of its samples.

  The first token of every sample is drawn. The arguments are those of
  `generate`.
  """
  seen = read(params, prompts, prompt_valid, config=config)
  # The prompt's cache is copied to its G samples.
  spread = functools.partial(jnp.repeat, repeats=group)
  state = seat(over_rows(spread, seen), prng.row_keys(key, names, group),
               config=config, ends=ends, greedy=greedy)
  more = state.tokens.shape[1] - prompts.shape[1]
  return decode.over_columns(lambda x, axis: jnp.pad(x, [
      (0, more if i == axis else 0) for i in range(x.ndim)]), state)


def over_rows(function, tree):
  """Return a `Prompts` with function(x, axis=its axis of rows) of each array.

  Caches [L, P, N, R, C] have their rows on axis 1, all others on axis 0.
  """
  caches = lambda pair: jax.tree.map(lambda c: function(c, axis=1), pair)
  out = jax.tree.map(lambda x: function(x, axis=0), tree._replace(
      cache=None, ahead=None))
  return out._replace(cache=caches(tree.cache), ahead=caches(tree.ahead))


def generate(params, prompts, prompt_valid, names, key, *,
             config: config_lib.Config, ends, group=1, greedy=False):
  """Sample `group` completions of every prompt.

  Args:
    params: the model's parameters.
    prompts: int32 [P, R], left-padded.
    prompt_valid: bool [P, R].
    names: uint32 [P, 2], from `prng.identify`.
    key: PRNG key.
    config: `config.Config` (static), its vocabulary resolved.
    ends: `tokenizers.Ends` (static).
    group: G, samples per prompt.
    greedy: take the most likely token instead of sampling.

  Returns:
    `Drawn`.
  """
  rows, r = len(prompts) * group, config.rollout.max_prompt
  config = with_drafts(config, rows)
  margin = max(draft.window(config) - r, 0)
  wider = lambda x: jnp.pad(x, ((0, 0), (margin, 0)))
  fixed = dict(config=config, ends=ends, greedy=greedy)
  state = prefill(params, wider(prompts), wider(prompt_valid), names, key,
                  group=group, **fixed)
  step = draft.speculate if config.rollout.draft else decode.extend
  state = jax.lax.while_loop(lambda state: ~jnp.all(state.done),
                             functools.partial(step, params, **fixed), state)
  cut = slice(margin, margin + r + config.rollout.max_response)
  return Drawn(types.Tokens(state.tokens[:, cut], decode.there(state)[:, cut]),
               state.logprobs, state.counts)


def with_drafts(config: config_lib.Config, rows):
  """Return a config without drafts if so many rows are decoded together."""
  most = config.rollout.draft_rows
  if not config.rollout.draft or not most or rows <= most:
    return config
  return dataclasses.replace(config, rollout=dataclasses.replace(
      config.rollout, draft=0))


def make_generate(config: config_lib.Config, mesh, abstract, ends, group,
                  greedy=False):
  """Return the function (params, prompts, valid, key) -> `Drawn`, compiled.

  Prompts and results are NumPy arrays, the same in every process. All rows are
  decoded together; `slots.make_generate` decodes some at a time.

  Args:
    config: `config.Config`, its vocabulary resolved.
    mesh: the device mesh of training.
    abstract: parameters in the training layout, ShapeDtypeStructs with
      shardings. Those passed to the function must be in the layout that
      `layout.make_place` gives.
    ends: `tokenizers.Ends`.
    group: G, samples per prompt.
    greedy: take the most likely token instead of sampling.
  """
  shardings = jax.tree.map(lambda x: x.sharding,
                           layout.abstract(abstract, config, mesh))
  mesh, trained = layout.sampling_mesh(config, mesh), mesh
  rows = sharding.batch_sharding(mesh)
  jitted = jax.jit(
      functools.partial(generate, config=config, ends=ends, group=group,
                        greedy=greedy),
      in_shardings=(shardings, rows, rows, rows, None),
      out_shardings=Drawn(rows, rows, NamedSharding(mesh, P())),
      compiler_options=layout.compiler_options(mesh))

  def run(params, prompts, valid, key, finished=None):
    del finished  # all rows end together
    if mesh is not trained:  # a key is bound to the mesh it was made on
      key = np.asarray(jax.random.key_data(key))
    names = prng.identify(prompts, valid)
    with jax.set_mesh(mesh):
      if mesh is not trained:
        key = jax.random.wrap_key_data(key)
      out = jitted(params, *distributed.put((prompts, valid, names), rows),
                   key)
      return Drawn(*distributed.fetch(out[:2]), jax.device_get(out.counts))

  return run
