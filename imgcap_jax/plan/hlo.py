"""What a compiled program does: arithmetic, memory traffic and collectives, with the trip counts of loops.

XLA's own cost analysis (``compiled.cost_analysis()``) counts the body of a loop once. Here, a loop counts as often as
it runs: as XLA states it, as its condition says, or, if its length depends on the data, as the caller assumes.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from imgcap_jax.plan.hlo_text import Computation, Instruction, Module, Shape, parse

Trips = Callable[[str], int | None]
"""The op_name of a loop of unknown length -> how often it runs; None: not known, so that it counts once."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "optimization-barrier", "domain",
}  # fmt: skip
_TO_HOST = {"infeed", "outfeed", "send", "recv"}


@dataclass(frozen=True)
class Work:
    """What one instruction does in all of its executions together.

    Attributes:
        name, opcode, op_name: the instruction.
        count: how often it is executed.
        flops: of matrix products and convolutions.
        passes: of the matrix unit per product: a float32 product in highest precision takes 6 bfloat16 passes on TPU.
        bytes: read from and written to the device's main memory, padding included.
        cycles: the compiler's own estimate, if it states one (TPU).
    """

    name: str
    opcode: str
    op_name: str
    count: int
    flops: float
    passes: int
    bytes: float
    cycles: float


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind.

    Attributes:
        kind: of ``COLLECTIVES``.
        count: how often they run.
        bytes: what one device contributes, all together.
        group: the first group of devices that take part; empty: all devices.
    """

    kind: str
    count: int
    bytes: float
    group: tuple[int, ...] = ()


@dataclass
class Analysis:
    """The work of a program.

    Attributes:
        work: one entry per executed instruction that does anything.
        collectives: one entry per collective instruction.
        host: the instructions that call the host, such as a Python callback.
        unknown_loops: op_names of the loops whose length is not known; each counts once.
    """

    work: list[Work] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products and convolutions."""
        return sum(one.flops for one in self.work)

    @property
    def bytes(self) -> float:
        """Bytes read from and written to main memory."""
        return sum(one.bytes for one in self.work)

    @property
    def cycles(self) -> float:
        """The compiler's estimate of cycles; 0 if it states none."""
        return sum(one.cycles for one in self.work)

    def by_collective(self) -> dict[str, Collective]:
        """The collectives of each kind and size of group, added up: "all-reduce", "all-reduce among 2"."""
        found: dict[str, Collective] = {}
        for one in self.collectives:
            name = f"{one.kind} among {len(one.group)}" if one.group else one.kind
            before = found.get(name, replace(one, count=0, bytes=0.0))
            found[name] = replace(before, count=before.count + one.count, bytes=before.bytes + one.bytes)
        return found


def analyse(text: str, trips: Trips = lambda name: None) -> Analysis:
    """Analyses the text of a compiled program (``compiled.as_text()``), for one device.

    Args:
        text: the program.
        trips: how often loops of unknown length run.
    """
    module = parse(text)
    analysis = Analysis()
    _walk(module, module.computations[module.entry], 1, trips, analysis)
    return analysis


