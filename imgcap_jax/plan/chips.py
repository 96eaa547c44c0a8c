"""Figures of accelerator chips, as their makers publish them, and of the devices of this machine, measured.

Sources, per chip:

- v4: https://cloud.google.com/tpu/docs/v4; its interconnect: Jouppi et al. 2023 (arXiv:2304.01433), 6 links of 50 GB/s
  in each direction.
- v5e: https://cloud.google.com/tpu/docs/v5e
- v5p: https://cloud.google.com/tpu/docs/v5p
- v6e: https://cloud.google.com/tpu/docs/v6e
- TPU7x: https://docs.cloud.google.com/tpu/docs/tpu7x

The clock converts the compiler's cycles to time. It is derived: peak = clock x 2 x matrix units x their side squared.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        memory: bytes of main memory.
        bandwidth: bytes/s of main memory.
        link: bytes/s of one interconnect link in one direction; 0: not known.
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
    cores: int = 1
    clock: float = 0.0
    bfloat16_passes: bool = True
    measured: bool = False

    def per_device(self, cores: int) -> "Chip":
        """The share of one of this number of devices per chip."""
        share = {name: getattr(self, name) / cores for name in ("flops", "memory", "bandwidth")}
        return Chip(self.name, **share, link=self.link / cores, cores=cores, clock=self.clock)


# By the name that JAX gives the devices (``device_kind``).
CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * 2**30, 1200e9, 50e9, clock=1.05e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16e9, 819e9, 50e9, clock=1.5e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95e9, 2765e9, 100e9, clock=1.75e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32e9, 1640e9, 100e9, clock=1.75e9),
    "TPU7x": Chip("TPU7x", 2307e12, 192 * 2**30, 7380e9, 100e9),
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


def usable_links(shape: Sequence[int]) -> int:
    """The links per chip that a slice of this shape uses: one per axis of two chips, two per longer axis."""
    return sum(0 if size == 1 else 1 if size == 2 else 2 for size in shape)
