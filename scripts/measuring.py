"""Shared code of the benchmarks: interleaved rounds, the plain matmul rate, the sizes and captions of decoders."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Thing = Callable[[], Any]
Name = TypeVar("Name")

PACKAGE = "imgcap_jax"
BEFORE = "before"  # the name of another checkout of it in reports
WORDS = 20
"""The maximum number of words per caption, without eos."""
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 4


class Row(NamedTuple):
    """One line of the table of results. None is what the benchmark does not measure."""

    benchmark: str
    case: str
    """What is timed: a training step, a search, a pause."""
    dtype: str
    milliseconds: float
    captions: float | None = None
    """Captions/s: words are predicted, sampled or searched for."""
    gflop: float | None = None
    """10^9 FLOPs of the model's matrix products. Products that are computed twice count once."""
    share: float | None = None
    """FLOP/s of the model, divided by the rate of plain matrix products of this type in the same rounds."""
    first: float | None = None
    """Seconds of the first call, most of which is compilation."""
    waited: float | None = None
    """The share of the time in which training waits for input."""
    memory: float | None = None
    """Peak memory of a device in GB, of the whole benchmark."""


_COLUMNS: dict[str, tuple[str, str]] = {
    "benchmark": ("benchmark", "{}"),
    "case": ("case", "{}"),
    "dtype": ("type", "{}"),
    "milliseconds": ("ms", "{:.4g}"),
    "captions": ("captions/s", "{:,.0f}"),
    "gflop": ("model GFLOP", "{:,.1f}"),
    "share": ("of matmul rate", "{:.3f}"),
    "first": ("first call, s", "{:.1f}"),
    "waited": ("input wait", "{:.1%}"),
    "memory": ("peak memory, GB", "{:.2f}"),
}


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table with aligned columns."""
    lines = [[title for title, _ in _COLUMNS.values()]]
    for row in rows:
        values = ((getattr(row, name), form) for name, (_, form) in _COLUMNS.items())
        lines.append(["" if value is None else form.format(value) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


class Times(NamedTuple):
    """Seconds of a candidate: wall-clock time, and CPU time of all threads, which depends less on other programs."""

    wall: float
    cpu: float


def times(things: Mapping[Name, Thing], rounds: int) -> dict[Name, Times]:
    """Median times of each candidate over interleaved rounds, without a first round for compilation.

    Every other round is in reverse order, so that a candidate does not always follow the same one.
    """
    found: dict[Name, list[Times]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name in list(things)[:: -1 if number % 2 else 1]:
            start = Times(time.perf_counter(), time.process_time())
            things[name]()
            if number:
                end = Times(time.perf_counter(), time.process_time())
                found[name].append(Times(end.wall - start.wall, end.cpu - start.cpu))
    return {name: Times(*map(statistics.median, zip(*of, strict=True))) for name, of in found.items()}


def medians(things: Mapping[Name, Thing], rounds: int) -> dict[Name, float]:
    """The wall-clock times of ``times`` in seconds."""
    return {name: found.wall for name, found in times(things, rounds).items()}


def at_precision(function: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    """The function, traced as training traces it: products of float32 arrays at full precision for float32."""

    def traced(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return function(*arguments)

    return traced


def first_call(thing: Thing, name: str) -> float:
    """Calls a candidate, which compiles it; returns the seconds."""
    print(f"compiling: {name} ...", flush=True)
    start = time.perf_counter()
    thing()
    return time.perf_counter() - start


def print_memory() -> float | None:
    """Prints and returns the largest peak memory of a device in GB, or None if no device reports it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    found = [peak for peak in peaks if peak is not None]
    if not found:
        print(f"peak memory: not reported by the {jax.default_backend()} backend")
        return None
    print(f"peak memory of a device: {max(found) / 1e9:.2f} GB")
    return max(found) / 1e9