def _walk(module: Module, computation: Computation, count: int, trips: Trips, into: Analysis) -> None:
    if not count:
        return
    fused: set[str] = set()
    for one in computation.instructions.values():
        kind = one.opcode.removesuffix("-start")
        if one.opcode == "while":
            known = trip_count(module, computation, one)
            times = trips(one.op_name) if known is None else known
            if times is None:
                into.unknown_loops.append(one.op_name)
                times = 1
            _walk(module, module.computations[one.called["body"][0]], count * times, trips, into)
        elif one.opcode == "conditional":
            _walk_largest(module, one, count, trips, into)
        elif one.opcode in ("call", "async-start"):
            for name in one.called.get("to_apply", ()) + one.called.get("calls", ()):
                _walk(module, module.computations[name], count, trips, into)
        elif one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            continue
        else:
            if one.opcode == "fusion":
                _fused_collectives(module, one, count, fused, into)
            elif kind in COLLECTIVES:
                into.collectives.append(_collective(computation, one, count))
            if one.opcode in _TO_HOST or (one.opcode == "custom-call" and "callback" in one.attributes):
                into.host.append(one.op_name or one.name)
            flops, passes = _arithmetic(module, computation, one)
            traffic = traffic_of(module, computation, one)
            cycles = float(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            if flops or traffic or cycles:
                into.work.append(
                    Work(
                        one.name, one.opcode, one.op_name, count, count * flops, passes, count * traffic, count * cycles
                    )
                )


def _collective(computation: Computation, one: Instruction, count: int) -> Collective:
    sent = sum(shape.bytes for shape in _operand_shapes(computation, one))
    return Collective(one.opcode.removesuffix("-start"), count, float(count * sent), _group(one))


def _group(one: Instruction) -> tuple[int, ...]:
    """The first group of devices of a collective; empty if there is only one, of all devices."""
    listed = one.attribute(r"replica_groups=\{(\{[0-9,{} ]*\})\}")
    if listed is not None:
        groups = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([0-9, ]+)\}", listed)]
        return tuple(groups[0]) if len(groups) > 1 else ()
    # The numbers of the devices, reshaped to [dims], transposed, and reshaped to [groups, devices of a group].
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", one.attributes)
    if found is None or int(found[1]) == 1:
        return ()
    dims = [int(size) for size in found[3].split(",")]
    axes = [int(axis) for axis in found[4].split(",")] if found[4] else None
    numbers = np.arange(math.prod(dims)).reshape(dims).transpose(axes).reshape(-1)
    return tuple(numbers[: int(found[2])].tolist())


def _fused_collectives(module: Module, fusion: Instruction, count: int, fused: set[str], into: Analysis) -> None:
    """Collectives within a fusion (TPU). Parts of an asynchronous one, which have one channel, count once.

    Args:
        module: the program.
        fusion: the fusion.
        count: how often it is executed.
        fused: the channels of this computation that were counted.
        into: where the collectives go.
    """
    inside = module.computations[fusion.called["calls"][0]]
    for one in inside.instructions.values():
        if one.opcode == "fusion":
            _fused_collectives(module, one, count, fused, into)
        elif one.opcode.removesuffix("-start") in COLLECTIVES:
            channel = one.attribute(r"channel_id=(\d+)") or f"{inside.name} {one.name}"
            if channel not in fused:
                fused.add(channel)
                into.collectives.append(_collective(inside, one, count))


