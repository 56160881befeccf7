"""The text of an optimised HLO program, as instructions.

What `core.hlo` reads from it is said there.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

# "%name (a: f32[2]) -> f32[2] {", perhaps after "ENTRY".
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "%name = f32[2,3]{1,0} opcode(...)"; the result may be a tuple.
_INSTRUCTION = re.compile(
  r"^(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][\w\-]*)\((.*)$"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"^[a-z]+?(\d+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"branch_computations=\{([^}]*)\}"
  r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA_GROUPS = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
# "mesh['a'=16,'b'=4] {'a'}", and of an axis in parts "{'a':(2)4}".
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]( \{([^}]*)\})?")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUPED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
  """One array of a result.

  Attributes:
    dims: its shape.
    num_bytes: its size.
    is_near: whether it lives in the core's own memory, not in the main one.
  """

  dims: tuple[int, ...]
  num_bytes: int
  is_near: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without %.
    opcode: "fusion", ...
    arrays: of the result.
    operands: names, as far as they are named.
    rest: the line after the opening parenthesis of the operands.
    is_root: whether it is the computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @functools.cached_property
  def num_bytes(self) -> int:
    """Bytes of the result in main memory."""
    return sum(array.num_bytes for array in self.arrays if not array.is_near)

  @property
  def called(self) -> str | None:
    """The computation of a fusion or a call."""
    found = _CALLED.search(self.rest)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
  """A parsed program: computations by name, each its instructions by name."""

  entry: str
  computations: Mapping[str, Mapping[str, Instruction]]


def parse(text: str) -> Module:
  """Raises ValueError where there is no program."""
  computations: dict[str, dict[str, Instruction]] = {}
  current: dict[str, Instruction] = {}
  entry = ""
  for line in text.splitlines():
    line = line.strip()
    if header := _HEADER.match(line):
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif found := _INSTRUCTION.match(line):
      root, name, result, opcode, rest = found.groups()
      current[name] = Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_arrays(result)),
        operands=tuple(_NAME.findall(_until_closed(rest))),
        rest=rest,
        is_root=bool(root),
      )
    elif " while(" in line or " conditional(" in line:
      raise ValueError(f"Expected HLO instructions, got {line[:80]!r}.")
  if not entry:
    raise ValueError("Expected the text of an HLO module with an ENTRY.")
  return Module(entry=entry, computations=computations)


def _until_closed(rest: str) -> str:
  """The operands, up to the parenthesis that closes them."""
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return rest[:i]
  return rest


def _arrays(result: str) -> Iterator[Array]:
  """Every array of a result's type."""
  for dtype, dims, layout in _ARRAY.findall(result):
    bits = _BITS.match(dtype)
    size = int(bits[1]) if bits else 8 if dtype == "pred" else 0
    shape = ints(dims)
    yield Array(
      dims=shape,
      num_bytes=-(-math.prod(shape) * size // 8),
      # Space 1 is a TPU's vector memory, others hold scalars and flags.
      is_near="S(" in layout,
    )


def condition_and_body(loop: Instruction) -> tuple[str, str]:
  """The computations of a loop."""
  found = _LOOP.search(loop.rest)
  if found is None:
    raise ValueError(f"Expected a loop's body, got {loop.rest[:80]!r}.")
  return found[1], found[2]


def trips(module: Module, computation: str, loop: Instruction) -> int | None:
  """How often a loop runs that counts up to a limit; None for another one."""
  if known := _KNOWN_TRIPS.search(loop.rest):
    return int(known[1])
  condition, body = condition_and_body(loop)
  inside, within = module.computations[condition], module.computations[body]
  compared, last = root(inside), root(within)
  given = module.computations[computation]
  state = given.get(loop.operands[0])
  if compared is None or last is None or state is None:
    return None
  if (
    compared.opcode != "compare"
    or "direction=LT" not in compared.rest
    or {state.opcode, last.opcode} != {"tuple"}
  ):
    return None
  counter, limit = (unwrapped(name, inside) for name in compared.operands)
  number = index(counter)
  if number is None:
    return None

  def value(each: Instruction | None) -> int | None:
    """A constant, or what the loop was given."""
    carried = index(each)
    if carried is not None:
      each = unwrapped(state.operands[carried], given)
    return constant(each)

  added = unwrapped(last.operands[number], within)
  if added is None or added.opcode != "add":
    return None
  terms = [unwrapped(name, within) for name in added.operands]
  steps = [value(term) for term in terms if index(term) != number]
  start, stop = value(counter), value(limit)
  if start is None or stop is None or len(steps) != 1 or not steps[0]:
    return None
  return max(0, -(-(stop - start) // steps[0]))


def branches(each: Instruction) -> list[str]:
  """What a conditional may run."""
  found = _BRANCHES.search(each.rest)
  if found is None:
    raise ValueError(
      f"Expected a conditional's branches, got {each.rest[:80]!r}."
    )
  listed, first, second = found.groups()
  names = listed.split(",") if listed else [first, second]
  return [name.strip().lstrip("%") for name in names]


def root(computation: Mapping[str, Instruction]) -> Instruction | None:
  """A computation's result."""
  return next((each for each in computation.values() if each.is_root), None)


def unwrapped(
  name: str, among: Mapping[str, Instruction]
) -> Instruction | None:
  """An instruction, through copies of it."""
  each = among.get(name)
  while each is not None and each.opcode in ("copy", "bitcast", "convert"):
    each = among.get(each.operands[0])
  return each


def index(each: Instruction | None) -> int | None:
  """Which part of a tuple it takes, if that is all it does."""
  if each is None or each.opcode != "get-tuple-element":
    return None
  found = re.search(r"index=(\d+)", each.rest)
  return int(found[1]) if found else None


def constant(each: Instruction | None) -> int | None:
  """An integer constant's value."""
  if each is None or each.opcode != "constant":
    return None
  found = re.match(r"-?\d+", each.rest)
  return int(found[0]) if found else None


def groups(rest: str) -> tuple[tuple[int, ...], ...]:
  """The devices of each group, or the pairs of a permutation."""
  if pairs := _PAIRS.search(rest):
    numbers = ints(pairs[1])
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
  if iota := _IOTA_GROUPS.search(rest):
    shape, sizes = ints(iota[1]), ints(iota[2])
    order = ints(iota[3]) if iota[3] else tuple(range(len(sizes)))
    return _in_groups(_transposed(sizes, order), shape[-1])
  if named := _MESH_GROUPS.search(rest):
    if named[2] is None:  # Devices in another order than their numbers'.
      raise ValueError(f"Expected groups of a mesh, got {rest[:200]!r}.")
    return _mesh_groups(named[1], named[3])
  listed = _LISTED_GROUPS.search(rest)
  if listed is None:
    raise ValueError(f"Expected replica groups, got {rest[:200]!r}.")
  if not listed[1]:
    return ()
  return tuple(ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))


def _mesh_groups(mesh: str, grouped: str) -> tuple[tuple[int, ...], ...]:
  """Groups along some axes of a mesh, or along parts of axes."""
  wanted = [
    (name, int(before or 1), int(size or 0))
    for name, before, size in _GROUPED_AXIS.findall(grouped)
  ]
  # Each axis is cut where a group's part of it begins and ends.
  sizes, places = [], {}
  for name, text in _MESH_AXIS.findall(mesh):
    whole, done = int(text), 1
    own = sorted((b, s or whole) for other, b, s in wanted if other == name)
    for before, size in own:
      sizes += [before // done, size]
      places[name, before] = len(sizes) - 1
      done = before * size
    sizes.append(whole // done)
  order = [places[name, before] for name, before, _ in wanted]
  width = math.prod(sizes[place] for place in order)
  others = [i for i in range(len(sizes)) if i not in order]
  return _in_groups(_transposed(sizes, [*others, *order]), width)


def _in_groups(
  numbers: Sequence[int], width: int
) -> tuple[tuple[int, ...], ...]:
  """Side by side, so many each."""
  return tuple(
    tuple(numbers[i : i + width]) for i in range(0, len(numbers), width)
  )


def _transposed(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
  """0, 1, ... in the shape `sizes`, its axes in another order, flattened."""
  strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  numbers = [0]
  for axis in order:
    numbers = [
      number + i * strides[axis]
      for number in numbers
      for i in range(sizes[axis])
    ]
  return numbers


def ints(text: str) -> tuple[int, ...]:
  """The numbers of "2,3" or of '"2","3"'."""
  return tuple(int(number) for number in re.findall(r"\d+", text))
