"""Containers that several packages share, and the legend of all shapes.

Axes used in shape comments everywhere:
  P  prompts of a rollout          G  samples (completions) of one prompt
  B  sequences, B = P * G          T  columns of a sequence, T = R + S
  R  prompt columns (left-padded)  S  response columns (right-padded)
  D  model width                   V  vocabulary
  H  query heads                   N  key/value heads
  C  channels of a head            L  layers
  K  MTP modules, depth k = 1..K   M  microbatches

A token-indexed array of shape [B, S] holds at column s the value that belongs
to response token y_s, whichever module and position predicted it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # verifier processes start without jax
  import jax


@dataclasses.dataclass(frozen=True)
class Example:
  """One problem of a task.

  Attributes:
    prompt: the text that the model continues.
    answer: the reference answer.
    solution: a completion to imitate in the warm-up, None where there is none.
    meta: what else the task's verifier needs.
  """
  prompt: str
  answer: str
  solution: str | None = None
  meta: Any = None


class Tokens(NamedTuple):
  """Sequences in rows.

  The sampler returns one completion per row, with its prompt left-padded and
  its response right-padded. Packed rows hold several (`rollout.packing`).

  Attributes:
    tokens: int32 [B, T]; unpacked, the response starts at column R.
    valid: bool [B, T], True at prompt and response tokens, EOS included.
    segments: int32 [B, T], which completion of its row (1, 2, ..) a token
      belongs to, 0 at padding; None if each row is one completion.
  """
  tokens: jax.Array
  valid: jax.Array
  segments: jax.Array | None = None

  @property
  def attending(self):
    """bool or int32 [B, T]: tokens of one row and equal value > 0 are one
    sequence, which attends to itself alone.
    """
    return self.valid if self.segments is None else self.segments

  def scored(self, max_response):
    """Return S, how many of the last columns are scored: all T when packed."""
    return self.tokens.shape[1] if self.segments is not None else max_response


class RolloutBatch(NamedTuple):
  """What one update consumes; rows are completions.

  In packed rows every [B, S] below is [B, T]: all columns are scored, and
  `mask` selects the response tokens.

  Attributes:
    tokens: int32 [B, T].
    valid: bool [B, T].
    mask: bool [B, S], True at response tokens (valid[:, R:]).
    advantages: float32 [B, S].
    old_main: float32 [B, S], log-probs of the main head before the update.
    old_mtp: float32 [B, S, K], the same of the MTP modules.
    sampler: float32 [B, S], log-probs as the sampler computed them.
    reference: float32 [B, S], log-probs of the reference policy (KL).
    segments: int32 [B, T] of packed rows, else None; see `Tokens`.
  """
  tokens: jax.Array
  valid: jax.Array
  mask: jax.Array
  advantages: jax.Array
  old_main: jax.Array
  old_mtp: jax.Array
  sampler: jax.Array
  reference: jax.Array
  segments: jax.Array | None = None

  @property
  def rows(self):
    """The `Tokens` of the batch."""
    return Tokens(self.tokens, self.valid, self.segments)


class OccState(NamedTuple):
  """What tracking of the coefficient keeps from one update to the next.

  Attributes:
    average: float32 [K], moving average of lambda, not yet bias-corrected.
    count: int32 [], updates averaged.
    smoothness: float32 [], moving average of L eta.
  """
  average: jax.Array
  count: jax.Array
  smoothness: jax.Array


class Skipped(NamedTuple):
  """Updates that were not finite and left everything else as it was.

  Attributes:
    total: int32 [], since the start of the phase.
    in_a_row: int32 [], since the last good update; it stays where it reaches
      run.max_skipped, at which the run ends.
  """
  total: jax.Array
  in_a_row: jax.Array


class TrainState(NamedTuple):
  """Everything that an update changes.

  Attributes:
    step: int32 [], optimiser updates done, without those that were skipped.
    params: the model's parameters; MTP modules under 'mtp'.
    opt_state: the optimiser's state.
    occ: `OccState`, the tracked coefficient.
    skipped: `Skipped`.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  occ: OccState
  skipped: Skipped
