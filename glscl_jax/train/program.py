"""What a compiled program does, read from its text.

The compiler's own cost analysis counts the body of a loop once. Here loops
count as often as they run: products, memory traffic and collectives of one
device. Where a step chooses one of several branches, each quantity is that of
the branch that needs most of it.

The text is HLO, what `jax.stages.Compiled.as_text` gives after partitioning:
its shapes are those of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# They move nothing themselves; what they call is counted where it stands.
_FREE = frozenset(
  (
    "parameter constant tuple get-tuple-element bitcast while conditional call "
    "after-all opt-barrier partition-id replica-id add-dependency "
    "copy-done async-start async-update async-done send-done recv-done"
  ).split()
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation|"
  r"branch_computations)=(?:%([\w.\-]+)|\{([^}]*)\})"
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result."""

  dtype: str
  shape: tuple[int, ...]
  memory: int  # space; 0: the device's main memory

  @property
  def bytes(self) -> int:
    """Without padding."""
    return math.prod(self.shape) * _item_bits(self.dtype) // 8

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _item_bits(dtype: str) -> int:
  if dtype == "pred":
    return 8
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 0  # token: nothing


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result
  operands: tuple[str, ...]
  text: str  # what follows the operands
  argument: str  # between the parentheses
  root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """Equal transfers between devices, in which each device takes part."""

  kind: str  # of KINDS
  arrays: str  # what each gives or takes, the larger of both
  bytes: int  # of these arrays
  group: int  # devices that exchange something, 2 of a collective-permute
  axes: tuple[str, ...]  # of the mesh, along which these differ
  devices: tuple[int, ...]  # one group, by their place in the mesh
  count: float  # times a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one device does in one step."""

  flops: float  # of products alone
  memory_bytes: float  # read from and written to main memory
  collectives: tuple[Collective, ...]  # the ones that move most first


def read(text: str, mesh_shape: Mapping[str, int]) -> Work:
  """Adds up a program.

  Args:
    text: of a compiled program.
    mesh_shape: axis -> size of the mesh it was partitioned for, in order.

  Raises:
    ValueError: no such text.
  """
  entry, computations = parse(text)
  program = _Program(computations)
  counts: collections.Counter[Collective] = collections.Counter()
  for instruction, inside, times in program.collectives(entry):
    counts[_describe(instruction, inside, mesh_shape)] += times
  found = [
    dataclasses.replace(one, count=count) for one, count in counts.items()
  ]
  found.sort(key=lambda one: -one.bytes * one.count)
  return Work(
    flops=program.flops(entry),
    memory_bytes=program.memory_bytes(entry),
    collectives=tuple(found),
  )


def parse(text: str) -> tuple[str, dict[str, Computation]]:
  """The name of the entry, and all computations by name.

  Raises:
    ValueError: no entry.
  """
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      if head := _COMPUTATION.match(line):
        current = computations[head[2]] = {}
        entry = head[2] if head[1] else entry
    elif re.match(r"\}(, execution_thread=.*)?$", line):
      current = None  # other braces end an attribute of several lines
    elif head := _INSTRUCTION.match(line):
      made = _instruction(head, line[head.end() :])
      current[made.name] = made
  if entry is None:
    raise ValueError("not the text of a compiled program: no ENTRY")
  return entry, computations


def _instruction(head: re.Match, rest: str) -> Instruction:
  # A type is "(a, b)" or has no space; layouts may hold parentheses.
  end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
  result, rest = rest[: end + 1], rest[end + 1 :].lstrip()
  opening = rest.index("(")
  closing = opening + _closing(rest[opening:])
  argument = rest[opening + 1 : closing]
  return Instruction(
    name=head[2],
    opcode=rest[:opening],
    arrays=tuple(_arrays(result)),
    operands=tuple(_NAME.findall(argument)),
    text=rest[closing + 1 :],
    argument=argument,
    root=bool(head[1]),
  )


