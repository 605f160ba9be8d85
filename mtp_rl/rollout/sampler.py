"""Sampling completions: prefill and a while_loop, jitted as one function.

Prompts are left-padded, so every row writes its next token in the same
column; the loop stops when all rows are done or the columns are full.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, forward, prng, sharding, types
from mtp_rl.models import transformer
from mtp_rl.rollout import layout


class SamplingState(NamedTuple):
  """What the decoding loop carries.

  Attributes:
    step: int32 [], response column that is written next.
    tokens: int32 [B, T].
    valid: bool [B, T].
    logprobs: float32 [B, S], of the sampled tokens.
    logits: float32 [B, V], of the next token.
    done: bool [B], rows that have ended.
    cache: `transformer.Cache` of B rows and T columns.
    key: the PRNG key.
  """
  step: jax.Array
  tokens: jax.Array
  valid: jax.Array
  logprobs: jax.Array
  logits: jax.Array
  done: jax.Array
  cache: transformer.Cache
  key: jax.Array


def restrict(logits, top_k, top_p):
  """Return logits with all but the top-k and the top-p nucleus at -inf.

  The nucleus is the smallest set of most likely tokens whose probability
  reaches top_p; the most likely token always stays.

  Args:
    logits: float32 [B, V].
    top_k: tokens to keep; 0 keeps all.
    top_p: in (0, 1]; 1 keeps all.
  """
  if top_k and top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.sort(logits, axis=-1)[:, ::-1]
    probs = jax.nn.softmax(order)
    inside = jnp.cumsum(probs, -1) - probs < top_p
    lowest = jnp.min(jnp.where(inside, order, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return logits


def _decode(params, config: config_lib.Config, tokens, positions, valid, cache,
            column):
  """Return logits after `tokens`, float32 [B, V], and the extended cache."""
  h, cache = forward.network(config).apply(
      {'params': params}, tokens, positions, valid, cache, column,
      method='decode')
  logits = jnp.matmul(
      h[:, -1], transformer.head_matrix(params).astype(h.dtype),
      preferred_element_type=jnp.float32)
  return logits, cache


def prefill(params, prompts, prompt_valid, key, *, config: config_lib.Config,
            ends, group=1):
  """Read every prompt once and return the `SamplingState` of its samples.

  The arguments are those of `generate`.
  """
  count, r = prompts.shape
  s, rows = config.rollout.max_response, count * group
  cache = transformer.empty_cache(config.model, count, r + s)
  pad = jnp.zeros((count, s), bool)
  logits, cache = _decode(
      params, config, prompts, transformer.positions_of(prompt_valid),
      jnp.concatenate([prompt_valid, pad], 1), cache, None)
  # The prompt's cache is copied to its G samples.
  spread = functools.partial(jnp.repeat, repeats=group, axis=0)
  return SamplingState(
      step=jnp.int32(0),
      tokens=jnp.pad(spread(prompts), ((0, 0), (0, s)),
                     constant_values=ends.pad),
      valid=jnp.pad(spread(prompt_valid), ((0, 0), (0, s))),
      logprobs=jnp.zeros((rows, s), jnp.float32), logits=spread(logits),
      done=jnp.zeros((rows,), bool), key=key,
      cache=jax.tree.map(lambda c: transformer.constrain_cache(
          jnp.repeat(c, group, axis=1)), cache))


def extend(params, state, *, config: config_lib.Config, ends, greedy=False):
  """Return the `SamplingState` with one more token in every row.

  The arguments are those of `generate`.
  """
  column = config.rollout.max_prompt + state.step
  logp = jax.nn.log_softmax(state.logits / config.rollout.temperature)
  if greedy:
    token = jnp.argmax(state.logits, -1)
  else:
    token = jax.random.categorical(
        prng.fold(state.key, state.step),
        restrict(logp, config.rollout.top_k, config.rollout.top_p))
  chosen = jnp.take_along_axis(logp, token[:, None], 1)[:, 0]
  alive = ~state.done
  token = jnp.where(alive, token, ends.pad).astype(jnp.int32)
  put = lambda x, y, at: jax.lax.dynamic_update_slice(
      x, y[:, None].astype(x.dtype), (0, at))
  tokens = put(state.tokens, token, column)
  valid = put(state.valid, alive, column)
  # The new token's position: the row's number of valid tokens minus one.
  positions = jnp.sum(valid, 1, keepdims=True).astype(jnp.int32) - 1
  logits, cache = _decode(params, config, token[:, None], positions, valid,
                          state.cache, column)
  return SamplingState(
      state.step + 1, tokens, valid,
      put(state.logprobs, jnp.where(alive, chosen, 0.), state.step), logits,
      state.done | jnp.isin(token, jnp.asarray(ends.eos)), cache, state.key)


def generate(params, prompts, prompt_valid, key, *, config: config_lib.Config,
             ends, group=1, greedy=False):
  """Sample `group` completions of every prompt.

  Args:
    params: the model's parameters.
    prompts: int32 [P, R], left-padded.
    prompt_valid: bool [P, R].
    key: PRNG key.
    config: `config.Config` (static), its vocabulary resolved.
    ends: `tokenizers.Ends` (static).
    group: G, samples per prompt.
    greedy: take the most likely token instead of sampling.

  Returns:
    `types.Tokens` of B = P * G rows, a prompt's samples adjacent, and the
    sampled tokens' log-probs under the tempered, unrestricted distribution,
    float32 [B, S], 0 after a row's end.
  """
  fixed = dict(config=config, ends=ends)
  state = prefill(params, prompts, prompt_valid, key, group=group, **fixed)

  def unfinished(state):
    return (state.step < config.rollout.max_response) & ~jnp.all(state.done)

  step = functools.partial(extend, params, greedy=greedy, **fixed)
  state = jax.lax.while_loop(unfinished, step, state)
  return types.Tokens(state.tokens, state.valid), state.logprobs


@functools.cache
def compiler_options(platform):
  """Return the compiler options of programs that decode on a platform.

  On CPU XLA computes the cheap update of the keys twice, once into the carry
  and once into what attention reads, and then copies the whole cache in every
  layer. With region analysis it sees that the copies are not needed.
  """
  if platform != 'cpu':
    return {}
  options = {'xla_cpu_copy_insertion_use_region_analysis': True}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.).compile()
  except jax.errors.JaxRuntimeError:  # a jaxlib that does not know it
    return {}
  return options


def make_generate(config: config_lib.Config, mesh, abstract, ends, group,
                  greedy=False):
  """Return the jitted (params, prompts, valid, key) -> Tokens, log-probs.

  Prompts are NumPy arrays, the same in every process, or device arrays.

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
      in_shardings=(shardings, rows, rows, None), out_shardings=(rows, rows),
      compiler_options=compiler_options(mesh.devices.flat[0].platform))

  def run(params, prompts, valid, key):
    if mesh is not trained:  # a key is bound to the mesh it was made on
      key = np.asarray(jax.random.key_data(key))
    with jax.set_mesh(mesh):
      if mesh is not trained:
        key = jax.random.wrap_key_data(key)
      return jitted(params, *distributed.put((prompts, valid), rows), key)

  return run


