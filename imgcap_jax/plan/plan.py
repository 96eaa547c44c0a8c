"""The plan of an experiment on a machine: its programs, what they need, and how long they take."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import Experiment
from imgcap_jax.plan.datasets import Sizes
from imgcap_jax.plan.hlo import Analysis, analyse
from imgcap_jax.plan.programs import Program, Programs, UnreadableError, has_encoder
from imgcap_jax.plan.roofline import Estimate, estimate
from imgcap_jax.plan.topology import INSTALL, Topology
from imgcap_jax.terminal import Say, working


@dataclass(frozen=True)
class Planned:
    """One program: what it needs and does on one device, and the estimate of its time."""

    program: Program
    analysis: Analysis
    time: Estimate
    fits: bool

    @property
    def images_per_second(self) -> float:
        """Images per second of all devices together."""
        return self.program.images / self.time.seconds if self.time.seconds else 0.0

    def results(self) -> dict[str, Any]:
        """All figures, for JSON."""
        memory = self.program.memory
        return {
            "images_per_call": self.program.images,
            "fits": self.fits,
            "memory_bytes": {**asdict(memory), "total": memory.total},
            "flops": self.analysis.flops,
            "flops_of_xla": self.program.flops,
            "main_memory_bytes": self.analysis.bytes,
            "collectives": {
                name: {"count": one.count, "bytes": one.bytes} for name, one in self.analysis.by_collective().items()
            },
            "feed": None if self.program.feed is None else asdict(self.program.feed),
            "fed_bytes": self.program.fed_bytes,
            "host_calls": self.analysis.host,
            "loops_counted_once": sorted(set(self.analysis.unknown_loops)),
            "seconds": {
                **self.time.parts,
                "roofline": self.time.roofline,
                "compiler": self.time.cycles,
                "estimate": self.time.seconds,
            },
            "bound_by": self.time.bound,
            "images_per_second": self.images_per_second,
            "compile_seconds": self.program.seconds,
        }


@dataclass(frozen=True)
class Filling:
    """The batch size with which the training step would fill the memory of a device.

    Attributes:
        images: images per device, extrapolated; None: it could not be estimated.
        basis: the images per device of the programs from which it is extrapolated.
        why: why it could not be estimated; otherwise "".
    """

    images: int | None
    basis: tuple[int, ...]
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """The plan of an experiment.

    Attributes:
        topology: the devices.
        programs: the programs, the training step first.
        rejected: program -> why it cannot be compiled, such as too little memory.
        steps: training steps of the whole experiment. epochs: its epochs.
        filling: the batch size that would fill a device; None: the training step is not part of the plan.
        assumptions: one line each.
    """

    topology: Topology
    programs: Mapping[str, Planned]
    rejected: Mapping[str, str]
    steps: int
    epochs: float
    filling: Filling | None
    assumptions: tuple[str, ...]

    @property
    def hours(self) -> float | None:
        """Hours of all training steps, without validations and features; None: the step cannot be compiled."""
        step = self.programs.get("training step")
        return None if step is None else self.steps * step.time.seconds / 3600

    def results(self) -> dict[str, Any]:
        """Everything, for JSON."""
        chip = asdict(self.topology.chip)
        return {
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "chip": chip,
            "compiler": self.topology.compiler,
            "compiled_not_run": True,
            "assumptions": list(self.assumptions),
            "programs": {name: one.results() for name, one in self.programs.items()},
            "rejected": dict(self.rejected),
            "training": {"steps": self.steps, "epochs": self.epochs, "hours": self.hours},
            "images_per_device_that_fill_memory": None if self.filling is None else self.filling.images,
            "filling_not_estimated": None if self.filling is None else self.filling.why or None,
        }


PROGRAMS = {"training": "training step", "search": "validation search", "encoder": "encoder"}
"""The programs of a plan: the name of each on the command line, and its title."""


def to_compile(experiment: Experiment, programs: Collection[str]) -> list[str]:
    """Those of ``programs`` that the experiment has, in the order in which they are compiled.

    Raises:
        UserError: it has none of them.
    """
    found = [name for name in PROGRAMS if name in programs and (name != "encoder" or has_encoder(experiment))]
    if not found:
        raise UserError("--programs encoder: the experiment stores no features of an encoder; leave out encoder")
    return found


def make_plan(
    experiment: Experiment,
    sizes: Sizes,
    topology: Topology,
    *,
    words: float,
    programs: Collection[str] = tuple(PROGRAMS),
    say: Say | None = None,
) -> Plan:
    """Compiles an experiment's programs for a topology. Nothing is run.

    Args:
        experiment: what is planned.
        sizes: of its data.
        topology: the devices.
        words: mean words per caption, without eos.
        programs: those to compile, of ``PROGRAMS``.
        say: see ``working``.

    Raises:
        UserError: the experiment's parts do not go together, or no program can be compiled.
    """
    with working("building the programs", say=say):
        known = Programs(experiment, sizes, topology.devices, memory=topology.chip.memory, words=words)
    planned: dict[str, Planned] = {}
    rejected: dict[str, str] = {}
    found: Program | None
    compilers: dict[str, Callable[[], Program | None]] = {
        "training": known.training_step,
        "search": known.search,
        "encoder": known.encoder,
    }
    for key in to_compile(experiment, programs):
        name, compile_program = PROGRAMS[key], compilers[key]
        with working(f"compiling the {name}", say=say):
            try:
                found = compile_program()
            except jax.errors.JaxRuntimeError as error:
                rejected[name] = _why(error)
                continue
            except UnreadableError as error:
                rejected[name] = (
                    f"compiled, {error.memory.total / 1e9:.3f} GB in all, but JAX cannot read the program of a "
                    f"libtpu of another version; install the one that JAX asks for: {INSTALL}"
                )
                continue
        if found is not None:
            planned[name] = _planned(found, topology)
    if not planned:
        raise UserError(f"no program can be compiled for {topology.name}: {next(iter(rejected.values()))}")
    filling = None
    if "training step" in planned:
        with working("estimating the batch size", say=say):
            filling = _filling(known, planned["training step"].program, topology)
    return Plan(
        topology,
        planned,
        rejected,
        known.total_steps,
        experiment.training.epochs,
        filling,
        (*sizes.assumptions, *known.assumptions),
    )


def _planned(program: Program, topology: Topology) -> Planned:
    analysis = analyse(program.text, program.trips)
    chip = topology.chip
    time = estimate(analysis, chip, topology.slice, len(topology.devices), program.fed_bytes)
    return Planned(program, analysis, time, program.memory.total <= chip.memory)


# The messages of libtpu 0.0.42 and 0.0.52.
_USED = re.compile(r"Used (?P<needed>[\d.]+\w?) of (?P<there>[\d.]+\w?) (?P<memory>\w+)")
_NEEDED = re.compile(r"\((?P<needed>[\d.]+\w?)\) exceeds available (?P<memory>\w+) \((?P<there>[\d.]+\w?)\)")


def _why(error: Exception) -> str:
    """The compiler's reason in one line."""
    text = " ".join(str(error).split())
    found = _USED.search(text) or _NEEDED.search(text)
    if found:
        return f"it does not fit: {found['needed']} of {found['there']} {found['memory']}"
    return text[:300]


