"""Text to token ids and back: characters, or a model's own subwords.

`load` reads the tokenizer of a Hugging Face folder (tokenizer.json and its
configs) or of a GGUF file, with the chat template that comes with it.
"""

import functools
import json
import os
from typing import NamedTuple

import numpy as np

from mtp_rl import config as config_lib

PAD, EOS, UNKNOWN = 0, 1, 2  # of CharTokenizer alone
_SPECIAL = 3


class Ends(NamedTuple):
  """The special tokens of padding and of the end of a text.

  Attributes:
    pad: token id.
    eos: tuple of token ids, any of which ends a completion; the first is
      appended to solutions.
  """
  pad: int
  eos: tuple[int, ...]


class CharTokenizer:
  """One token per character; 0 is padding, 1 EOS, 2 an unknown character.

  Attributes:
    characters: the known characters, sorted.
    vocab_size: V.
    ends: `Ends`.
  """

  def __init__(self, characters):
    self.characters = ''.join(sorted(set(characters)))
    self.vocab_size = _SPECIAL + len(self.characters)
    self.ends = Ends(PAD, (EOS,))
    self._ids = {c: i + _SPECIAL for i, c in enumerate(self.characters)}

  def encode(self, text):
    """Return the list of token ids of a text, without EOS."""
    return [self._ids.get(c, UNKNOWN) for c in text]

  def decode(self, ids):
    """Return the text of token ids up to the first EOS, without padding.

    Ids without a character become U+FFFD, padding between other tokens too.
    """
    out = []
    for i in _unpadded(ids, self.ends):
      if _SPECIAL <= i < self.vocab_size:
        out.append(self.characters[i - _SPECIAL])
      else:
        out.append('\N{REPLACEMENT CHARACTER}')
    return ''.join(out)

  def pieces(self, ids):
    """Return the text of each token, a list; special tokens by name."""
    return [_special(i, self.ends) or self.decode([i]) for i in map(int, ids)]

  def to_dict(self):
    """Return what `from_dict` reads."""
    return {'characters': self.characters}


def _special(i, ends):
  """Return the name that a special token is shown by, or None."""
  return '⟨end⟩' if i in ends.eos else '⟨pad⟩' if i == ends.pad else None


def _unpadded(ids, ends):
  """Return the list of ids up to the first EOS, without outer padding."""
  ids = np.asarray(ids)
  stops = np.flatnonzero(np.isin(ids, ends.eos))
  ids = ids[:stops[0]] if len(stops) else ids
  said = np.flatnonzero(ids != ends.pad)
  return ids[said[0]:said[-1] + 1].tolist() if len(said) else []


class SubwordTokenizer:
  """A tokenizer of the package `tokenizers` and its chat template.

  Attributes:
    vocab_size: V, added tokens included.
    ends: `Ends`.
    chat_template: jinja2 text, '' where there is none.
    names: {'bos_token': text, ...} for the template.
  """

  def __init__(self, inner, ends, chat_template='', names=None):
    """Wrap a tokenizer.

    Args:
      inner: JSON text, the content of a tokenizer.json.
      ends: `Ends`.
      chat_template: jinja2 text.
      names: special tokens by role.

    Raises:
      config.ConfigError: a package is missing, or the JSON is no tokenizer.
    """
    tokenizers = _package('tokenizers')
    try:
      self._inner = tokenizers.Tokenizer.from_str(inner)
    except Exception as e:  # the package raises a bare Exception
      raise config_lib.ConfigError(f'this is no tokenizer.json: {e}') from e
    self._inner.no_padding()
    self._inner.no_truncation()
    self.vocab_size = 1 + max(self._inner.get_vocab(True).values())
    self.ends, self.chat_template = ends, chat_template or ''
    self.names = dict(names or {})
    if not ends.eos or not all(0 <= i < self.vocab_size
                               for i in (ends.pad, *ends.eos)):
      raise config_lib.ConfigError(
          f'a tokenizer of {self.vocab_size} tokens cannot end by {ends}')

  def encode(self, text):
    """Return a text's token ids, adding none; special tokens are recognised."""
    return self._inner.encode(text, add_special_tokens=False).ids

  def decode(self, ids):
    """Return the text of token ids up to the first EOS, without padding.

    Special tokens are written out, padding between other tokens too. Ids
    beyond the vocabulary (rows that pad the model's table) become U+FFFD. So
    the verifier sees everything that the model wrote.
    """
    out, run = [], []
    for i in [*_unpadded(ids, self.ends), self.vocab_size]:
      if i < self.vocab_size:
        run.append(i)
        continue
      out.append(self._inner.decode(run, skip_special_tokens=False))
      run = []
    return '\N{REPLACEMENT CHARACTER}'.join(out)

  def pieces(self, ids):
    """Return the text of each token, a list; special tokens by name.

    Where several tokens make one character, the last of them has it and the
    others are ''.
    """
    out, held = [], []  # held: the token before, and those not shown yet
    for i in map(int, ids):
      if special := _special(i, self.ends):
        out.append(special)
        held = []
        continue
      before = self.decode(held[:1])
      held.append(i)
      text = self.decode(held)
      # A character has at most four bytes; what is cut for longer is no text.
      if text.endswith('\N{REPLACEMENT CHARACTER}') and len(held) < 5:
        out.append('')
        continue
      out.append(text.removeprefix(before))
      held = [i]
    return out

  def chat(self, messages):
    """Return the prompt of a conversation, up to where the model answers.

    Args:
      messages: dicts with 'role' and 'content'.

    Raises:
      config.ConfigError: there is no template, or it refuses or fails.
    """
    if not self.chat_template:
      raise config_lib.ConfigError(
          'the tokenizer has no chat template; set task.template=plain')
    try:
      return _compile(self.chat_template).render(
          messages=messages, add_generation_prompt=True, **self.names)
    except Exception as e:  # a foreign template can raise anything
      raise config_lib.ConfigError(
          'the chat template of the tokenizer fails '
          f'({type(e).__name__}: {str(e).strip()[:200]!r}); set '
          'task.template=plain') from e

  def to_dict(self):
    """Return what `from_dict` reads."""
    return {'subwords': self._inner.to_str(), 'pad': self.ends.pad,
            'eos': list(self.ends.eos), 'chat_template': self.chat_template,
            'names': self.names}