def pad_prompts(prompts, tokenizer, length):
  """Return texts as left-padded int32 [P, R] and bool [P, R] NumPy arrays.

  Args:
    prompts: P texts.
    tokenizer: see `tokenizers`.
    length: R, rollout.max_prompt.

  Raises:
    config.ConfigError: a prompt is empty or longer than R tokens.
  """
  tokens = np.full((len(prompts), length), tokenizer.ends.pad, np.int32)
  valid = np.zeros((len(prompts), length), bool)
  for row, text in enumerate(prompts):
    ids = tokenizer.encode(text)
    check_prompt(text, len(ids), length)
    tokens[row, length - len(ids):] = ids
    valid[row, length - len(ids):] = True
  return tokens, valid


def check_prompt(text, count, length):
  """Raise config.ConfigError if a prompt has 0 or more than `length` tokens."""
  if not count:
    raise config_lib.ConfigError('the task gave an empty prompt')
  if count > length:
    raise config_lib.ConfigError(
        f'the prompt {text[:40]!r} has {count} tokens, but rollout.max_prompt='
        f'{length}; raise rollout.max_prompt')


def pad_supervised(examples, tokenizer, prompt_length, response_length):
  """Return `types.Tokens` (NumPy) of prompts and solutions, EOS appended.

  Args:
    examples: list of B `types.Example` with solutions.
    tokenizer: see `tokenizers`.
    prompt_length: R.
    response_length: S.

  Raises:
    config.ConfigError: a prompt or solution does not fit.
  """
  tokens, valid = pad_prompts([e.prompt for e in examples], tokenizer,
                              prompt_length)
  pad, (eos, *_) = tokenizer.ends
  more = np.full((len(examples), response_length), pad, np.int32)
  there = np.zeros(more.shape, bool)
  for row, example in enumerate(examples):
    ids = tokenizer.encode(example.solution) + [eos]
    if len(ids) > response_length:
      raise config_lib.ConfigError(
          f'the solution {example.solution[:40]!r} has {len(ids)} tokens, EOS '
          f'included, but rollout.max_response={response_length}; raise '
          'rollout.max_response')
    more[row, :len(ids)] = ids
    there[row, :len(ids)] = True
  return types.Tokens(np.concatenate([tokens, more], 1),
                      np.concatenate([valid, there], 1))