def _closing(text: str) -> int:
  """Where the parenthesis that `text` begins with ends."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place
  raise ValueError(f"a parenthesis stays open: {text[:80]}")


def _arrays(text: str) -> Iterator[Array]:
  for dtype, shape, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    yield Array(
      dtype,
      tuple(int(n) for n in shape.split(",") if n),
      int(space[1]) if space else 0,
    )


def _called(instruction: Instruction) -> dict[str, tuple[str, ...]]:
  """Computations by the attribute that names them."""
  return {
    key: (one,) if one else tuple(_NAME.findall(many))
    for key, one, many in _CALLED.findall(instruction.text)
  }


class _Program:
  """Walks the computations from the entry."""

  def __init__(self, computations: Mapping[str, Computation]):
    self._all = computations
    self._starts = self._find_starts()
    self.flops = functools.cache(self._flops)
    self.memory_bytes = functools.cache(self._memory_bytes)

  def _times(self, loop: Instruction, condition: str) -> int:
    """How often a loop runs; 1 where that is not known before it does."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.text)
    if known:
      return int(known[1])
    limits = [
      int(one.argument)
      for one in self._all[condition].values()
      if one.opcode == "constant" and one.argument.isdigit()
    ]
    return limits[0] if len(limits) == 1 else 1

  def _inner(
    self, instruction: Instruction
  ) -> Iterator[tuple[list[str], float]]:
    """(computations of which one runs, how often)."""
    called = _called(instruction)
    match instruction.opcode:
      case "while":
        times = self._times(instruction, *called["condition"])
        yield list(called["body"]), times
      case "conditional":
        yield [name for names in called.values() for name in names], 1
      case "call" | "async-start" | "fusion" | "custom-call":
        for names in called.values():
          for name in names:
            yield [name], 1

  def _flops(self, name: str) -> float:
    total = 0.0
    for one in self._all[name].values():
      if one.opcode == "dot":
        total += _dot_flops(one, self._all[name])
      elif one.opcode == "custom-call" and one.name.startswith("splash_"):
        total += _splash_flops(one, self._all[name])
      elif "__cublas$" in one.text:  # a GPU's matrix product
        total += _library_flops(one, self._all[name])
      elif one.opcode == "convolution":
        total += _convolution_flops(one, self._all[name])
      for choices, times in self._inner(one):
        total += times * max(map(self.flops, choices))
    return total

  def _memory_bytes(self, name: str) -> float:
    computation, total = self._all[name], 0.0
    for one in computation.values():
      if one.opcode not in _FREE:
        total += self._moved(one, computation)
      if one.opcode not in ("fusion", "custom-call"):  # its inside stays inside
        for choices, times in self._inner(one):
          total += times * max(map(self.memory_bytes, choices))
    return total

  def _moved(self, one: Instruction, computation: Computation) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    if one.opcode == "fusion":
      (fused,) = _called(one)["calls"]
      read = sum(
        self._read(fused, place) if _in_main(computation[name]) else 0
        for place, name in enumerate(one.operands)
      )
      return read + self._written(fused, one.arrays)
    if one.opcode in ("slice", "dynamic-slice", "gather"):
      source = computation[one.operands[0]]
      parts = sum(a.bytes for a in one.arrays)
      return _bytes(one) + (parts if _in_main(source) else 0)
    if one.opcode == "dynamic-update-slice":
      update = computation[one.operands[1]]
      parts = sum(a.bytes for a in update.arrays)
      return _bytes(update) + (parts if _in_main(one) else 0)
    read = sum(_bytes(computation[name]) for name in one.operands)
    if one.opcode == "copy-start":  # (result, operand, mark)
      return read + _main_bytes(one.arrays[:1])
    if one.opcode == "slice-start":  # ((operand), result, mark)
      (part,) = one.arrays[1:2]
      return (part.bytes if read else 0) + _main_bytes([part])
    if one.opcode.endswith("-start"):  # (operands, results, marks)
      return read + _main_bytes(one.arrays[len(one.operands) :])
    if one.opcode.endswith("-done"):
      return 0
    return read + _bytes(one)

  def _read(self, fused: str, place: int) -> float:
    """Bytes that a fusion reads of an operand: some read a part of it."""
    computation = self._all[fused]
    (parameter,) = (
      one
      for one in computation.values()
      if one.opcode == "parameter" and one.argument == str(place)
    )
    total, names = 0.0, [parameter.name]
    while names:
      name = names.pop()
      for user in computation.values():
        if name not in user.operands:
          continue
        if user.opcode == "bitcast":
          names.append(user.name)
        elif (
          user.opcode in ("dynamic-slice", "slice", "gather")
          and user.operands[0] == name
        ):
          total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "fusion":
          (inner,) = _called(user)["calls"]
          total += sum(
            self._read(inner, i)
            for i, operand in enumerate(user.operands)
            if operand == name
          )
        elif not (
          user.opcode == "dynamic-update-slice" and user.operands[0] == name
        ):  # which is done in place
          return parameter.arrays[0].bytes
    return min(total, parameter.arrays[0].bytes)

  def _written(self, fused: str, arrays: Sequence[Array]) -> float:
    """Bytes that a fusion writes: some change a part of an operand."""
    computation = self._all[fused]
    (root,) = (one for one in computation.values() if one.root)
    parts = (
      [computation[name] for name in root.operands]
      if root.opcode == "tuple"
      else [root]
    )
    if len(parts) != len(arrays):
      return _main_bytes(arrays)
    return sum(
      self._update_bytes(part, computation, array)
      for part, array in zip(parts, arrays, strict=True)
      if not array.memory
    )

  def _update_bytes(
    self, part: Instruction, computation: Computation, array: Array
  ) -> float:
    while part.opcode == "bitcast":
      part = computation[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
      return sum(a.bytes for a in computation[part.operands[1]].arrays)
    if part.opcode == "fusion" and len(part.arrays) == 1:
      (inner,) = _called(part)["calls"]
      return self._written(inner, (array,))
    return array.bytes

  def collectives(
    self, name: str, times: float = 1, outer: Instruction | None = None
  ) -> Iterator[tuple[Instruction, Instruction | None, float]]:
    """Each collective, the fusion that holds it if any, and how often.

    TPUs spread one over several fusions, also over those of a loop in between,
    which all share its channel: the one that starts it counts.
    """
    for one in self._all[name].values():
      is_collective = one.opcode.removesuffix("-start") in KINDS
      if is_collective and self._starts.get(_channel(one), name) == name:
        yield one, outer, times
      for choices, inner_times in self._inner(one):
        fusion = one if one.opcode == "fusion" else outer
        yield from max(
          (
            list(self.collectives(choice, times * inner_times, fusion))
            for choice in choices
          ),
          key=lambda them: sum(_result_bytes(a) * t for a, _, t in them),
        )

  def _find_starts(self) -> dict[str, str]:
    """Channel -> the computation that starts it, where several share it."""
    return {
      _channel(one): name
      for name, computation in self._all.items()
      if any('"AsyncCollectiveStart"' in i.text for i in computation.values())
      for one in computation.values()
      if one.opcode in KINDS
    }


def _channel(one: Instruction) -> str:
  found = re.search(r"channel_id=(\d+)", one.text)
  return found[1] if found else ""


def _main_bytes(arrays: Sequence[Array]) -> int:
  return sum(a.bytes for a in arrays if not a.memory)


def _bytes(one: Instruction) -> int:
  return _main_bytes(one.arrays)


def _in_main(one: Instruction) -> bool:
  return any(not a.memory for a in one.arrays)


def _dot_flops(one: Instruction, computation: Computation) -> float:
  (left,) = computation[one.operands[0]].arrays
  dims = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)[1])
  (result,) = one.arrays
  return 2.0 * math.prod(result.shape) * math.prod(left.shape[d] for d in dims)


