"""Package metadata of mtp_rl; lower bounds are versions that were tested."""

import pathlib

import setuptools

GYM = ['reasoning-gym>=0.1.25']
MATH = ['math-verify[antlr4_13_2]>=0.9.0']
MODELS = ['tokenizers>=0.23', 'jinja2>=3.1.6', 'gguf>=0.19',
          'safetensors>=0.8']
TEST = ['pytest>=9.0', 'pytest-xdist>=3.8', 'ruff>=0.17', 'nbclient>=0.11',
        'ipykernel>=7.4', *GYM, *MATH,
        *MODELS]

setuptools.setup(
    name='mtp_rl',
    version='0.1.0',
    description='Joint training of multi-token prediction and RLVR in JAX',
    long_description=(pathlib.Path(__file__).parent / 'README.md').read_text(
        encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['mtp_rl', 'mtp_rl.*']),
    install_requires=[
        'jax>=0.10.2',
        'flax>=0.12.8',
        'optax>=0.2.8',
        'safetensors>=0.8',
        'gguf>=0.19',
        'orbax-checkpoint>=0.12.8',
        'tensorflow-datasets>=4.9.10',
        'importlib_resources>=7.1',  # tensorflow-datasets forgets to ask
        'absl-py>=2.5.1',
        'ml_collections>=1.1.0',
        'numpy>=2.4',
        'matplotlib>=3.11',
        'tensorboardX>=2.6.5',
        'tqdm>=4.70',
    ],
    extras_require={
        'gym': GYM,
        'math': MATH,
        'models': MODELS,
        'test': TEST,
        # tests against transformers; torch from its CPU index if wanted
        'hf': ['torch==2.13.0', 'transformers>=5.23'],
        'tpu': ['jax[tpu]>=0.10.2'],
        'gpu': ['jax[cuda13]>=0.10.2'],
    },
)