def matmul(dtype: str, count: int = 20) -> tuple[Thing, float]:
    """A function that computes ``count`` square matrix products, and its FLOPs.

    The matrices are 2048 x 2048 on a CPU. Elsewhere they are 8192 x 8192, because starting a small product takes longer
    than the product.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.asarray(np.random.default_rng(0).random((size, size)), jnp.dtype(dtype))
    product = jax.jit(at_precision(lambda a: a @ a, dtype))

    def run() -> None:
        for _ in range(count):
            result = product(a)
        jax.block_until_ready(result)

    return run, 2.0 * count * size**3


def times_and_rate(things: Mapping[Name, Thing], options: argparse.Namespace) -> tuple[dict[Name, Times], float]:
    """``times`` of candidates, and the rate of plain matrix products in the same rounds, in FLOP/s.

    Args:
        things: the candidates.
        options: the number of rounds, and the dtype of the products.
    """
    product, flops = matmul(options.dtype)
    plain: Any = "plain matrix products"
    found = times({**things, plain: product}, options.rounds)
    return found, flops / found.pop(plain).wall


def print_machine() -> None:
    """Prints JAX's version, the devices and the rate of plain matrix products, which says how fast the machine is."""
    device = jax.devices()[0]
    product, flops = matmul("float32", count=5)
    rate = flops / medians({"matmul": product}, 5)["matmul"]
    print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind} ({device.platform})")
    print(
        f"plain matmul rate of this machine: {rate / 1e9:.0f} GFLOP/s (float32)",
        flush=True,
    )


def decoder_sizes(options: argparse.Namespace, *, batch: int) -> dict[str, int]:
    """The sizes of a decoder benchmark by shape letter. ``batch`` is the default number of images."""
    sizes = {
        "T": WORDS + 2,
        "D": 1280,
        "H": 512,
        "V": options.vocabulary,
        "N": options.regions,
    }
    return sizes | {"B": options.batch or batch, "M": options.captions}


def chosen_lengths(options: argparse.Namespace) -> tuple[str, ...]:
    """The kinds of caption lengths that are measured: "full", "captions" or both."""
    return ("full", "captions") if options.lengths == "both" else (options.lengths,)


def word_counts(shape: tuple[int, ...], lengths: str, longest: int = WORDS, seed: int = 0) -> np.ndarray:
    """Numbers of words without eos, int32 of this shape: all ``longest``, or drawn.

    Drawn lengths have a mean of 10.75 words and a standard deviation of 2.4, between those of two datasets: COCO 2014
    (10.4 words, deviation 2.2; 12,303 captions in the package's tokens) and Flickr8k (10.8, 3.8; its own tokens).
    """
    if lengths == "full":
        return np.full(shape, longest, np.int32)
    drawn = np.random.default_rng(seed).normal(10.75, 2.4, shape).round()
    return np.clip(drawn, 6, longest).astype(np.int32)


def random_captions(s: Mapping[str, int], lengths: str) -> np.ndarray:
    """Random captions int32 [B,M,T]: bos, words, eos, pad. See ``word_counts``."""
    tokens = np.random.default_rng(1).integers(FIRST_WORD, s["V"], (s["B"], s["M"], s["T"])).astype(np.int32)
    end = word_counts((s["B"], s["M"], 1), lengths, s["T"] - 2) + 1
    place = np.arange(s["T"])
    return np.where(place == 0, BOS, np.where(place == end, EOS, np.where(place > end, PAD, tokens)))


def caption_lengths(lengths: str) -> str:
    """The kind of caption lengths, as reports name it."""
    return "full length" if lengths == "full" else "real lengths"


def lengths_text(lengths: str, words: np.ndarray) -> str:
    """A line about the lengths of captions of these numbers of words."""
    return (
        f"captions of {caption_lengths(lengths)}: {words.mean():.2f} words on average, {words.mean() + 1:.2f} with eos"
    )


def regions_of(s: Mapping[str, int]) -> np.ndarray:
    """Random regions float16 [B,N,D]."""
    return np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float16)


def print_ratios(found: Mapping[tuple[str, str], Times], row: str, label: str = "") -> None:
    """Prints the times of the other sides in a row of (side, row) -> times, each divided by that of imgcap_jax.

    The ratio of CPU times is printed for another checkout only, because PyTorch's threads compute while they wait.
    """
    own, ratios = found[PACKAGE, row], []
    for (side, of_row), of in found.items():
        if of_row == row and side != PACKAGE:
            cpu = f" ({of.cpu / own.cpu:.2f} in CPU time)" if side == BEFORE else ""
            ratios.append(f"{of.wall / own.wall:.2f} to {side}{cpu}")
    if ratios:
        print(f"  {label}ratio {', '.join(ratios)}")