def _walk_largest(module: Module, one: Instruction, count: int, trips: Trips, into: Analysis) -> None:
    """The branch with the most arithmetic, then the most traffic."""
    names = [
        name
        for key in ("branch_computations", "true_computation", "false_computation")
        for name in one.called.get(key, ())
    ]
    branches = []
    for name in names:
        branches.append(Analysis())
        _walk(module, module.computations[name], count, trips, branches[-1])
    largest = max(branches, key=lambda branch: (branch.flops, branch.bytes, branch.cycles), default=Analysis())
    into.work += largest.work
    into.unknown_loops += largest.unknown_loops
    for branch in branches:  # a collective or a callback in any branch must be seen
        into.host += branch.host
    into.collectives += largest.collectives


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a ``while`` runs, as XLA states it or as its condition ``i < constant`` says; None: not known.

    XLA also writes ``constant > i``, and ``<=`` and ``>=``.
    """
    stated = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if stated is not None:
        return int(stated)
    condition = module.computations[loop.called["condition"][0]]
    found = _compared(module, condition)
    if found is None:
        return None
    index, limit = found
    start = _constant(_element(computation, loop, index))
    step = _step(module, module.computations[loop.called["body"][0]], index)
    if start is None or not step:
        return None
    return max(0, -(-(limit - start) // step))


def _compared(module: Module, condition: Computation) -> tuple[int, int] | None:
    """(index in the state, limit) of a condition that compares one counter with a constant."""
    root, inside = condition.root, condition
    bound: dict[str, Instruction | None] = {}
    if root.opcode == "fusion":
        inside = module.computations[root.called["calls"][0]]
        bound = {
            parameter.name: condition.instructions.get(operand)
            for parameter, operand in zip(inside.parameters, root.operands, strict=False)
        }
        root = inside.root
    direction = root.attribute(r"direction=(\w+)")
    if root.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE"):
        return None
    left, right = (bound.get(name) or inside.instructions.get(name) for name in root.operands)
    if direction in ("GT", "GE"):
        left, right = right, left
    limit = _constant(right)
    if limit is not None and direction in ("LE", "GE"):
        limit += 1
    if left is None or limit is None or left.opcode != "get-tuple-element":
        return None
    return int(left.attribute(r"index=(\d+)") or 0), limit


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.arguments):
        return None
    return int(one.arguments)


def _element(computation: Computation, loop: Instruction, index: int) -> Instruction | None:
    """The instruction that gives an element of a loop's first state."""
    state = computation.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    one = computation.instructions.get(state.operands[index])
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = computation.instructions.get(one.operands[0])
    return one


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a loop adds to its counter."""
    root = body.root
    if root.opcode != "tuple":
        return None
    one, inside = body.instructions.get(root.operands[index]), body
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = inside.instructions.get(one.operands[0])
    bound: dict[str, Instruction | None] = {}
    if one is not None and one.opcode == "fusion":
        inside = module.computations[one.called["calls"][0]]
        bound = {
            parameter.name: body.instructions.get(operand)
            for parameter, operand in zip(inside.parameters, one.operands, strict=False)
        }
        one = inside.root
    if one is None or one.opcode != "add":
        return None
    steps = [_constant(bound.get(name) or inside.instructions.get(name)) for name in one.operands]
    return next((step for step in steps if step is not None), None)


def _operand_shapes(computation: Computation, one: Instruction) -> list[Shape]:
    found = (computation.instructions.get(name) for name in one.operands)
    return [shape for operand in found if operand is not None for shape in operand.result]


def _arithmetic(module: Module, computation: Computation, one: Instruction) -> tuple[float, int]:
    """FLOPs of matrix products and convolutions, and the passes of the matrix unit."""
    if one.opcode == "fusion":
        inside = module.computations[one.called["calls"][0]]
        parts = [_arithmetic(module, inside, part) for part in inside.instructions.values()]
        # Nearly always one product per fusion; of several, the passes are weighted by their FLOPs.
        flops = sum(part for part, _ in parts)
        return flops, round(sum(part * passes for part, passes in parts) / flops) if flops else 1
    if one.opcode == "dot":
        return _dot(computation, one), _passes(computation, one)
    if one.opcode == "convolution" or (one.opcode == "custom-call" and "dim_labels=" in one.attributes):
        return _convolution(computation, one), _passes(computation, one)
    if one.opcode == "custom-call" and '"lhs_contracting_dimensions"' in one.attributes:  # cuBLAS
        dims = one.attribute(r'"lhs_contracting_dimensions":(\[[^\]]*\])') or "[]"
        left = _operand_shapes(computation, one)[0].dims
        return 2.0 * one.result[0].elements * math.prod(left[int(dim)] for dim in json.loads(dims)), 1
    return 0.0, 1


def _passes(computation: Computation, one: Instruction) -> int:
    """Passes of the matrix unit of a TPU for one product."""
    if not any(shape.dtype == "f32" for shape in _operand_shapes(computation, one)):
        return 1
    precision = one.attribute(r"operand_precision=\{(\w+)") or "default"
    return {"default": 1, "high": 3, "highest": 6}.get(precision, 1)


def _dot(computation: Computation, one: Instruction) -> float:
    left = _operand_shapes(computation, one)[0].dims
    contracted = one.attribute(r"lhs_contracting_dims=\{([0-9,]*)\}") or ""
    return 2.0 * one.result[0].elements * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)


def _convolution(computation: Computation, one: Instruction) -> float:
    """2 x multiplications of a convolution; those by the zeros of padding and dilation do not count.

    XLA for TPU writes matrix products as convolutions, and batches of them as dilated ones.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None
    left, right = (shape.dims for shape in _operand_shapes(computation, one)[:2])
    result = one.result[0].dims
    count = result[labels[3].index("b")] * result[labels[3].index("f")] * right[labels[2].index("i")]
    count //= int(one.attribute(r"batch_group_count=(\d+)") or 1)
    window = _window(one.attribute(r"window=\{([^}]*)\}") or "")
    for dim in (label for label in labels[3] if label.isdigit()):
        count *= _valid(
            left[labels[1].index(dim)], right[labels[2].index(dim)], result[labels[3].index(dim)], window, int(dim)
        )
    return 2.0 * count


