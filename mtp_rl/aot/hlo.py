"""What a compiled program does, read from its text: FLOPs, bytes, arrays.

XLA's own cost analysis counts the body of a loop once; here it is counted as
often as the loop runs. All numbers are those of one device.
"""

import collections
import math
import re
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2,
          'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
          'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(
    r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_CALLED = re.compile(
    r'(calls|to_apply|body|condition|true_computation|false_computation|'
    r'branch_computations|called_computations)='
    r'(\{[^}]*\}|%?[\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NO_ARRAY = ('parameter', 'tuple', 'get-tuple-element', 'while', 'bitcast',
             'constant', 'conditional', 'call', 'opt-barrier')
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
               'collective-permute')


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: unique in the module.
    type: text of its shape, a tuple's in parentheses.
    opcode: such as 'dot'.
    rest: operands and attributes, as text.
  """
  name: str
  type: str
  opcode: str
  rest: str


class Summary(NamedTuple):
  """Numbers of one device.

  Attributes:
    flops: of matmuls, convolutions and attention kernels, loops included.
    collectives: dict kind -> bytes, see `_collective`.
    largest: (bytes, type, where) of the largest array that is computed.
    vocabulary: the same for arrays with an axis of the vocabulary's size and
      not of a parameter's shape; None if there is none.
  """
  flops: float
  collectives: dict
  largest: tuple
  vocabulary: tuple | None


def parse(text):
  """Return ({computation: [Instruction]}, name of the entry)."""
  out, current, entry = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = out.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None:
      found = _INSTRUCTION.match(line)
      if found:
        current.append(Instruction(*found.groups()[1:]))
  return out, entry


def shapes(type_text):
  """Return [(dtype, dims)] of the arrays in a type's text."""
  return [(kind, tuple(map(int, filter(None, dims.split(',')))))
          for kind, dims in _SHAPE.findall(type_text) if kind in _BYTES]


def size(type_text):
  """Return the bytes of all arrays in a type's text."""
  return sum(_BYTES[kind] * math.prod(dims)
             for kind, dims in shapes(type_text))


def called(instruction):
  """Return [(role, computation)] that an instruction calls."""
  return [(role, name.strip().lstrip('%'))
          for role, names in _CALLED.findall(instruction.rest)
          for name in names.strip('{}').split(',') if name.strip()]


def trips(computations, loop, condition):
  """Return how often a loop runs.

  What the compiler knows of it counts, else the largest constant of its
  condition, which may be more than it runs.
  """
  known = _TRIPS.search(loop.rest)
  if known:
    return int(known[1])
  numbers, seen = [], [condition]
  for name in seen:
    for i in computations.get(name, ()):
      if i.opcode == 'constant' and i.type.startswith(('s32[]', 'u32[]')):
        numbers += [int(i.rest.split(')')[0])]
      seen += [n for _, n in called(i) if n not in seen]
  return max(numbers, default=1) or 1


def _calls(computations, instruction, flops):
  """Return [(computation, how often)] that an instruction calls."""
  roles = called(instruction)
  if instruction.opcode == 'conditional':
    dearest = max(range(len(roles)), key=lambda i: flops.get(roles[i][1], 0.))
    return [(name, int(i == dearest)) for i, (_, name) in enumerate(roles)]
  times = max((trips(computations, instruction, other)
               for role, other in roles if role == 'condition'), default=1)
  return [(name, times) for _, name in roles]


def counts(computations, entry, flops):
  """Return {computation: how often it runs}; callees come first in the text.

  Of a conditional only the branch with most FLOPs runs; the others are there
  with 0.

  Args:
    computations: see `parse`.
    entry: name of the entry.
    flops: {computation: FLOPs of its own instructions}.
  """
  flops, calls = dict(flops), {}
  for name, instructions in computations.items():
    calls[name] = [call for i in instructions
                   for call in _calls(computations, i, flops)]
    flops[name] += sum(n * flops.get(other, 0.) for other, n in calls[name])
  out = collections.Counter({entry: 1})
  for name in reversed(computations):
    for other, n in calls[name] if name in out else ():
      out[other] += out[name] * n
  return out


def _operands(instruction, types):
  """Return (dtype, dims) of each operand; of a tuple, its first element's."""
  text = instruction.rest.split('), ')[0]
  return [(shapes(types.get(name, '')) or [(None, ())])[0]
          for name in re.findall(r'%([\w.\-]+)', text)]


def _dot(instruction, operands):
  """Return FLOPs of a matmul, in HLO or by cuBLAS."""
  out, lhs = shapes(instruction.type)[0][1], operands[0][1]
  dims = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)',
                   instruction.rest)
  inner = [lhs[int(d)] for d in re.findall(r'\d+', dims[1])] if dims else []
  return 2. * math.prod(out) * math.prod(inner)


def _taps(out, window):
  """Return how many (output position, kernel tap) pairs fall on the input."""
  n, taps = window['in'], 0
  reach = (n - 1) * window['dilate'] + 1
  for tap in range(window['size']):
    first = tap * window['rhs_dilate'] - window['pad']
    for place in range(out):
      at = first + place * window['stride']
      taps += 0 <= at < reach and at % window['dilate'] == 0
  return taps


