r"""Sampling and an RL step beside transformers, Tunix and TRL, in one process.

    pip install torch transformers trl google-tunix   # in an environment apart
    python -m benchmarks.rivals [--rivals=generate,grpo] [--out=FILE.json]

Random weights of the same shapes, float32, temperature 1, no row ends early;
every round runs each case once, in turn, on the same cores; medians. All
have the settings of malloc of `benchmarks.step`, which keep large buffers.

    generate  tokens/s: SmolLM2-135M's shape, 32 + 32 tokens, 16 rows and 1,
              against transformers' generate; d 128, 4 layers, V 256, 16 + 32
              tokens, 128 rows, against Tunix's sampler
    grpo      seconds of a GRPO step of 16 prompts x 8 completions, 16 + 32
              tokens, d 128, 4 layers, without MTP, one update, no KL, against
              TRL: the whole step, and its part without sampling
"""

import json
import os
import statistics
import sys
import tempfile
import time

from absl import app, flags, logging

from benchmarks import rollout
from mtp_rl.compare import jobs

ROWS, GROUP, R, S = 128, 8, 16, 32
_CHARACTERS = ''.join(chr(i) for i in range(0x100, 0x1fd))  # 253, V is 256
_PARTS = flags.DEFINE_list('rivals', ['generate', 'grpo'], 'Parts to time.')


def _llama(size):
  """Return transformers' model of one of the two shapes."""
  import torch
  import transformers
  shape = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536,
               num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3) if size == 'smol' else dict(
                   vocab_size=256, hidden_size=128, intermediate_size=384,
                   num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2)
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(
      **shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
      pad_token_id=0)).eval()


def _transformers(model, rows, columns):
  """Return a function () -> seconds of one call of generate."""
  import torch
  tokens = torch.tensor(rollout._prompts(rows, columns)[0], dtype=torch.long)

  def run():
    start = time.perf_counter()
    with torch.no_grad():
      out = model.generate(
          tokens, attention_mask=torch.ones_like(tokens), do_sample=True,
          top_k=0, max_new_tokens=S, min_new_tokens=S, pad_token_id=0)
    assert out.shape == (rows, columns + S)
    return time.perf_counter() - start
  return run


class _Characters:
  """What Tunix asks of a tokenizer; ids 3 to 255."""

  def encode(self, text, **unused):
    """Return token ids."""
    return [_CHARACTERS.index(c) + 3 for c in text]

  def decode(self, ids, **unused):
    """Return a text."""
    return ''.join(_CHARACTERS[i - 3] for i in ids if i > 2)

  def bos_id(self):
    """Return no id."""
    return 0

  def eos_id(self):
    """Return an id that is not drawn."""
    return 1

  def pad_id(self):
    """Return the padding's id."""
    return 0


def _tunix(rows):
  """Return a function () -> seconds of one call of Tunix's sampler."""
  from flax import nnx
  from tunix.generate import sampler
  from tunix.models.llama3 import model as llama
  net = llama.Llama3(llama.ModelConfig(
      num_layers=4, vocab_size=256, embed_dim=128, hidden_dim=384, num_heads=4,
      head_dim=32, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
      weight_tying=True), rngs=nnx.Rngs(0))
  draw = sampler.Sampler(net, _Characters(), sampler.CacheConfig(
      cache_size=R + S, num_layers=4, num_kv_heads=2, head_dim=32))
  texts = [_Characters().decode(x) for x in rollout._prompts(rows, R)[0]]

  def run():
    start = time.perf_counter()
    draw(texts, max_generation_steps=S, max_prompt_length=R, temperature=1.,
         top_p=1., seed=0, eos_tokens=[-1])
    return time.perf_counter() - start
  return run


def _generate():
  cases, made = {}, {}
  for size, columns, rows in (('smol', 32, 16), ('smol', 32, 1),
                              ('tiny', R, ROWS)):
    config = rollout._config(size, columns, S)
    name = f'{size},{rows}'
    made[name] = rows * S
    cases[name, 'ours'] = rollout._rollout(
        config, rows, rollout._params(config), rollout._ends())
    cases[name, 'transformers'] = _transformers(_llama(size), rows, columns)
  cases[f'tiny,{ROWS}', 'tunix'] = _tunix(ROWS)
  seconds = rollout._medians('generate', cases)
  out = {}
  for (name, who), s in seconds.items():
    out.setdefault(name, {})[who] = made[name] / s
    print(f'{name:10s}{who:14s}{made[name] / s:>10.0f} tokens/s, ours '
          f'{s / seconds[name, "ours"]:.2f} times')
  return {'generate': out}


class _Task:
  """Prompts of random characters; the reward is the share of one of them."""

  def __init__(self):
    from mtp_rl import tokenizers
    self.tokenizer = tokenizers.CharTokenizer(_CHARACTERS)
    self.tokenizer.ends = rollout._ends()

  def prompts(self, step, count):
    """Return P `types.Example`."""
    from mtp_rl import types
    return [types.Example(_prompt(step, i), '') for i in range(count)]

  def rewards(self, examples, completions):
    """Return the rewards of completions."""
    del examples
    return _reward(completions)

  def counts(self):
    """Return nothing."""
    return {}


def _prompt(step, i):
  import numpy as np
  rng = np.random.default_rng((step, i))
  return ''.join(_CHARACTERS[j] for j in rng.integers(0, 250, R))


def _reward(completions):
  return [sum(c < _CHARACTERS[100] for c in text) / max(len(text), 1)
          for text in completions]