def _filling(programs: Programs, program: Program, topology: Topology) -> Filling:
    """Extrapolates the memory of the training step linearly from two batch sizes."""
    devices, accumulate = programs.devices, programs.experiment.optimizer.accumulate
    first = program.images
    refused: list[str] = []
    for other in (2 * first, first // 2):
        if not other or other % (devices * accumulate):
            refused.append(f"a batch of {counted(other, 'image')} cannot be divided")
            continue
        try:
            memory = programs.training_step(other).memory
        except UnreadableError as error:
            memory = error.memory
        except jax.errors.JaxRuntimeError as error:
            refused.append(f"a batch of {counted(other, 'image')} cannot be compiled: {_why(error)}")
            continue
        basis = first // devices, other // devices
        per_image = (memory.total - program.memory.total) / (other - first) * devices
        if per_image <= 0:
            sizes = f"{program.memory.total / 1e9:.3f} and {memory.total / 1e9:.3f} GB"
            return Filling(None, basis, f"{basis[0]} and {basis[1]} images take {sizes}, which is no growth")
        fixed = program.memory.total - per_image * basis[0]
        most = int((topology.chip.memory - fixed) / per_image)
        step = 8 * accumulate if most >= 8 * accumulate else accumulate
        return Filling(max(0, most // step * step), basis)
    return Filling(None, (first // devices,), "; ".join(refused))