def from_dict(values):
  """Return the tokenizer that `to_dict` wrote."""
  if 'characters' in values:
    return CharTokenizer(values['characters'])
  return SubwordTokenizer(
      values['subwords'], Ends(values['pad'], tuple(values['eos'])),
      values['chat_template'], values['names'])


def _package(name):
  return config_lib.optional(name, 'this tokenizer', 'models')


@functools.lru_cache(maxsize=8)
def _compile(template):
  """Return a template compiled in a sandbox."""
  jinja2 = _package('jinja2')
  from jinja2 import sandbox

  class Environment(sandbox.ImmutableSandboxedEnvironment):
    """Also refuses powers and repeated texts.

    It is no bound on memory or time: padding and loops can still fill it.
    """
    intercepted_binops = frozenset({'*', '**'})

    def call_binop(self, context, operator, left, right):
      numbers = all(isinstance(x, (int, float)) for x in (left, right))
      if operator == '**' or not numbers:
        raise jinja2.exceptions.SecurityError(f'{operator} is not allowed')
      return left * right

  def refuse(message):
    raise jinja2.exceptions.TemplateError(message)

  environment = Environment(trim_blocks=True, lstrip_blocks=True,
                            extensions=['jinja2.ext.loopcontrols'])
  environment.globals['raise_exception'] = refuse
  environment.filters['tojson'] = lambda x, indent=None: json.dumps(
      x, ensure_ascii=False, indent=indent)
  return environment.from_string(template)


@functools.lru_cache(maxsize=2)
def load(path):
  """Return the `SubwordTokenizer` of a folder, a tokenizer.json or a GGUF.

  Raises:
    config.ConfigError: there is none at the path, it is damaged, of a kind
      that is not read, or a package is missing.
  """
  if path.endswith('.gguf') and os.path.isfile(path):
    return _from_gguf(path)
  folder = os.path.dirname(path) if path.endswith('tokenizer.json') else path
  if os.path.isfile(os.path.join(folder, 'tokenizer.json')):
    return _from_folder(folder)
  raise config_lib.ConfigError(
      f'task.tokenizer={path!r} is neither a GGUF file nor a folder with a '
      'tokenizer.json; name one')


def _object(text):
  """Return a JSON object as a dict; raises ValueError."""
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ValueError('no JSON object')
  return values


def _read(folder, name, parse=_object):
  """Return a file of a folder, parsed; {} if there is none."""
  path = os.path.join(folder, name)
  try:
    with open(path, encoding='utf-8') as f:
      return parse(f.read())
  except FileNotFoundError:
    return {}
  except (ValueError, RecursionError) as e:
    raise config_lib.ConfigError(f'{path} cannot be read: {e}') from e