def _window(text: str) -> dict[str, list[list[int]]]:
    fields = (part.split("=") for part in text.split())
    return {key: [[int(number) for number in one.split("_")] for one in value.split("x")] for key, value in fields}


def _valid(size: int, kernel: int, result: int, window: dict[str, list[list[int]]], dim: int) -> int:
    """The number of (place of the result, place of the kernel) pairs that read an element of the input."""

    def of(name: str, default: int) -> int:
        return window[name][dim][0] if name in window else default

    stride, before = of("stride", 1), of("pad", 0)
    spread, apart = of("lhs_dilate", 1), of("rhs_dilate", 1)
    last = (size - 1) * spread
    pairs = 0
    for place in range(kernel):
        # Places p with 0 <= p * stride + offset <= last, a multiple of the dilation.
        offset = place * apart - before
        if spread == 1:
            first = max(0, -(offset // stride))
            end = min(result - 1, (last - offset) // stride)
            pairs += max(0, end - first + 1)
        else:
            pairs += sum(
                0 <= p * stride + offset <= last and (p * stride + offset) % spread == 0 for p in range(result)
            )
    return pairs


def traffic_of(module: Module, computation: Computation, one: Instruction) -> float:
    """Bytes of main memory that an instruction reads and writes.

    Slices and gathers read what they return, updates in place write what is new.
    """
    operands = [computation.instructions.get(name) for name in one.operands]
    main = [sum(shape.main_bytes for shape in operand.result) if operand else 0 for operand in operands]
    written = sum(shape.main_bytes for shape in one.result)
    match one.opcode:
        case "fusion":
            return _fusion_traffic(module.computations[one.called["calls"][0]], main, one)
        case "dynamic-slice" | "slice" | "gather":
            return min(main[0], written) + written + sum(main[1:])
        case "dynamic-update-slice":
            return 2.0 * main[1] if main[0] else main[1]
        case "scatter":
            updates = sum(main[1:])
            return min(updates + main[-1], written + updates) if main[0] else updates
        case "slice-start":  # the result is (the operand, the slice, a flag)
            part = one.result[1]
            return (part.padded_bytes if main[0] else 0) + part.main_bytes
        case "copy-start":
            return main[0] + one.result[0].main_bytes
        case "broadcast" | "iota":
            return written + sum(main)
    return written + sum(main)


def _fusion_traffic(inside: Computation, main: list[int], fusion: Instruction) -> float:
    total = 0.0
    for parameter, size in zip(inside.parameters, main, strict=False):
        total += min(size, _read(inside, parameter, size))
    root = inside.root
    parts = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, fusion.result, strict=False):
        total += min(shape.main_bytes, _written(inside, part, shape.main_bytes))
    return total


def _read(inside: Computation, value: Instruction, size: int) -> float:
    """Bytes of a value that the instructions of a fusion read."""
    total = 0.0
    for user in inside.users.get(value.name, []):
        if user.opcode == "bitcast":
            total += _read(inside, user, size)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += sum(shape.padded_bytes for shape in user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # in place
        else:
            return size
    return total


def _written(inside: Computation, value: Instruction, size: int) -> float:
    """Bytes that a fusion writes for one of its results."""
    while value.opcode == "bitcast":
        value = inside.instructions[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
        update = inside.instructions[value.operands[1]]
        return sum(shape.padded_bytes for shape in update.result)
    return size
