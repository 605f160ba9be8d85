"""A character tokenizer, built from the characters that a task uses."""

import numpy as np

PAD, EOS, UNKNOWN = 0, 1, 2
_SPECIAL = 3


class CharTokenizer:
  """One token a character; 0 pads, 1 ends, 2 stands for an unseen one.

  Attributes:
    characters: the known characters, sorted.
    vocab_size: V.
  """

  def __init__(self, characters):
    self.characters = ''.join(sorted(set(characters)))
    self.vocab_size = _SPECIAL + len(self.characters)
    self._ids = {c: i + _SPECIAL for i, c in enumerate(self.characters)}

  def encode(self, text):
    """Return the list of token ids of a text, without EOS."""
    return [self._ids.get(c, UNKNOWN) for c in text]

  def decode(self, ids):
    """Return the text of token ids up to the first EOS, without padding."""
    out = []
    for i in np.asarray(ids).tolist():
      if i == EOS:
        break
      if _SPECIAL <= i < self.vocab_size:
        out.append(self.characters[i - _SPECIAL])
      elif i != PAD:  # UNKNOWN, or a row of the table without a character
        out.append('\N{REPLACEMENT CHARACTER}')
    return ''.join(out)
