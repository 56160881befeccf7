"""Matrix-product FLOPs of a compiled program, its loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs,
and every element-wise operation as well, of which fusion may repeat any number.
Here the optimised HLO text is read: each product of [m, k] and [k, n] costs
2 m n k, a loop costs its trip count times its body.

>>> text = '''
... ENTRY %main (a: f32[2,3], b: f32[3,5]) -> f32[2,5] {
...   %a = f32[2,3]{1,0} parameter(0)
...   %b = f32[3,5]{1,0} parameter(1)
...   ROOT %dot = f32[2,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}
... }
... '''
>>> matmul_flops(text)
(60, 60)
"""

import dataclasses
import math
import re

# "%name (a: f32[2]) -> f32[2] {", perhaps after "ENTRY".
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "%name = f32[2,3]{1,0} opcode(...)"; of a tuple the first array's shape.
_INSTRUCTION = re.compile(
  r"^(?:ROOT )?%?([\w.\-]+) = \(?\w+\[([\d,]*)\].*? ([\w\-]+)\((.*)$"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"branch_computations=\{([^}]*)\}"
  r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)
_CONTRACTING = re.compile(
  r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d",]*)\]'
)
# Library calls that multiply matrices. Of cuBLAS the dimensions are known.
_LIBRARY = re.compile(r'custom_call_target="([^"]*)"')
_MULTIPLIES = re.compile(r"gemm|matmul|dot|conv", re.IGNORECASE)


@dataclasses.dataclass(kw_only=True)
class _Computation:
  """One computation of a module.

  Attributes:
    flops: of its own products.
    calls: (number of times, names); one of the names runs each time.
  """

  flops: int = 0
  calls: list[tuple[int, list[str]]] = dataclasses.field(default_factory=list)


def matmul_flops(hlo_text: str) -> tuple[int, int]:
  """Counts the FLOPs of all matrix products of a module.

  | in the program | counted |
  | --- | --- |
  | dot, cuBLAS call | 2 x result's entries x contracted size |
  | loop | trip count x body; unknown trip count: `ValueError` |
  | conditional | the cheapest branch, and the dearest |
  | convolution, other library call that multiplies | `ValueError` |
  | anything else | 0 |

  Args:
    hlo_text: `compiled.as_text()`.

  Returns:
    The fewest and the most FLOPs one execution may take; they differ where
    conditionals have branches of different cost.

  Raises:
    ValueError: something whose cost cannot be read from the text.
  """
  computations: dict[str, _Computation] = {}
  shapes: dict[str, tuple[int, ...]] = {}
  current, entry = _Computation(), ""
  for line in hlo_text.splitlines():
    line = line.strip()
    if header := _HEADER.match(line):
      current = computations[header[2]] = _Computation()
      shapes = {}
      entry = header[2] if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      name, dims, opcode, rest = instruction.groups()
      shapes[name] = _ints(dims)
      current.flops += _own_flops(opcode, rest, shapes[name], shapes)
      current.calls += _calls(opcode, rest)
    elif " while(" in line or " conditional(" in line:
      raise ValueError(f"Expected HLO instructions, got {line[:80]!r}.")
  if not entry:
    raise ValueError("Expected the text of an HLO module with an ENTRY.")
  known: dict[str, tuple[int, int]] = {}

  def total(name: str) -> tuple[int, int]:
    if name not in known:
      computation = computations[name]
      low = high = computation.flops
      for times, names in computation.calls:
        costs = [total(called) for called in names]
        low += times * min(cost[0] for cost in costs)
        high += times * max(cost[1] for cost in costs)
      known[name] = low, high
    return known[name]

  return total(entry)


def _own_flops(
  opcode: str,
  rest: str,
  result: tuple[int, ...],
  shapes: dict[str, tuple[int, ...]],
) -> int:
  """FLOPs of one instruction, without what it calls."""
  if opcode == "custom-call":
    target = _LIBRARY.search(rest)
    if target is None or not _MULTIPLIES.search(target[1]):
      return 0
    if not target[1].startswith("__cublas$"):
      raise ValueError(f"Expected no library call like {target[1]!r}.")
  elif opcode == "convolution":
    raise ValueError("Expected no convolution, got one: it has no rule here.")
  elif opcode != "dot":
    return 0
  contracting = _CONTRACTING.search(rest)
  left = re.match(r"(?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)", rest)
  if contracting is None or left is None:
    raise ValueError(f"Expected a product's dimensions, got {rest[:80]!r}.")
  axes = _ints(contracting[1] or contracting[2] or "")
  contracted = math.prod(shapes[left[1]][axis] for axis in axes)
  return 2 * math.prod(result) * contracted


def _calls(opcode: str, rest: str) -> list[tuple[int, list[str]]]:
  """What one instruction runs: (number of times, alternatives)."""
  if opcode == "conditional":
    branches = _BRANCHES.search(rest)
    if branches is None:
      raise ValueError(f"Expected a conditional's branches, got {rest[:80]!r}.")
    listed, first, second = branches.groups()
    names = listed.split(",") if listed else [first, second]
    return [(1, [name.strip().lstrip("%") for name in names])]
  called = _CALLED.findall(rest)
  if not called:
    return []
  times = 1
  if opcode == "while":
    trip_count = _TRIP_COUNT.search(rest)
    if trip_count is None:
      raise ValueError("Expected loops of known length, got another one.")
    times = int(trip_count[1])
  return [(times, [name]) for name in called]


def _ints(text: str) -> tuple[int, ...]:
  """The numbers of "2,3" or of '"2","3"'."""
  return tuple(int(number) for number in re.findall(r"\d+", text))
