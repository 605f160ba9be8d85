"""Group-relative advantages."""

import jax.numpy as jnp


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
