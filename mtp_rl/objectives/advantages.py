"""Group-relative advantages, and DAPO's overlong penalty on the rewards."""

import numpy as np


def overlong_penalty(lengths, max_response, buffer, penalty):
  """Return the overlong penalty of each completion, from 0 down to -penalty.

  min(-(len - (L_max - L_buf)) / L_buf * p, 0), DAPO (Yu et al. 2025).

  Args:
    lengths: int [B], tokens of the completions.
    max_response: L_max, rollout.max_response.
    buffer: L_buf, tokens before L_max over which the penalty grows; 0: off.
    penalty: p.

  Returns:
    float32 [B].
  """
  lengths = np.asarray(lengths)
  if not buffer:
    return np.zeros(lengths.shape, np.float32)
  over = lengths - (max_response - buffer)
  return np.minimum(-over / buffer * penalty, 0.).astype(np.float32)


def finite_rewards(rewards):
  """Return rewards with 0 in place of NaN and infinities, and their count.

  What a verifier cannot put a number to costs that answer alone: in a mean or
  a standard deviation it would cost the whole group.

  Args:
    rewards: float [B].

  Returns:
    float32 [B], int.
  """
  finite = np.isfinite(rewards)
  return np.where(finite, rewards, 0.).astype(np.float32), int((~finite).sum())


def varied_groups(rewards, group):
  """Return bool [P], whether a group's rewards differ; rewards: float [B]."""
  r = np.asarray(rewards).reshape(-1, group)
  return (r != r[:, :1]).any(1)


def choose_groups(varied, wanted):
  """Choose the groups of a batch: varied ones, in the order of drawing.

  Args:
    varied: bool [N], N >= P groups in the order of drawing.
    wanted: P.

  Returns:
    int [P], indices of groups; if fewer than P are varied, the first groups
    of equal rewards follow them.
  """
  varied = np.asarray(varied)
  order = np.argsort(~varied, kind='stable')
  return order[:wanted]


def group_advantages(rewards, group, kind):
  """Return each completion's advantage, from the rewards of its group.

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
  # In float64 the mean of equal float32 rewards is each of them, exactly.
  r = np.asarray(rewards, np.float32).reshape(-1, group).astype(np.float64)
  if kind == 'rloo':
    if group < 2:
      raise ValueError('rloo needs rl.group >= 2')
    others = (r.sum(1, keepdims=True) - r) / (group - 1)
    return (r - others).reshape(-1).astype(np.float32)
  if kind not in ('grpo', 'dr_grpo'):
    raise ValueError(f'advantage {kind!r} is none of grpo, dr_grpo, rloo')
  if group == 1:
    return r.reshape(-1).astype(np.float32)
  centred = r - r.mean(1, keepdims=True)
  if kind == 'grpo':
    centred = centred / (r.std(1, ddof=1, keepdims=True) + 1e-6)
  return centred.reshape(-1).astype(np.float32)