def _library_flops(one: Instruction, computation: Computation) -> float:
  """Of a call of cuBLAS, (product, workspace): as `dot`, in other words."""
  (left,) = computation[one.operands[0]].arrays
  found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.text)[1]
  dims = _numbers(found.replace('"', ""))
  result = one.arrays[0]
  return 2.0 * math.prod(result.shape) * math.prod(left.shape[d] for d in dims)


def _splash_flops(one: Instruction, computation: Computation) -> float:
  """Of a kernel of models/fused_attention.py; the compiler tells no products.

  Scores and values forward; backward scores again, and the gradients of the
  probabilities and of queries, or of these, values and keys.
  """
  kinds = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
  number = next(n for kind, n in kinds.items() if one.name.startswith(kind))
  arrays = [a for name in one.operands for a in computation[name].arrays]
  q, k, *_ = (a.shape for a in arrays if len(a.shape) == 4)
  return number * 2.0 * math.prod(q) * k[2]


def _convolution_flops(one: Instruction, computation: Computation) -> float:
  """As XLA counts: products with what padding and dilation add are none.

  TPUs multiply matrices, batches of them too, as convolutions.
  """
  left, right, result = re.search(
    r"dim_labels=(\w+)_(\w+)->(\w+)", one.text
  ).groups()
  (x,) = computation[one.operands[0]].arrays
  (kernel,) = computation[one.operands[1]].arrays
  (y,) = one.arrays
  windows = _windows(one.text)
  groups = re.search(r"batch_group_count=(\d+)", one.text)
  samples = x.shape[left.index("b")] // (int(groups[1]) if groups else 1)
  total = 2.0 * samples
  total *= kernel.shape[right.index("i")] * kernel.shape[right.index("o")]
  for number in range(len(left) - 2):
    label = str(number)
    total *= _valid_places(
      x.shape[left.index(label)],
      y.shape[result.index(label)],
      {key: values[number] for key, values in windows.items()},
    )
  return total


