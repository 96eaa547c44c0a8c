"""The devices that a plan compiles for: those of this machine, or those of a TPU slice that need not exist."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from imgcap_jax.accelerators import WITHOUT_TPU
from imgcap_jax.errors import UserError
from imgcap_jax.files import reason
from imgcap_jax.plan.chips import CHIPS, Chip, Slice, measured_chip

LOCAL = "local"
INSTALL = 'pip install -c constraints.txt "jax[tpu]"'
"""Installs libtpu, the TPU compiler, in the version that the installed JAX asks for. To be run in a clone."""
_GENERATIONS = {chip.name.lower().removeprefix("tpu "): chip for chip in CHIPS.values()}
"""v4, v5e, v5p, v6e and tpu7x -> the figures of their chips."""
# The usual shape of each number of chips (https://cloud.google.com/tpu/docs/v5e, .../v6e, .../v4, .../v5p).
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# libtpu must also run next to programs that use a TPU.
_ENVIRONMENT = {**WITHOUT_TPU, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Topology:
    """Devices, the figures of one of them, and where they are; None if they are no slice."""

    name: str
    devices: Sequence[Any]
    chip: Chip
    slice: Slice | None
    compiler: str

    @property
    def platform(self) -> str:
        """The platform that is compiled for: tpu, gpu or cpu."""
        return self.devices[0].platform


def open_topology(name: str, dtype: Any = jnp.bfloat16) -> Topology:
    """The devices of a topology.

    Args:
        name: "local", or a TPU generation and the shape of a slice: "v5e:2x2", "v6e:4x4", "v5p:2x2x1"; or a type of
            Google Cloud: "v5litepod-8".
        dtype: type of the products by which local devices are measured.

    Raises:
        UserError: the topology is not known, or libtpu is not installed.
    """
    if name == LOCAL:
        local = jax.devices()
        chip = measured_chip(local[0], dtype, len(local))
        return Topology(name, local, chip, None, f"jax {jax.__version__}")
    name = slice_name(name)
    generation, _, sizes = name.partition(":")
    shape = tuple(map(int, sizes.split("x")))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name} needs the TPU compiler, which is not installed: {INSTALL}")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from importlib.metadata import version

    from jax.experimental import topologies

    devices: Sequence[Any]
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology {name}: the TPU compiler refuses it ({reason(error)}); use a slice such as v5e:2x2, "
            f"v5e:16x16, v6e:4x4 or v5p:2x2x1"
        ) from error
    chip = _GENERATIONS[generation].per_device(max(1, len(devices) // math.prod(shape)))
    of_tpu: Sequence[Any] = devices
    places = tuple(tuple(device.coords[: len(shape)]) for device in of_tpu)
    return Topology(name, devices, chip, Slice(shape, places), f"jax {jax.__version__}, libtpu {version('libtpu')}")


def slice_name(name: str) -> str:
    """The generation and the shape of a slice, as "v5e:2x4", also for a type of Google Cloud, as "v5litepod-8".

    Raises:
        UserError: ``name`` is malformed, or the generation or the type is not known.
    """
    if found := re.fullmatch(r"(v\w+)-(\d+)", name):
        return _slice_of_type(name, found[1].replace("v5litepod", "v5e"), int(found[2]))
    generation, _, sizes = name.lower().partition(":")
    if not re.fullmatch(r"\w+", generation) or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology {name!r} is malformed; use local, or a slice such as v5e:4x4 or v5p:2x2x1")
    _check_generation(name, generation)
    axes = 3 if _GENERATIONS[generation].torus == "cubes" else 2
    if sizes.count("x") != axes - 1:
        example = "2x2x1" if axes == 3 else "2x2"
        raise UserError(f"--topology {name}: slices of {generation} have {axes} axes, such as {generation}:{example}")
    return f"{generation}:{sizes}"


def _slice_of_type(name: str, generation: str, count: int) -> str:
    """The slice of a type of Google Cloud, whose number counts chips (v5litepod-N, v6e-N) or cores (v4-N, v5p-N)."""
    _check_generation(name, generation)
    cubic = _GENERATIONS[generation].torus == "cubes"
    cores = 2 if cubic else 1
    shapes = {cores * math.prod(map(int, shape.split("x"))): shape for shape in (_CUBIC if cubic else _FLAT)}
    if count not in shapes:
        example = _CUBIC[0] if cubic else _FLAT[1]
        prefix = name.rpartition("-")[0]
        known = ", ".join(f"{prefix}-{number}" for number in shapes)
        raise UserError(f"--topology {name}: known types are {known}; or give a slice, such as {generation}:{example}")
    return f"{generation}:{shapes[count]}"


def _check_generation(name: str, generation: str) -> None:
    if generation not in _GENERATIONS:
        raise UserError(
            f"--topology {name}: {generation} is not known; use a slice of {', '.join(_GENERATIONS)}, such as v5e:4x4 "
            f"or v5p:2x2x1"
        )
