"""The accelerators that programs can be compiled for without having one.

`libtpu` (extra `tpu`) and JAX's CUDA plugin (extra `gpu-aot`) compile for a
topology that is described to them; no driver is needed.
"""

import os
from typing import NamedTuple

from mtp_rl import config as config_lib

GIB = 2 ** 30
# jaxlib cannot parse asynchronous SparseCore operations in a program's text,
# which is read here, so they are disabled.
_TPU_OPTIONS = {
    'xla_tpu_offload_gather_to_sparsecore': 'false',
    'xla_tpu_enable_offloading_scatter_to_sparsecore': 'false'}


class Chip(NamedTuple):
  """One chip or GPU.

  Attributes:
    flops: bfloat16 FLOP/s, dense.
    memory: bytes of HBM.
    bandwidth: bytes/s of HBM.
    links: bytes/s of all links to other chips together, one way; of a GPU
      those of NVLink, to the GPUs of its own host.
  """
  flops: float
  memory: float
  bandwidth: float
  links: float


class _Gpu(NamedTuple):
  """What the compiler must know of a GPU beside its `Chip`.

  Attributes:
    name: as the driver gives it.
    capability: CUDA compute capability.
    cores: streaming multiprocessors.
    lanes: float32 units of one.
    clock: GHz.
    cache: bytes of L2.
    shared: bytes of shared memory of a multiprocessor.
  """
  name: str
  capability: tuple
  cores: int
  lanes: int
  clock: float
  cache: int
  shared: int


# TPU: Google's public system-architecture pages. GPU: NVIDIA's data sheets of
# the SXM forms, memory and caches as XLA's target descriptions have them
# (openxla/xla, xla/backends/gpu/target_config/specs).
CHIPS = {
    'v4': Chip(275e12, 32 * GIB, 1.2e12, .3e12),
    'v5e': Chip(197e12, 16 * GIB, .82e12, .2e12),
    'v5p': Chip(459e12, 95 * GIB, 2.765e12, .6e12),
    'v6e': Chip(918e12, 32 * GIB, 1.64e12, .448e12),
    'a100': Chip(312e12, 85100068864, 2.039e12, .3e12),
    'h100': Chip(989e12, 84942979072, 3.352e12, .45e12),
    'h200': Chip(989e12, 151397597184, 4.8e12, .45e12),
    'b200': Chip(2250e12, 191514411008, 7.672e12, .9e12)}
_GPUS = {
    'a100': _Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 64, 1.41, 41943040,
                 167936),
    'h100': _Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 1.98, 52428800,
                 233472),
    'h200': _Gpu('NVIDIA H200 141GB HBM3e', (9, 0), 132, 128, 1.98, 52428800,
                 233472),
    'b200': _Gpu('NVIDIA B200', (10, 0), 148, 128, 1.965, 132644864, 233472)}
_CUDNN = 9, 10, 0  # the oldest that attention is compiled for


def _kind(topology):
  return topology.split(':')[0]


def chip(topology):
  """Return the `Chip` of a topology such as 'v5p:4x4x4' or 'h100:1x8x8'.

  Raises:
    config.ConfigError: its kind is not in the table.
  """
  kind = _kind(topology)
  if kind not in CHIPS:
    raise config_lib.ConfigError(
        f'topology {topology!r} is of no known chip; choose '
        f'{", ".join(CHIPS)} and a shape, as in v5p:4x4x4 or, partitions x '
        'hosts x GPUs of a host, h100:1x8x8')
  return CHIPS[kind]


def options(topology):
  """Return the compiler's options for a topology."""
  return {} if _kind(topology) in _GPUS else dict(_TPU_OPTIONS)


def describe_gpu(kind):
  """Return XLA's description of a GPU, a GpuTargetConfigProto as text."""
  gpu, (major, minor) = _GPUS[kind], _GPUS[kind].capability
  memory = CHIPS[kind]
  cudnn = 'major: {} minor: {} patch: {}'.format(*_CUDNN)
  return f'''
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32
        threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
        shared_memory_per_block_optin: {gpu.shared - 1024}
        core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {memory.bandwidth:.0f} l2_cache_size: {gpu.cache}
        clock_rate_ghz: {gpu.clock} device_memory_size: {memory.memory}
        cuda_compute_capability {{ major: {major} minor: {minor} }}
      }}
      platform_name: "CUDA" dnn_version_info {{ {cudnn} }}
      device_description_str: "{gpu.name}"'''


def _tpu(topology):
  for name, value in (  # else libtpu asks the cloud where it runs
      ('TPU_SKIP_MDS_QUERY', '1'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
      ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_WORKER_ID', '0'),
      ('TPU_ACCELERATOR_TYPE', _kind(topology) + '-8')):
    os.environ.setdefault(name, value)
  from jax.experimental import topologies
  return topologies.get_topology_desc(topology, 'tpu').devices


def _gpu(topology):
  from jax.experimental import topologies
  kind, _, shape = topology.partition(':')
  return topologies.get_topology_desc(
      platform='cuda', target_config=describe_gpu(kind),
      topology=shape).devices


def devices(topology):
  """Return the devices of a topology, to be compiled for but not used.

  Raises:
    config.ConfigError: the compiler is not installed, or does not know the
      topology.
  """
  chip(topology)
  of_gpus = _kind(topology) in _GPUS
  extra, example = (('gpu-aot', 'h100:1x8x8') if of_gpus
                    else ('tpu', 'v5p:4x4x4'))
  try:
    return _gpu(topology) if of_gpus else _tpu(topology)
  except Exception as e:  # the compilers raise many kinds
    first = str(e).strip().split('\n')[0][:200]
    raise config_lib.ConfigError(
        f'topology {topology!r} cannot be described ({first}); install the '
        f"extra with pip install -e '.[{extra}]', and name a topology such "
        f'as {example}') from e