def _from_folder(folder):
  text = _read(folder, 'tokenizer.json', str)
  given = _read(folder, 'tokenizer_config.json')
  more = _read(folder, 'generation_config.json')
  names = {k: v.get('content') if isinstance(v, dict) else v
           for k, v in given.items() if k.endswith('_token') and v}
  names = {k: v for k, v in names.items() if isinstance(v, str)}
  try:
    inner = _package('tokenizers').Tokenizer.from_str(text)
  except config_lib.ConfigError:
    raise
  except Exception as e:  # the package raises a bare Exception
    raise config_lib.ConfigError(
        f'{folder}/tokenizer.json is damaged: {e}') from e
  listed = more.get('eos_token_id')
  eos = [inner.token_to_id(names.get('eos_token', ''))]
  eos += listed if isinstance(listed, list) else [listed]
  eos = tuple(i for i in eos if i is not None)
  pad = inner.token_to_id(names.get('pad_token', ''))
  if pad is None:
    pad = more.get('pad_token_id')
  for i in (*eos, *(() if pad is None else (pad,))):
    if type(i) is not int:
      raise config_lib.ConfigError(
          f'{folder}/generation_config.json names the token {i!r}, which is '
          'no integer; correct the file')
  if not eos:
    raise config_lib.ConfigError(
        f'{folder} names no token that ends a text; give eos_token in '
        'tokenizer_config.json or eos_token_id in generation_config.json')
  template = (_read(folder, 'chat_template.jinja', str)
              or given.get('chat_template') or '')
  if isinstance(template, list):  # several templates by name
    template = next((t.get('template') for t in template if isinstance(
        t, dict) and t.get('name') == 'default'), '')
  if not isinstance(template, str):
    raise config_lib.ConfigError(
        f'{folder}/tokenizer_config.json has a chat_template that is no text; '
        'correct the file')
  return SubwordTokenizer(text, Ends(eos[0] if pad is None else pad,
                                     tuple(dict.fromkeys(eos))),
                          template, names)


# How a GGUF's `tokenizer.ggml.pre` splits text before the byte-level merges.
_GGUF_SPLITS = {'smollm': 'digits', 'gpt-2': None, 'gpt2': None}
_CONTROL, _USER = 3, 4  # token types


def _from_gguf(path):
  fields = _gguf_fields(path)
  kind = fields.get('model'), fields.get('pre')
  if kind[0] != 'gpt2' or kind[1] not in _GGUF_SPLITS:
    raise config_lib.ConfigError(
        f'{path} has a tokenizer of kind {kind}, and of GGUF files only '
        f'byte-level BPE split like {", ".join(_GGUF_SPLITS)} is read; name '
        "the folder of the model's tokenizer.json instead")
  tokenizers = _package('tokenizers')
  from tokenizers import decoders, models, pre_tokenizers
  tokens = fields['tokens']
  try:
    inner = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [tuple(m.split(' ')) for m in fields['merges']]))
  except Exception as e:  # the package raises a bare Exception
    raise config_lib.ConfigError(
        f'{path} has damaged tokenizer.ggml.merges: {e}') from e
  splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
  if _GGUF_SPLITS[kind[1]] == 'digits':
    splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
  inner.pre_tokenizer = pre_tokenizers.Sequence(splits)
  inner.decoder = decoders.ByteLevel()
  for of_type, special in ((_CONTROL, True), (_USER, False)):
    inner.add_tokens([
        tokenizers.AddedToken(t, special=special, normalized=False)
        for t, k in zip(tokens, fields.get('token_type', ())) if k == of_type])
  ids = {k: fields[f'{k}_token_id'] for k in ('bos', 'eos', 'padding')
         if f'{k}_token_id' in fields}
  if 'eos' not in ids:
    raise config_lib.ConfigError(f'{path} names no token that ends a text')
  for name, i in ids.items():
    if type(i) is not int or not 0 <= i < len(tokens):
      raise config_lib.ConfigError(
          f'{path} has {name}_token_id={i!r}, which is none of its '
          f'{len(tokens)} tokens; choose another file')
  names = {f'{"pad" if k == "padding" else k}_token': tokens[i]
           for k, i in ids.items()}
  return SubwordTokenizer(
      inner.to_str(), Ends(ids.get('padding', ids['eos']), (ids['eos'],)),
      fields.get('chat_template', ''), names)


def _gguf_fields(path):
  """Return the tokenizer's fields of a GGUF file by their last names."""
  gguf, out = _package('gguf'), {}
  try:
    fields = gguf.GGUFReader(path).fields
    for name, field in fields.items():
      if name.startswith('tokenizer.'):
        out[name.split('.')[-1]] = field.contents()
  except Exception as e:  # the reader fails in many ways on a damaged file
    raise config_lib.ConfigError(
        f'{path} is no GGUF file, or damaged ({type(e).__name__}: {e})') from e
  missing = {'model', 'tokens', 'merges'} - out.keys()
  if missing and out.get('model') in (None, 'gpt2'):
    raise config_lib.ConfigError(
        f'{path} lacks tokenizer.ggml.{", ".join(sorted(missing))}')
  return out
