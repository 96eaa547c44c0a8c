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
INSTALL = 'pip install "jax[tpu]"'
"""Installs libtpu, the TPU compiler, in the version that the installed JAX asks for."""
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
        name: "local", or a TPU generation and the shape of a slice: "v5e:2x2", "v6e:4x4", "v5p:2x2x1".
        dtype: type of the products by which local devices are measured.

    Raises:
        UserError: libtpu is not installed, or it does not know the topology.
    """
    if name == LOCAL:
        local = jax.devices()
        chip = measured_chip(local[0], dtype, len(local))
        return Topology(name, local, chip, None, f"jax {jax.__version__}")
    if not re.fullmatch(r"\w+:\d+(x\d+)*", name):
        raise UserError(f"--topology {name!r} is malformed; use local, or a slice such as v5e:4x4 or v5p:2x2x1")
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
    shape = tuple(int(size) for size in name.partition(":")[2].split("x"))
    chips = math.prod(shape)
    first: Any = devices[0]
    kind: str = first.device_kind
    if kind not in CHIPS:
        raise UserError(f"--topology {name}: the figures of {kind} are not known; use one of {', '.join(CHIPS)}")
    chip = CHIPS[kind].per_device(max(1, len(devices) // chips))
    of_tpu: Sequence[Any] = devices
    places = tuple(tuple(device.coords[: len(shape)]) for device in of_tpu)
    return Topology(name, devices, chip, Slice(shape, places), f"jax {jax.__version__}, libtpu {version('libtpu')}")
