"""Figures of accelerator chips, as their makers publish them, and of the devices of this machine, measured.

Peak FLOP/s, memory bandwidth and interconnect are those of Google's pages, of which copies were read in November 2026:

- v4: https://cloud.google.com/tpu/docs/v4 (275 TFLOP/s, 1200 GB/s); its interconnect: Jouppi et al. 2023
  (arXiv:2304.01433), 6 links of 50 GB/s in each direction.
- v5e: https://cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 819 GB/s, ICI 400 GB/s in both directions over 4 ports).
- v5p: https://cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 2765 GB/s, ICI 1200 GB/s in both directions, 3D torus).
- v6e: https://cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 1600 GB/s, ICI 800 GB/s in both directions over 4 ports).
  Its earlier versions and the page of TPU7x state 1640 and 1638 GB/s.
- TPU7x: https://docs.cloud.google.com/tpu/docs/tpu7x (2307 TFLOP/s, 7380 GB/s, ICI 1200 GB/s in both directions).

The memory is what a program may take: the limit with which the compiler (libtpu 0.0.52) refuses larger ones. Google
states 32 GiB (v4), 16 GB (v5e), 95 GiB (v5p), 32 GB (v6e) and 192 GiB (TPU7x).

The clock converts the compiler's cycles to time. It is derived: peak = clock x 2 x matrix units x their side squared.
A chip has 8 (v4, v5p) or 4 (v5e, v6e) matrix units with a side of 128 (v4, v5e, v5p) or 256 (v6e). Google's page gives
v6e 2 units, and earlier versions of it 4: the compiler estimates 369,231 FLOP per cycle for a product of bfloat16
matrices of 8,192 x 8,192, and 2 units can do 262,144.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

HOST_BANDWIDTH = 10e9
"""Bytes/s from the host to one chip: an assumption. PCIe 3 x16 moves at most 16 GB/s."""


@dataclass(frozen=True)
class Chip:
    """One device that runs a program: a chip, or a core of a chip whose cores are separate devices.

    Attributes:
        name: its name.
        flops: bfloat16 FLOP/s of the matrix units.
        memory: bytes of main memory that programs can use.
        bandwidth: bytes/s of main memory.
        link: bytes/s of one interconnect link in one direction; 0: not known.
        torus: the sizes of axes that have wrap-around links, see ``Slice.links``.
        cores: devices per chip.
        clock: Hz; 0: not known.
        bfloat16_passes: whether products of float32 take several passes (TPU).
        measured: whether the figures were measured on this machine.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    torus: Literal["none", "16", "cubes"] = "none"
    cores: int = 1
    clock: float = 0.0
    bfloat16_passes: bool = True
    measured: bool = False

    def per_device(self, cores: int) -> "Chip":
        """The share of one of this number of devices per chip."""
        share = {name: getattr(self, name) / cores for name in ("flops", "memory", "bandwidth")}
        return replace(self, **share, link=self.link / cores, cores=cores)


# By the name that JAX gives the devices (``device_kind``).
_GIB = 2.0**30
CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, 30.5 * _GIB, 1200e9, 50e9, "cubes", clock=1.05e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 15.75 * _GIB, 819e9, 50e9, "16", clock=1.5e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95.73 * _GIB, 2765e9, 100e9, "cubes", clock=1.75e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 31.24 * _GIB, 1600e9, 100e9, "16", clock=1.75e9),
    "TPU7x": Chip("TPU7x", 2307e12, 189.48 * _GIB, 7380e9, 100e9, "cubes"),
}


def measured_chip(device: jax.Device, dtype: Any, devices: int) -> Chip:
    """The figures of a device of this machine, measured in about a second.

    Args:
        device: the device.
        dtype: type of the matrix products.
        devices: the number of devices that share the machine's memory, if it is a CPU.
    """
    flops, bandwidth = _product_rate(device, dtype), _copy_rate(device)
    stats = device.memory_stats() or {}
    memory = float(stats.get("bytes_limit", 0)) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Chip(device.device_kind, flops, memory, bandwidth, bfloat16_passes=False, measured=True)


def _product_rate(device: jax.Device, dtype: Any) -> float:
    size = 1024 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a: a @ a)
    return 2.0 * size**3 / _seconds(lambda: product(a))


def _copy_rate(device: jax.Device) -> float:
    a = jax.device_put(jnp.ones(2**26, jnp.float32), device)  # 256 MiB
    copy = jax.jit(lambda a: a + 1)
    return 2.0 * a.nbytes / _seconds(lambda: copy(a))


def _seconds(run: Callable[[], Any]) -> float:
    """The shortest of five times, after a first one for compilation."""
    found = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found[1:])


@dataclass(frozen=True)
class Slice:
    """The chips of a slice.

    Attributes:
        shape: the number of chips along each axis.
        coordinates: where each device is along these axes.
    """

    shape: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]

    def links(self, chip: Chip, members: Sequence[int] = ()) -> int:
        """The links per chip that these devices use together, in each direction: one per axis, two on a ring.

        An axis is a ring if it has wrap-around links and the devices fill it. On v5e and v6e, these are axes of 16
        (https://jax-ml.github.io/scaling-book/tpus). v4, v5p and TPU7x consist of cubes of 4 x 4 x 4 chips, and slices
        of whole cubes are tori (https://cloud.google.com/tpu/docs/v5p).

        Args:
            chip: the figures of a device.
            members: the numbers of the devices; empty: all of them.
        """
        inside = [self.coordinates[number] for number in members] if members else self.coordinates
        cubes = len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)
        found = 0
        for axis, size in enumerate(self.shape):
            extent = len({place[axis] for place in inside})
            wrapped = cubes if chip.torus == "cubes" else chip.torus == "16" and size == 16
            found += 0 if extent < 2 else 2 if wrapped and extent == size else 1
        return found
