"""The time of a program from what it does and what a chip can do: an estimate, because nothing is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgcap_jax.plan.chips import HOST_BANDWIDTH, Chip, Slice
from imgcap_jax.plan.hlo import Analysis, Collective

MATRIX, MEMORY, LINKS, HOST = "matrix unit", "main memory", "interconnect", "host feed"


@dataclass(frozen=True)
class Estimate:
    """Seconds per call of a program on one chip.

    Attributes:
        parts: the least time of each resource alone; None: not known.
        roofline: a lower bound of the time: per instruction, the longer of arithmetic and memory traffic, and then the
            collectives, if their time is known; or the host feed, if that takes longer.
        cycles: the time by the compiler's own estimate of each instruction, and the collectives; None if it has none.
        bound: the resource that takes the longest.
    """

    parts: Mapping[str, float | None]
    roofline: float
    cycles: float | None
    bound: str

    @property
    def seconds(self) -> float:
        """The best estimate: the compiler's, if it is there, but at least the lower bound."""
        return max(self.roofline, self.cycles or 0.0)


def estimate(analysis: Analysis, chip: Chip, slice: Slice | None, devices: int, fed_bytes: float) -> Estimate:
    """The time of one call.

    Args:
        analysis: of the program of one device.
        chip: the figures of one device.
        slice: where the devices are; None: not known.
        devices: the number of devices.
        fed_bytes: what the host sends to one device per call.
    """
    arithmetic, traffic, longer = 0.0, 0.0, 0.0
    for one in analysis.work:
        products = one.flops * (one.passes if chip.bfloat16_passes else 1) / chip.flops
        moved = one.bytes / chip.bandwidth
        arithmetic, traffic, longer = arithmetic + products, traffic + moved, longer + max(products, moved)
    links = collective_seconds(analysis.collectives, chip, slice, devices)
    # Virtual devices of a CPU are the machine that feeds them.
    host = 0.0 if chip.measured else fed_bytes / HOST_BANDWIDTH
    parts = {MATRIX: arithmetic, MEMORY: traffic, LINKS: links, HOST: host}
    cycles = analysis.cycles / chip.clock + (links or 0.0) if chip.clock and analysis.cycles else None
    return Estimate(parts, max(longer + (links or 0.0), host), cycles, max(parts, key=lambda name: parts[name] or 0.0))


def collective_seconds(
    collectives: Sequence[Collective], chip: Chip, slice: Slice | None, devices: int
) -> float | None:
    """Seconds of collectives; None: the links between the devices are not known.

    Each device sends its share over all links of its group, both directions at once. In a group of n, an all-reduce
    sends 2 (n - 1) / n of its bytes, an all-gather n - 1 times its bytes, the others (n - 1) / n. Latency is not
    counted, and neither are groups of devices of the same chip, which use no links.
    """
    total = 0.0
    for one in collectives:
        size = len(one.group) or devices
        if size < 2:
            continue
        links = None if slice is None else slice.links(chip, one.group)
        if links == 0:
            continue
        if not links or not chip.link:
            return None
        share = (size - 1) / size if one.kind != "all-gather" else size - 1
        total += one.bytes * share * (2 if one.kind == "all-reduce" else 1) / (links * chip.link)
    return total