def _ours():
  """Return a function () -> seconds of a step, and of it without sampling."""
  import jax
  import numpy as np

  from mtp_rl import config as config_lib
  from mtp_rl import prng, sharding, trainer
  from mtp_rl.rollout import experience
  from mtp_rl.run import workdir
  config = rollout._config('tiny', R, S)
  config.rl = config_lib.RL(prompts=ROWS // GROUP, group=GROUP, minibatches=1,
                            lr=1e-6, old_logprobs='rollout')
  mesh = sharding.make_mesh(config.mesh)
  run = workdir.Run(config, tempfile.mkdtemp(), _Task(), mesh,
                    prng.run_key(0))
  functions = trainer.prepare(run)
  with jax.set_mesh(mesh):
    kept = [functions.steps.init(jax.random.key(0))]
  count = iter(range(1, 10 ** 6))

  def step():
    with jax.set_mesh(mesh):
      start = time.perf_counter()
      state = kept.pop()
      drawn = experience.collect(functions.actor, state.params, None,
                                 next(count))
      state, _ = trainer._update(run, functions.steps, state, drawn.batch)
      jax.block_until_ready(state.params)
      kept.append(state)
      whole = time.perf_counter() - start
    assert np.all(drawn.batch.mask)
    return whole, whole - drawn.metrics['timing_s/rollout']
  return step


def _tokenizer():
  """Return transformers' tokenizer of the characters."""
  import tokenizers
  import transformers
  names = ['<pad>', '<eos>', '<unk>', *_CHARACTERS]
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {n: i for i, n in enumerate(names)}, unk_token='<unk>'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  inner.decoder = tokenizers.decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, pad_token='<pad>', eos_token='<eos>',
      unk_token='<unk>')


def _grpo():
  import datasets
  import transformers
  import trl
  rounds, ours, seen = rollout._ROUNDS.value + 2, _ours(), []
  ours()  # compiles

  class _Clock(transformers.TrainerCallback):
    """Times TRL's steps, and runs one of ours behind each."""
    started, sampling = 0., 0.

    def on_step_begin(self, *unused_args, **unused):
      """Start the clock."""
      self.started, self.sampling = time.perf_counter(), 0.

    def on_step_end(self, *unused_args, **unused):
      """Note a round."""
      whole = time.perf_counter() - self.started
      seen.append((whole, whole - self.sampling, *ours()))
      print(f'\rgrpo: round {len(seen)} of {rounds}', end='', file=sys.stderr)

  clock = _Clock()

  class _Trainer(trl.GRPOTrainer):
    """TRL's, with its sampling timed."""

    def _generate_single_turn(self, *args, **more):
      start = time.perf_counter()
      out = super()._generate_single_turn(*args, **more)
      clock.sampling += time.perf_counter() - start
      return out

  trainer = _Trainer(
      model=_llama('tiny').train(),
      reward_funcs=lambda completions, **unused: _reward(completions),
      args=trl.GRPOConfig(
          output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS,
          num_generations=GROUP, max_completion_length=S, beta=0.,
          steps_per_generation=1, num_iterations=1, temperature=1., top_k=0,
          max_steps=rounds, learning_rate=1e-6, use_cpu=True, bf16=False,
          gradient_checkpointing=False, report_to='none', save_strategy='no',
          logging_strategy='no', disable_tqdm=True,
          lr_scheduler_type='constant',
          generation_kwargs={'min_new_tokens': S}),
      processing_class=_tokenizer(), callbacks=[clock],
      train_dataset=datasets.Dataset.from_list(
          [{'prompt': _prompt(0, i)} for i in range(rounds * ROWS // GROUP)]))
  trainer.train()
  print(file=sys.stderr)
  middle = lambda f: statistics.median(f(x) for x in seen[2:])
  out = {'trl': {'step': middle(lambda x: x[0]),
                 'train': middle(lambda x: x[1])},
         'ours': {'step': middle(lambda x: x[2]),
                  'train': middle(lambda x: x[3])},
         'step': middle(lambda x: x[2] / x[0]),
         'train': middle(lambda x: x[3] / x[1])}
  print(f'GRPO step: TRL {out["trl"]["step"]:.3f} s, ours '
        f'{out["ours"]["step"]:.3f} s ({out["step"]:.2f}); without sampling '
        f'{out["trl"]["train"]:.3f} and {out["ours"]["train"]:.3f} s '
        f'({out["train"]:.2f})')
  return {'grpo': out}


def main(argv):
  """Time the parts, print them, and write them as they come."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected argument {argv[1]!r}')
  logging.set_verbosity(logging.WARNING)
  cores = sorted(os.sched_getaffinity(0))[:rollout._CORES.value]
  os.sched_setaffinity(0, cores)
  import torch
  torch.set_num_threads(len(cores))
  out = {}
  for part in _PARTS.value:
    out |= {'generate': _generate, 'grpo': _grpo}[part]()
    if rollout._OUT.value:
      with open(rollout._OUT.value, 'w', encoding='utf-8') as f:
        json.dump(out, f, indent=2)
        f.write('\n')


if __name__ == '__main__':
  if os.environ.get('GLIBC_TUNABLES') != jobs.MALLOC:
    os.environ['GLIBC_TUNABLES'] = jobs.MALLOC
    os.execv(sys.executable, [sys.executable, '-m', 'benchmarks.rivals',
                              *sys.argv[1:]])
  app.run(main)
