"""Group-relative advantages, and DAPO's shaping of what they are made from."""

import jax.numpy as jnp
import numpy as np


def overlong_penalty(lengths, longest, buffer, penalty):
  """Return what a long completion loses: 0 down to -penalty.

  min(-(len - (L_max - L_buf)) / L_buf * p, 0), DAPO (Yu et al. 2025).

  Args:
    lengths: int [B], tokens of the completions.
    longest: L_max, rollout.max_response.
    buffer: L_buf, tokens before L_max over which the penalty grows; 0: off.
    penalty: p.

  Returns:
    float32 [B].
  """
  lengths = np.asarray(lengths)
  if not buffer:
    return np.zeros(lengths.shape, np.float32)
  over = lengths - (longest - buffer)
  return np.minimum(-over / buffer * penalty, 0.).astype(np.float32)


def varied_groups(rewards, group):
  """Return whether a group's rewards differ, bool [P], from float [B]."""
  r = np.asarray(rewards).reshape(-1, group)
  return (r != r[:, :1]).any(1)


def choose_groups(varied, wanted):
  """Return which drawn groups make the batch: varied ones, in drawn order.

  Args:
    varied: bool [N], N >= wanted groups in the order they were drawn.
    wanted: P.

  Returns:
    int [P]; where fewer than P are varied, the first uniform ones at the end.
  """
  varied = np.asarray(varied)
  order = np.argsort(~varied, kind='stable')
  return order[:wanted]


def group_advantages(rewards, group, kind):
  """Return one advantage a completion, from the rewards of its group.

  grpo:    A = (R - mean) / (std + 1e-6), std with ddof 1 (Shao et al. 2024);
           a group of one has A = R.
  dr_grpo: A = R - mean (Liu et al. 2025); a group of one has A = R.
  rloo:    A = R - mean of the others (Ahmadian et al. 2024).

  Args:
    rewards: float [B], the G completions of a prompt in adjacent rows.
    group: G; divides B.
    kind: 'grpo', 'dr_grpo' or 'rloo'.

  Returns:
    float32 [B].

  Raises:
    ValueError: kind is unknown, or rloo with a group of one.
  """
  r = jnp.asarray(rewards, jnp.float32).reshape(-1, group)
  if kind == 'rloo':
    if group < 2:
      raise ValueError('rloo needs rl.group >= 2')
    others = (r.sum(1, keepdims=True) - r) / (group - 1)
    return (r - others).reshape(-1)
  if kind not in ('grpo', 'dr_grpo'):
    raise ValueError(f'advantage {kind!r} is none of grpo, dr_grpo, rloo')
  if group == 1:
    return r.reshape(-1)
  centred = r - r.mean(1, keepdims=True)
  if kind == 'grpo':
    centred = centred / (r.std(1, ddof=1, keepdims=True) + 1e-6)
  return centred.reshape(-1)