def _windows(text: str) -> dict[str, list[str]]:
  found = re.search(r"window=\{([^}]*)\}", text)
  pairs = (part.split("=") for part in found[1].split()) if found else ()
  return {key: value.split("x") for key, value in pairs}


def _valid_places(size: int, places: int, window: Mapping[str, str]) -> int:
  """Pairs of an output's place and a kernel's that meet an element."""
  width, stride, spread, step = (
    int(window[key]) if key in window else 1
    for key in ("size", "stride", "rhs_dilate", "lhs_dilate")
  )
  before = int(window["pad"].split("_")[0]) if "pad" in window else 0
  place_AM = (
    np.arange(places)[:, None] * stride
    + np.arange(width)[None] * spread
    - before
  )
  inside_AM = (place_AM >= 0) & (place_AM <= (size - 1) * step)
  return int((inside_AM & (place_AM % step == 0)).sum())


def _result_bytes(one: Instruction) -> int:
  """What a collective gives, wherever it lies.

  Started ones give (operands, results, marks).
  """
  return sum(a.bytes for a in _exchanged(one))


def _exchanged(one: Instruction) -> tuple[Array, ...]:
  if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
    return one.arrays
  count = len(one.operands)
  return one.arrays[count : 2 * count]


def _describe(
  one: Instruction, fusion: Instruction | None, mesh_shape: Mapping[str, int]
) -> Collective:
  kind = one.opcode.removesuffix("-start")
  arrays = _exchanged(one)
  groups_AG = _groups(one.text, math.prod(mesh_shape.values()))
  if kind == "all-reduce" and fusion is not None:
    kept = sum(a.bytes for a in fusion.arrays)
    if kept < sum(a.bytes for a in arrays):
      kind = "reduce-scatter"  # a TPU's: reduced, and a part is kept
  scale = 1
  if kind == "reduce-scatter" and one.opcode.startswith("reduce-scatter"):
    scale = groups_AG.shape[1]  # each gives the whole
  return Collective(
    kind=kind,
    arrays=_short(arrays) + (f" x {scale}" if scale > 1 else ""),
    bytes=scale * sum(a.bytes for a in arrays),
    group=groups_AG.shape[1],
    axes=_axes(groups_AG, mesh_shape),
    devices=tuple(groups_AG[0].tolist()),
    count=0,
  )


