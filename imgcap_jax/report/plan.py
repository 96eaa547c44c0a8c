"""The text of a plan."""

from collections.abc import Mapping, Sequence

from imgcap_jax.errors import counted
from imgcap_jax.plan.feed import FeedPlan
from imgcap_jax.plan.hlo import Collective
from imgcap_jax.plan.plan import Plan, Planned
from imgcap_jax.plan.roofline import HOST, LINKS, MATRIX, MEMORY
from imgcap_jax.report.columns import aligned


def lines(plan: Plan, name: str) -> list[str]:
    """The lines that ``imgcap plan`` prints. ``name`` is that of the experiment."""
    chip, devices = plan.topology.chip, len(plan.topology.devices)
    unit = "device" if chip.measured or chip.cores > 1 else "chip"
    known = "measured here" if chip.measured else "published"
    found = [
        f"{name} on {plan.topology.name}: {counted(devices, unit)} ({chip.name})",
        f"Compiled by {plan.topology.compiler}, not run: all times are estimates.",
        f"Per {unit} ({known}): {chip.flops / 1e12:.3g} TFLOP/s, {chip.memory / 1e9:.3g} GB at "
        f"{chip.bandwidth / 1e9:.4g} GB/s"
        + (f", links of {chip.link / 1e9:.3g} GB/s in each direction" if chip.link and devices > 1 else ""),
        *(f"Assumed: {one}" for one in plan.assumptions),
        "",
        *_table(list(plan.programs.values()), unit),
        *(f"{program}: {why}" for program, why in plan.rejected.items()),
        "",
        *(line for one in plan.programs.values() if one.program.feed for line in feed_lines(one.program.feed, unit)),
        *_training(plan, unit),
    ]
    for one in plan.programs.values():
        title = one.program.name
        if one.time.parts[LINKS] is None:
            found.append(f"{title}: the speed of the links is not known; collectives are not part of the times")
        found += [f"{title}: it calls the host ({call})" for call in one.analysis.host]
        unknown = len(one.analysis.unknown_loops)
        if unknown:
            found.append(f"{title}: {counted(unknown, 'loop')} of unknown length counted once")
    return found


def _table(programs: Sequence[Planned], unit: str) -> list[str]:
    rows = [[f"per {unit}", *(one.program.name for one in programs)]]

    def row(title: str, cells: Sequence[str]) -> None:
        rows.append([title, *cells])

    memory = [one.program.memory for one in programs]
    row(f"images per call, all {unit}s", [f"{one.program.images:,}" for one in programs])
    row("arguments, GB", [f"{one.arguments / 1e9:.3f}" for one in memory])
    row("temporaries, GB", [f"{one.temporaries / 1e9:.3f}" for one in memory])
    row("memory in all, GB", [f"{one.total / 1e9:.3f}" for one in memory])
    row("fits", ["yes" if one.fits else "no" for one in programs])
    row("GFLOP of products", [f"{one.analysis.flops / 1e9:,.1f}" for one in programs])
    row("main-memory traffic, GB", [f"{one.analysis.bytes / 1e9:.3f}" for one in programs])
    row("collectives", [_collectives(one.analysis.by_collective()) for one in programs])
    for part in (MATRIX, MEMORY, LINKS, HOST):
        row(f"{part}, ms", [_milliseconds(one.time.parts[part]) for one in programs])
    row("lower bound of time, ms", [f"{1e3 * one.time.roofline:.3f}" for one in programs])
    row("bound by", [one.time.bound for one in programs])
    if any(one.time.cycles is not None for one in programs):
        row("compiler's estimate of time, ms", [_milliseconds(one.time.cycles) for one in programs])
    row(f"images/s, all {unit}s", [f"{one.images_per_second:,.0f}" for one in programs])
    row("seconds to compile", [f"{one.program.seconds:.0f}" for one in programs])
    return aligned(rows, left=(0,))


def _milliseconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{1e3 * seconds:.3f}"


def _collectives(found: Mapping[str, Collective]) -> str:
    return "; ".join(f"{one.count} {name}, {one.bytes / 1e6:.1f} MB" for name, one in found.items()) or "none"


def feed_lines(feed: FeedPlan, unit: str) -> list[str]:
    """The lines that say where batches come from."""
    if not feed.bytes:
        return []
    size = f"Features of all training images: {feed.bytes / 1e9:.2f} GB"
    if feed.shards is None:
        return [f"{size}, on the host, which sends each batch" + (f" ({feed.note})" if feed.note else "")]
    if feed.shards == 1:
        return [f"{size}, in the memory of each {unit}"]
    return [f"{size}, split over groups of {feed.shards} {unit}s: {feed.resident / 1e9:.2f} GB in the memory of each"]


def _time(hours: float) -> str:
    for size, unit in ((1.0, "hours"), (60.0, "minutes")):
        if hours * size >= 1:
            return f"{hours * size:.1f} {unit}"
    return f"{3600 * hours:.2g} seconds"


def _training(plan: Plan, unit: str) -> list[str]:
    hours = plan.hours
    if hours is None:
        return []
    found = [
        f"Training: {plan.epochs:g} epochs, {counted(plan.steps, 'step')}, about {_time(hours)}, without validations "
        "and features"
    ]
    filling = plan.filling
    if filling is None:
        return found
    if filling.images is None:
        found.append(f"The batch that would fill the memory of a {unit} is not estimated: {filling.why}")
    else:
        first, second = filling.basis
        found.append(
            f"A batch of about {counted(filling.images, 'image')} per {unit} would fill its memory (extrapolated from "
            f"{first} and {second})"
        )
    return found
