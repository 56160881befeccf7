"""What a compiled program costs, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs,
and knows nothing of what devices send each other. Here the text of
`compiled.as_text()` is read, of CPUs, GPUs and TPUs: matrix products,
collectives, the compiler's own estimate of cycles, memory traffic and kernel
calls, each times the trip counts of the loops around it.

>>> text = '''
... ENTRY %main (a: f32[2,3], b: f32[3,5]) -> f32[2,5] {
...   %a = f32[2,3]{1,0} parameter(0)
...   %b = f32[3,5]{1,0} parameter(1)
...   ROOT %dot = f32[2,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}
... }
... '''
>>> matmul_flops(text)
(60, 60)

*What a collective counts.* The bytes that one device sends in the algorithm of
least traffic, of n devices in a group (Patarasuk and Yuan 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002, eq. 2):

| collective, of an operand of S bytes | bytes sent |
| --- | --- |
| all-gather, collective-broadcast | (n - 1) S |
| reduce-scatter, all-to-all | (n - 1) / n S |
| all-reduce | 2 (n - 1) / n S |
| all-reduce of which each device slices its part (TPU) | as reduce-scatter |
| collective-permute | S times the share of devices that send |

An asynchronous pair counts once, at its start. A TPU fuses steps of one
all-gather into several computations, which repeat it under one `chain_id`; it
counts where it starts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from ppnet.core import hlo_text

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')

# Products.
_CONTRACTING = re.compile(
  r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d",]*)\]'
)
_CONV_DIMS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_BATCH_GROUPS = re.compile(r"batch_group_count=(\d+)")
# Library calls that multiply matrices. Of cuBLAS the dimensions are known.
_MULTIPLIES = re.compile(r"gemm|matmul|dot|conv", re.IGNORECASE)
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# Operations that move nothing, or whose bodies are counted instead.
_FREE = frozenset(
  (
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "domain",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-done",
    "tuple",
    "while",
  )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """Something that devices do together.

  Attributes:
    kind: "all-gather", "reduce-scatter", ...
    groups: numbers of the devices of each group, in the mesh's order; pairs
      (source, target) for a permutation; empty for all devices.
    operand_bytes: of one device.
  """

  kind: str
  groups: tuple[tuple[int, ...], ...]
  operand_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What one execution takes on one device.

  Attributes:
    matmul_flops: of matrix products outside of kernels.
    cycles: the compiler's estimate, without collectives and kernels; 0 where it
      makes none.
    memory_bytes: read from and written to the device's main memory, by
      everything but kernels, products' operands once.
    collectives: how often each is done.
    kernels: calls of custom kernels, by name.
    unknown_loops: loops whose length the text does not say; counted once.
  """

  matmul_flops: float = 0
  cycles: float = 0
  memory_bytes: float = 0
  collectives: Mapping[Collective, float] = dataclasses.field(
    default_factory=dict
  )
  kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
  unknown_loops: tuple[str, ...] = ()

  def plus(self, other: "Cost", times: float = 1) -> "Cost":
    """This, and the other so many times."""
    counts = [
      collections.Counter(getattr(self, name))
      for name in ("collectives", "kernels")
    ]
    for count, name in zip(counts, ("collectives", "kernels"), strict=True):
      for key, number in getattr(other, name).items():
        count[key] += times * number
    return Cost(
      matmul_flops=self.matmul_flops + times * other.matmul_flops,
      cycles=self.cycles + times * other.cycles,
      memory_bytes=self.memory_bytes + times * other.memory_bytes,
      collectives=counts[0],
      kernels=counts[1],
      unknown_loops=self.unknown_loops + other.unknown_loops,
    )

  def sent_bytes(self, mesh: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Bytes that a device sends, by kind and by mesh axes ("fsdp+tensor").

    Args:
      mesh: devices per axis, outermost first; devices are numbered in its
        order.

    Raises:
      ValueError: a program of another number of devices.
    """
    sent: dict[tuple[str, str], float] = collections.defaultdict(float)
    for each, times in self.collectives.items():
      axes = "+".join(axes_of(each.groups, mesh)) or "none"
      num_bytes = times * _sent(each, math.prod(mesh.values()))
      if num_bytes:
        sent[each.kind, axes] += num_bytes
    return dict(sent)


def axes_of(
  groups: Sequence[Sequence[int]], mesh: Mapping[str, int]
) -> tuple[str, ...]:
  """Mesh axes along which the members of a group differ; all for no groups.

  >>> axes_of([[0, 2], [1, 3]], {"data": 1, "fsdp": 2, "tensor": 2})
  ('fsdp',)

  Raises:
    ValueError: a device that the mesh does not have.
  """
  axes, sizes = tuple(mesh), tuple(mesh.values())
  if not groups:
    return tuple(axis for axis in axes if mesh[axis] > 1)
  found = set()
  for group in groups:
    places = [_place(number, sizes) for number in group]
    for i, axis in enumerate(axes):
      if len({place[i] for place in places}) > 1:
        found.add(axis)
  return tuple(axis for axis in axes if axis in found)


def _place(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
  """A device's coordinates."""
  if number >= math.prod(sizes):
    raise ValueError(
      f"Expected devices below {math.prod(sizes)}, got {number}: the program"
      " is of another mesh."
    )
  place = []
  for size in reversed(sizes):
    number, rest = divmod(number, size)
    place.append(rest)
  return tuple(reversed(place))


def _sent(collective: Collective, num_devices: int) -> float:
  """Bytes that one device sends for one collective; see the docstring."""
  groups, size = collective.groups, collective.operand_bytes
  if collective.kind == "collective-permute":
    return size * sum(a != b for a, b in groups) / num_devices
  n = len(groups[0]) if groups else num_devices
  match collective.kind:
    case "all-gather" | "collective-broadcast":
      return (n - 1) * size
    case "all-reduce":
      return 2 * (n - 1) / n * size
  return (n - 1) / n * size


def cost(text: str) -> tuple[Cost, Cost]:
  """Reads what a program takes.

  | in the program | counted |
  | --- | --- |
  | loop | trip count x body; of unknown length once, and named |
  | conditional | the cheapest branch, and the dearest |
  | fusion | its products and collectives; its cycles and memory as a whole |

  Args:
    text: `compiled.as_text()`.

  Returns:
    The least and the most one execution may take; they differ where
    conditionals have branches of different cost.

  Raises:
    ValueError: no program, or a product whose cost cannot be read.
  """
  return _Reader(hlo_text.parse(text)).total()


def matmul_flops(text: str) -> tuple[int, int]:
  """Counts the FLOPs of all matrix products of a module, on one device.

  | in the program | counted |
  | --- | --- |
  | dot, cuBLAS call | 2 x result's entries x contracted size |
  | convolution (TPUs have no other products) | pairs that meet, times 2 |
  | loop | trip count x body; unknown trip count: `ValueError` |
  | conditional | the cheapest branch, and the dearest |
  | other library call that multiplies | `ValueError` |
  | anything else, kernels too | 0 |

  Args:
    text: `compiled.as_text()`.

  Returns:
    The fewest and the most FLOPs one execution may take.

  Raises:
    ValueError: something whose cost cannot be read from the text.
  """
  least, most = cost(text)
  if most.unknown_loops:
    raise ValueError(
      f"Expected loops of known length, got {most.unknown_loops[0]!r}."
    )
  return int(least.matmul_flops), int(most.matmul_flops)


class _Reader:
  """Adds up a module, computations once each."""

  def __init__(self, module: hlo_text.Module):
    self._module = module
    self._known: dict[tuple[str, bool], tuple[Cost, Cost]] = {}
    self._starting = {
      chain
      for name in module.computations
      if self._starts_chains(name)
      for chain in self._chains(name)
    }
    self._counted: set[str] = set()

  def total(self) -> tuple[Cost, Cost]:
    """Of the entry."""
    return self._computation(self._module.entry, is_fused=False)

  def _computation(self, name: str, *, is_fused: bool) -> tuple[Cost, Cost]:
    """Least and most of one execution of a computation."""
    key = name, is_fused
    if key not in self._known:
      least = most = Cost()
      for each in self._module.computations[name].values():
        low, high = self._instruction(name, each, is_fused=is_fused)
        least, most = least.plus(low), most.plus(high)
      self._known[key] = least, most
    return self._known[key]

  def _instruction(
    self, computation: str, each: hlo_text.Instruction, *, is_fused: bool
  ) -> tuple[Cost, Cost]:
    """Least and most of one instruction, with what it calls."""
    instructions = self._module.computations[computation]
    if each.opcode == "while":
      return self._loop(computation, each)
    if each.opcode == "conditional":
      branches = [
        self._computation(name, is_fused=is_fused)
        for name in hlo_text.branches(each)
      ]
      return (
        min((low for low, _ in branches), key=_order),
        max((high for _, high in branches), key=_order),
      )
    own = Cost(
      matmul_flops=_own_flops(each, instructions),
      collectives=self._collective(computation, each),
    )
    target = _TARGET.search(each.rest)
    if each.opcode == "custom-call" and target and target[1] in _KERNELS:
      own = own.plus(Cost(kernels={re.sub(r"[.\d]+$", "", each.name): 1}))
    elif not is_fused:
      cycles = _CYCLES.search(each.rest)
      own = own.plus(
        Cost(
          cycles=int(cycles[1]) if cycles else 0,
          memory_bytes=self._memory_bytes(instructions, each),
        )
      )
    # What an element of a reduction goes through is not worth a look.
    calls = each.opcode in ("fusion", "call", "async-start")
    if not calls or each.called is None:
      return own, own
    low, high = self._computation(
      each.called, is_fused=is_fused or each.opcode == "fusion"
    )
    return own.plus(low), own.plus(high)

  def _loop(
    self, computation: str, each: hlo_text.Instruction
  ) -> tuple[Cost, Cost]:
    """A loop's body times its trip count."""
    _, body = hlo_text.condition_and_body(each)
    low, high = self._computation(body, is_fused=False)
    times = hlo_text.trips(self._module, computation, each)
    if times is None:
      named = Cost(unknown_loops=(each.name,))
      return named.plus(low), named.plus(high)
    return Cost().plus(low, times), Cost().plus(high, times)

  def _starts_chains(self, name: str) -> bool:
    """Whether a computation begins asynchronous collectives."""
    return any(
      'custom_call_target="AsyncCollectiveStart"' in each.rest
      for each in self._module.computations[name].values()
    )

  def _chains(self, name: str) -> Iterator[str]:
    """The chains that a computation takes part in."""
    for each in self._module.computations[name].values():
      if chain := _CHAIN.search(each.rest):
        yield chain[1]

  def _collective(
    self, computation: str, each: hlo_text.Instruction
  ) -> dict[Collective, float]:
    """One collective, or none."""
    kind = each.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
      return {}
    if chain := _CHAIN.search(each.rest):
      if chain[1] in self._starting:
        if not self._starts_chains(computation):
          return {}
      elif chain[1] in self._counted:
        return {}
      self._counted.add(chain[1])
    instructions = self._module.computations[computation]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    return {
      Collective(
        kind=kind,
        groups=hlo_text.groups(each.rest),
        operand_bytes=_operand_bytes(each, instructions),
      ): 1
    }

  def _memory_bytes(
    self,
    instructions: Mapping[str, hlo_text.Instruction],
    each: hlo_text.Instruction,
  ) -> int:
    """Main memory that an instruction reads and writes."""
    if each.opcode in _FREE or each.opcode.endswith("-done"):
      return 0
    operands = [instructions.get(name) for name in each.operands]
    sizes = [
      0 if operand is None else operand.num_bytes for operand in operands
    ]
    if each.opcode in ("copy-start", "slice-start"):
      # Results name the source again, and a flag: what is read, and written.
      return each.num_bytes
    if each.opcode in ("dynamic-slice", "gather", "slice"):
      return 2 * each.num_bytes
    if each.opcode == "dynamic-update-slice":
      return 2 * sizes[1]
    if each.opcode != "fusion" or each.called is None:
      return sum(sizes) + each.num_bytes
    return self._fusion_bytes(operands, each)

  def _fusion_bytes(
    self,
    operands: Sequence[hlo_text.Instruction | None],
    fusion: hlo_text.Instruction,
  ) -> int:
    """Main memory that a fusion touches: of what is sliced the slices alone."""
    total = 0
    for number, operand in enumerate(operands):
      if operand is None or not operand.num_bytes:
        continue
      uses = list(self._uses(str(fusion.called), number))
      read = [use for use, is_written in uses if not is_written]
      if uses and all(
        use.opcode in ("dynamic-slice", "gather") for use in read
      ):
        total += sum(_all_bytes(use) for use in read)
      else:
        total += operand.num_bytes
    written = fusion.num_bytes
    for inside, each in self._nested(str(fusion.called)):
      if each.opcode == "dynamic-update-slice":
        whole, part = _all_bytes(each), inside.get(each.operands[1])
        if part is not None and whole <= written:
          written += _all_bytes(part) - whole
    return total + written

  def _uses(
    self, computation: str, number: int
  ) -> Iterator[tuple[hlo_text.Instruction, bool]]:
    """Who reads a parameter, and whether it is only written in part."""
    instructions = self._module.computations[computation]
    names = {
      each.name
      for each in instructions.values()
      if each.opcode == "parameter"
      and hlo_text.ints(each.rest.split(")")[0])[:1] == (number,)
    }
    for each in instructions.values():  # Operands come before their users.
      places = [i for i, name in enumerate(each.operands) if name in names]
      if not places:
        continue
      if each.opcode == "bitcast":
        names.add(each.name)
      elif each.opcode == "fusion" and each.called:
        for place in places:
          yield from self._uses(each.called, place)
      else:
        yield each, each.opcode == "dynamic-update-slice" and places == [0]

  def _nested(
    self, computation: str
  ) -> Iterator[
    tuple[Mapping[str, hlo_text.Instruction], hlo_text.Instruction]
  ]:
    """A fusion's instructions, with those of fusions in it."""
    instructions = self._module.computations[computation]
    for each in instructions.values():
      yield instructions, each
      if each.opcode == "fusion" and each.called:
        yield from self._nested(each.called)


def _all_bytes(each: hlo_text.Instruction) -> int:
  """Of a result, wherever it lives."""
  return sum(array.num_bytes for array in each.arrays)


def _order(cost: Cost) -> tuple[float, ...]:
  """Which of two branches is dearer."""
  sizes = [
    times * each.operand_bytes for each, times in cost.collectives.items()
  ]
  return (cost.matmul_flops, cost.cycles, sum(sizes), cost.memory_bytes)


def _operand_bytes(
  each: hlo_text.Instruction, instructions: Mapping[str, hlo_text.Instruction]
) -> int:
  """All of a collective's operands, wherever they live."""
  total = 0
  for name in each.operands:
    operand = instructions.get(name)
    if operand is not None:
      total += sum(array.num_bytes for array in operand.arrays)
  return total


def _own_flops(
  each: hlo_text.Instruction, instructions: Mapping[str, hlo_text.Instruction]
) -> int:
  """FLOPs of one product; 0 for everything else."""
  if each.opcode == "custom-call":
    target = _TARGET.search(each.rest)
    if target is None or not _MULTIPLIES.search(target[1]):
      return 0
    if not target[1].startswith("__cublas$"):
      raise ValueError(f"Expected no library call like {target[1]!r}.")
  elif each.opcode == "convolution":
    return _convolution_flops(each, instructions)
  elif each.opcode != "dot":
    return 0
  contracting = _CONTRACTING.search(each.rest)
  if contracting is None or not each.operands:
    raise ValueError(
      f"Expected a product's dimensions, got {each.rest[:80]!r}."
    )
  axes = hlo_text.ints(contracting[1] or contracting[2] or "")
  left = instructions[each.operands[0]].arrays[0].dims
  contracted = math.prod(left[axis] for axis in axes)
  return 2 * math.prod(each.arrays[0].dims) * contracted


def _convolution_flops(
  each: hlo_text.Instruction, instructions: Mapping[str, hlo_text.Instruction]
) -> int:
  """Twice the pairs of entries that meet; padding and holes meet nothing.

  A batched product is a convolution on a TPU, its window as large as the batch
  and mostly outside of it.
  """
  labels = _CONV_DIMS.search(each.rest)
  if labels is None or len(each.operands) < 2:
    raise ValueError(
      f"Expected a convolution's dimensions, got {each.rest[:80]!r}."
    )
  left, right, out = labels.groups()
  base = instructions[each.operands[0]].arrays[0].dims
  kernel = instructions[each.operands[1]].arrays[0].dims
  result = each.arrays[0].dims
  pairs = 1
  window = _WINDOW.search(each.rest)
  fields = dict(
    item.split("=", 1) for item in (window[1].split() if window else [])
  )
  for i in range(sum(letter.isdigit() for letter in left)):
    get = lambda name, default, i=i: (
      fields[name].split("x")[i] if name in fields else default
    )
    low = int(get("pad", "0_0").split("_")[0])
    pairs *= _meetings(
      size=base[left.index(str(i))],
      window=int(get("size", "1")),
      count=result[out.index(str(i))],
      stride=int(get("stride", "1")),
      low=low,
      base_dilation=int(get("lhs_dilate", "1")),
      window_dilation=int(get("rhs_dilate", "1")),
    )
  groups = _BATCH_GROUPS.search(each.rest)
  return (
    2
    * pairs
    * result[out.index("b")]
    * result[out.index("f")]
    * kernel[right.index("i")]
    // (int(groups[1]) if groups else 1)
  )


def _meetings(
  *,
  size: int,
  window: int,
  count: int,
  stride: int,
  low: int,
  base_dilation: int,
  window_dilation: int,
) -> int:
  """Pairs (place of the window, entry in it) that hit an entry of the base."""
  if window == 1 and low == 0 and base_dilation == 1:
    return count
  total = 0
  for entry in range(window):
    offset = entry * window_dilation - low
    for place in range(count):
      at = place * stride + offset
      total += at % base_dilation == 0 and 0 <= at < size * base_dilation
  return total