def _short(arrays: Sequence[Array]) -> str:
  """The largest of them, and how many more."""
  largest = max(arrays, key=lambda a: a.bytes)
  more = f" + {len(arrays) - 1}" if len(arrays) > 1 else ""
  return f"{largest}{more}"


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


def _groups(text: str, num_devices: int) -> np.ndarray:
  """(groups, devices of each) by their place in the mesh."""
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
  if pairs:
    found = np.array(
      [_numbers(p) for p in re.findall(r"\{([\d,]+)", "{" + pairs[1])]
    )
    moved_AG = found[found[:, 0] != found[:, 1]]
    return moved_AG if len(moved_AG) else found
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
  if listed:
    return np.array(
      [_numbers(g) for g in re.findall(r"\{([\d,]*)\}", listed[1])]
    )
  # mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}: those along y.
  meshed = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}",
    text,
  )
  if meshed:
    names = re.findall(r"'(\w+)'=(\d+)", meshed[1])
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", meshed[3])
    order = _permuted(meshed[2]) if meshed[2] else np.arange(num_devices)
    return _along(order.reshape(-1), names, chosen)
  # [groups,devices]<=[a,b]T(1,0): numbers as (a, b), transposed, then cut.
  tiled = re.search(r"replica_groups=\[([\d,]+)\]<=([\[\],\dT()]+)", text)
  if tiled is None:
    return np.arange(num_devices)[None]
  return _permuted(tiled[2]).reshape(_numbers(tiled[1]))


def _permuted(text: str) -> np.ndarray:
  """[a,b]T(1,0): 0, 1, .. as (a, b), transposed."""
  shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  sizes = _numbers(shape)
  numbers = np.arange(math.prod(sizes)).reshape(sizes)
  return numbers.transpose(_numbers(order)) if order else numbers


def _along(
  order_A: np.ndarray,
  names: Sequence[tuple[str, str]],
  chosen: Sequence[tuple[str, str, str]],
) -> np.ndarray:
  """Groups of devices along some axes, or parts of axes, of a mesh.

  Args:
    order_A: the devices, the last axis first.
    names: name and size of each axis.
    chosen: name, size of what comes before the part, and size of the part;
      empty: the whole axis.
  """
  sizes, inside = [], []
  for name, size in names:
    parts = [(before, part) for one, before, part in chosen if one == name]
    if not parts:
      cuts = [(int(size), False)]
    elif not parts[0][1]:
      cuts = [(int(size), True)]
    else:
      (before, part), *_ = [tuple(map(int, pair)) for pair in parts]
      rest = int(size) // before // part
      cuts = [(before, False), (part, True), (rest, False)]
    sizes += [length for length, _ in cuts]
    inside += [is_in for _, is_in in cuts]
  places = order_A.reshape(sizes)
  axes = sorted(range(len(sizes)), key=lambda axis: inside[axis])
  width = math.prod(n for n, one in zip(sizes, inside, strict=True) if one)
  return places.transpose(axes).reshape(-1, width)


def _axes(
  groups_AG: np.ndarray, mesh_shape: Mapping[str, int]
) -> tuple[str, ...]:
  """Along which axes the devices of a group differ."""
  place = np.unravel_index(groups_AG, tuple(mesh_shape.values()))
  return tuple(
    axis
    for axis, at_AG in zip(mesh_shape, place, strict=True)
    if (at_AG != at_AG[:, :1]).any()
  )