def _convolution(instruction, operands):
  """Return FLOPs; a batched matmul may be one, with a tap per batch."""
  rest, out = instruction.rest, shapes(instruction.type)[0][1]
  left, right, result = re.search(
      r'dim_labels=(\w+)_(\w+)->(\w+)', rest).groups()
  lhs, rhs = operands[0][1], operands[1][1]
  total = 2. * out[result.index('b')] * out[result.index('f')] * rhs[
      right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', rest)
  fields = dict(f.split('=') for f in window[1].split()) if window else {}
  get = lambda name, i, default: (
      fields[name].split('x')[i] if name in fields else default)
  for i in range(sum(c.isdigit() for c in left)):
    total *= _taps(out[result.index(str(i))], {
        'in': lhs[left.index(str(i))], 'size': int(get('size', i, 1)),
        'stride': int(get('stride', i, 1)),
        'pad': int(str(get('pad', i, '0_0')).split('_')[0]),
        'dilate': int(get('lhs_dilate', i, 1)),
        'rhs_dilate': int(get('rhs_dilate', i, 1))})
  return total


def _kernel(instruction, operands):
  """Return FLOPs of the kernels that XLA does not treat as matmuls.

  Splash attention and cuDNN's count half of all scores. A ragged dot counts
  all rows, although it skips those after the last group.
  """
  name = instruction.name
  target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  target = target[1] if target else ''
  if target.startswith('__cublas$'):
    return _dot(instruction, operands)
  if target.startswith('__cudnn$fmha'):
    b, t, h, c = operands[0][1]  # query
    columns = operands[1][1][1]
    seen = (t * columns if '"NO_MASK"' in instruction.rest
            or '"PADDING"' in instruction.rest else t * (columns + 1) / 2)
    # Forward q k^T and the weights' product with v; backward the scores again
    # and two products for each of those.
    return 2. * (5 if 'Backward' in target else 2) * b * h * c * seen
  if name.startswith('ragged-dot') and 'metadata' not in name:
    lhs, rhs = (dims for _, dims in operands[-2:])
    out = shapes(instruction.type)[0][1]
    return 2. * (math.prod(out) * lhs[-1] if len(out) == 2
                 else math.prod(lhs) * rhs[-1])
  matmuls = {'fwd': 2, 'dq': 3, 'dkv': 4}
  for kind, n in matmuls.items():
    if f'splash_mha_{kind}' in name:
      query = next(dims for dtype, dims in operands
                   if dtype in ('bf16', 'f32') and len(dims) >= 3)
      *rows, t, c = query
      return 2. * n * math.prod(rows) * t * (t + 1) / 2 * c
  return 0.


_FLOPS = {'dot': _dot, 'convolution': _convolution, 'custom-call': _kernel}


def members(type_text):
  """Return the texts of a tuple's elements; of another type, itself."""
  if not type_text.startswith('('):
    return [type_text]
  out, depth, first = [], 0, 1
  for at, c in enumerate(type_text):
    depth += (c in '([{') - (c in ')]}')
    if depth == 0 or (depth == 1 and c == ','):
      out.append(type_text[first:at].strip())
      first = at + 1
  return out


def _collective(instruction, owner, types):
  """Return the kind of a collective and its bytes, or None and 0.

  The bytes are those of the whole array that is gathered, reduced or scattered.
  """
  for kind in COLLECTIVES:
    if instruction.opcode == f'{kind}-start' and kind != 'all-reduce':
      # (operands, results, ...), tuples themselves if several collectives
      # were combined into one: what is gathered, scattered or moved.
      return kind, max(map(size, members(instruction.type)[:2]))
    if instruction.opcode in (kind, f'{kind}-start'):
      if kind == 'reduce-scatter':
        return kind, sum(_BYTES[k] * math.prod(dims)
                         for k, dims in _operands(instruction, types))
      scattered = kind == 'all-reduce' and 'all-reduce-scatter' in owner
      return 'reduce-scatter' if scattered else kind, size(instruction.type)
  return None, 0


def where(instruction):
  """Return the operation's name in the traced program."""
  found = re.search(r'op_name="([^"]*)"', instruction.rest)
  return found[1] if found else instruction.name


def folded(dims):
  """Return a shape as a sorted tuple without axes of size 1."""
  return tuple(sorted(d for d in dims if d != 1))


def summarise(text, vocabularies=frozenset(), parameters=frozenset()):
  """Return the `Summary` of a compiled program.

  Args:
    text: the optimised HLO module as text.
    vocabularies: sizes of a vocabulary axis, whole and on one device.
    parameters: `folded` shapes of parameters, their gradients and copies.
  """
  computations, entry = parse(text)
  own = dict.fromkeys(computations, 0.)
  for name, instructions in computations.items():
    types = {i.name: i.type for i in instructions}
    own[name] = sum(_FLOPS[i.opcode](i, _operands(i, types))
                    for i in instructions if i.opcode in _FLOPS)
  times = counts(computations, entry, own)
  fused = {name for instructions in computations.values()
           for i in instructions if i.opcode in ('fusion', 'reduce', 'scatter')
           for _, name in called(i)}
  flops = sum(times[name] * n for name, n in own.items())
  collectives = collections.Counter()
  largest, vocabulary = (0, '', ''), None
  for name, instructions in computations.items():
    if name not in times:
      continue
    types = {i.name: i.type for i in instructions}
    for i in instructions:
      kind, bytes_ = _collective(i, name, types)
      if kind:
        collectives[kind] += times[name] * bytes_
      if name in fused or i.opcode in _NO_ARRAY or i.opcode.endswith('-done'):
        continue
      for dtype, dims in shapes(i.type):
        entry_ = (_BYTES[dtype] * math.prod(dims),
                  f'{dtype}[{",".join(map(str, dims))}]', where(i))
        largest = max(largest, entry_)
        if (not vocabularies.isdisjoint(dims)
            and folded(dims) not in parameters):
          vocabulary = max(vocabulary or entry_, entry_)
  return Summary(flops, dict(collectives), largest, vocabulary)
