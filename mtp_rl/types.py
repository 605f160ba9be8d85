"""Containers that cross room borders, and the axis legend of all shapes.

Axes used in shape comments everywhere:
  P  prompts of a rollout          G  samples (completions) of one prompt
  B  sequences, B = P * G          T  columns of a sequence, T = R + S
  R  prompt columns (left-padded)  S  response columns (right-padded)
  D  model width                   V  vocabulary
  H  query heads                   N  key/value heads
  C  channels of a head            L  layers
  K  MTP modules, depth k = 1..K   M  microbatches

A token-indexed array of shape [B, S] holds at column s the value that belongs
to response token y_s, whichever head and position predicted it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # verifier processes start without jax
  import jax


@dataclasses.dataclass(frozen=True)
class Example:
  """One problem: text in, text checked.

  Attributes:
    prompt: the text that the model continues.
    answer: the reference answer.
    solution: a completion to imitate in the warm-up, None where there is none.
    meta: what the verifier of the task needs beside the answer.
  """
  prompt: str
  answer: str
  solution: str | None = None
  meta: Any = None


class Tokens(NamedTuple):
  """Sequences with their prompts left-padded and responses right-padded.

  Attributes:
    tokens: int32 [B, T], prompt in columns < R, response from column R on.
    valid: bool [B, T], True at prompt and response tokens, EOS included.
  """
  tokens: jax.Array
  valid: jax.Array


class RolloutBatch(NamedTuple):
  """What one update consumes; rows are completions.

  `rollout.packing` puts several completions in a row. Then [B, S] reads
  [B, T] throughout, and `valid` says which completion a token is of.

  Attributes:
    tokens: int32 [B, T].
    valid: bool [B, T]; of packed rows int32, 1, 2, .. by completion, 0 padding.
    mask: bool [B, S], True at response tokens (valid[:, R:]).
    advantages: float32 [B, S].
    old_main: float32 [B, S], log-probs of the main head before the update.
    old_heads: float32 [B, S, K], the same of the MTP heads.
    sampler: float32 [B, S], log-probs as the sampler computed them.
    reference: float32 [B, S], log-probs of the reference policy (KL).
  """
  tokens: jax.Array
  valid: jax.Array
  mask: jax.Array
  advantages: jax.Array
  old_main: jax.Array
  old_heads: jax.Array
  sampler: jax.Array
  reference: jax.Array

  @property
  def segments(self):
    """int32 [B, T] of packed rows, None where a row is one completion."""
    return None if self.valid.dtype == bool else self.valid


class OccState(NamedTuple):
  """What online tracking of the coefficient remembers between updates.

  Attributes:
    average: float32 [K], exponential moving average of lambda (biased).
    count: int32 [], updates seen.
    smoothness: float32 [], moving average of L eta (cross_fitted).
  """
  average: jax.Array
  count: jax.Array
  smoothness: jax.Array


class TrainState(NamedTuple):
  """All that an update changes.

  Attributes:
    step: int32 [], optimiser updates done.
    params: the model's parameters; MTP modules under 'mtp'.
    opt_state: the optimiser's state.
    occ: the tracked coefficient.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  occ: OccState
