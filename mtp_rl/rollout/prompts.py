"""Texts as rows of tokens: prompts, and prompts with their solutions."""

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import types


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
