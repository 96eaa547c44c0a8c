"""Shared code of the benchmarks: interleaved rounds, the plain matmul rate, the sizes of decoders."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Thing = Callable[[], Any]


def medians(things: Mapping[str, Thing], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over interleaved rounds, without a first round for compilation."""
    times: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, thing in things.items():
            start = time.perf_counter()
            thing()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul(dtype: str, size: int = 2048, count: int = 20) -> tuple[Thing, float]:
    """A function that computes ``count`` square matrix products, about as long as a step, and its FLOPs."""
    a = jnp.asarray(np.random.default_rng(0).random((size, size)), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)

    def run() -> None:
        for _ in range(count):
            result = product(a)
        jax.block_until_ready(result)

    return run, 2.0 * count * size**3


def decoder_sizes(options: argparse.Namespace, *, batch: int) -> dict[str, int]:
    """The sizes of a decoder benchmark by shape letter. ``batch`` is the default number of images."""
    sizes = {"T": 22, "D": 1280, "H": 512, "V": options.vocabulary, "N": options.regions}
    return sizes | {"B": options.batch or batch, "M": options.captions}
