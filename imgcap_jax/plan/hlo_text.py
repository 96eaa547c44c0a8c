"""Parses the text of a compiled program (``compiled.as_text()``): computations, instructions, shapes with layouts."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(\w+)=(?:%([\w.\-]+)|\{(%[^}]*)\})")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Shape:
    """One array: its dtype, its dimensions, and how it lies in memory.

    order: the dimensions from the minor to the major one. tile: the tile that the minor dimensions are padded to; () if
    there is none. space: the memory; 0 is the device's main memory (HBM).
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """The number of elements without padding."""
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> float:
        """Bytes per element."""
        bits = _ITEM_BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) * (2 if self.dtype.startswith("c") else 1) if found else 0
        return bits / 8

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return math.ceil(self.elements * self.item_bytes)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: the minor dimensions are padded to whole tiles."""
        physical = [self.dims[dim] for dim in reversed(self.order)] if self.order else list(self.dims)
        for place, size in zip(range(len(physical) - 1, -1, -1), reversed(self.tile), strict=False):
            physical[place] = -(-physical[place] // size) * size
        return math.ceil(math.prod(physical) * self.item_bytes)

    @property
    def main_bytes(self) -> int:
        """Bytes in the device's main memory; 0 for a buffer in on-chip memory."""
        return self.padded_bytes if self.space == 0 else 0


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, which may be a tuple of any depth."""
    return tuple(_shape(*found.groups()) for found in _ARRAY.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    order, _, rest = (layout or "").partition(":")
    tile = re.match(r"T\(([0-9,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        sizes,
        tuple(int(dim) for dim in order.split(",") if dim),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    name, opcode; result: the arrays that it returns; operands: the names of what it reads; arguments: the text between
    its parentheses; attributes: the text after them.
    """

    name: str
    opcode: str
    result: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations that it calls, by attribute (body, condition, calls, to_apply, ...)."""
        found = {}
        for key, one, several in _CALLED.findall(self.attributes):
            names = (one,) if one else tuple(_NAME.findall(several))
            if names:
                found[key] = names
        return found

    @property
    def op_name(self) -> str:
        """The path of JAX operations and scopes that it comes from."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A computation: its instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is returned."""
        return next(one for one in reversed(self.instructions.values()) if one.is_root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    @cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, by number."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.arguments or 0))


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and " = " not in line.split("(", 1)[0]:
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                current.instructions[found[2]] = _instruction(line, found)
    if not entry:
        raise ValueError("the text has no entry computation")
    return Module(computations, entry)


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    start = found.end()
    end = _end(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    opcode = line[end:opening].strip()
    closing = _end(line, opening)
    arguments = line[opening + 1 : closing - 1]
    names = _NAME.findall(arguments)
    if not names and opcode not in ("parameter", "constant", "iota"):  # printed without the percent sign
        names = [part.split()[-1] for part in arguments.split(",") if part.strip()]
    return Instruction(
        found[2], opcode, shapes(line[start:end]), tuple(names), arguments, line[closing:], found[1] is not None
    )


def _end(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(line)):
        if line[place] == "(":
            depth += 1
        elif line[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    raise ValueError(f"unbalanced parentheses: {line:.80}")
