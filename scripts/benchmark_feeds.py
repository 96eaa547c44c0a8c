"""The benchmarks `input` and `population`: where batches come from, and several runs as one program."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from benchmark_decoders import built_decoder, products
from jax import Array
from measuring import FIRST_WORD, Row, at_precision, decoder_sizes, first_call, matmul, medians, word_counts

IMAGES = 2000


def _flops(options: argparse.Namespace, s: Mapping[str, int]) -> float:
    """FLOPs of the model's matrix products in a training step, on average over batches."""
    words = float((word_counts((IMAGES, s["M"]), "captions") + 1).mean())  # with eos
    return products(options.decoder, s).training(s["B"], round(s["B"] * s["M"] * words))


class _Source:
    """Images with random captions of real lengths."""

    name, split = "random", "train"

    def __init__(self, s: Mapping[str, int]) -> None:
        rng = np.random.default_rng(0)
        lengths = word_counts((IMAGES, s["M"]), "captions")
        self._captions = [
            tuple(" ".join(map(str, rng.integers(FIRST_WORD, s["V"], length))) for length in of) for of in lengths
        ]

    def __len__(self) -> int:
        return IMAGES

    def captions(self, i: int) -> tuple[str, ...]:
        return self._captions[i]

    def image_ids(self) -> list[int]:
        return list(range(IMAGES))


class _Numbers:
    """A vocabulary whose words are numbers, and its tokeniser."""

    def __init__(self) -> None:
        from imgcap_jax.tokenizers import DEFAULT

        self.tokenizer = DEFAULT

    def ids(self, words: list[str]) -> list[int]:
        return [int(word) for word in words]


class _Regions:
    """Regions of one view in the memory of the host, as a feature store has them on disk."""

    views = 1

    def __init__(self, s: Mapping[str, int]) -> None:
        self._values = np.random.default_rng(0).random((IMAGES, s["N"], s["D"]), np.float32).astype(np.float16)

    def __len__(self) -> int:
        return IMAGES

    def read(self, i: int, view: int) -> tuple[np.ndarray, None]:
        return self._values[i], None

    def read_many(self, images: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, None]:
        return self._values[images], None


def _rows(s: Mapping[str, int], seeds: range) -> list[Any]:
    """Random training data in the orders of these seeds."""
    from imgcap_jax.data.rows import TrainingRows

    config = SimpleNamespace(
        batch_size=s["B"], captions_per_image=s["M"], max_words=s["T"] - 2, feed="device", dataset="random"
    )
    source, stores = _Source(s), [_Regions(s)]
    make = partial(TrainingRows, config, [(source, 1.0)], _Numbers(), features=stores)
    return [make(seed=seed) for seed in seeds]


def _batches(rows: Any) -> Iterator[dict[str, np.ndarray]]:
    for number in itertools.count():
        yield rows.region_batch(number)


def _model_and_step(options: argparse.Namespace, s: Mapping[str, int]) -> tuple[Any, Any, Callable[[Any], Any]]:
    """The first state, the frozen variables, and the training step for a key."""
    from imgcap_jax.models.model import CaptionModel, split_trained
    from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
    from imgcap_jax.training.optimizer import Optimizer
    from imgcap_jax.training.step import first_state

    graph, params, frozen = split_trained(CaptionModel(None, built_decoder(options, s)))
    optimizer = Optimizer().build(100, 1000)

    def step(key: Array) -> Any:
        return at_precision(cross_entropy_step(graph, CrossEntropy(), optimizer, key=key), options.dtype)

    return first_state(params, optimizer, ema=False), frozen, step


def input_benchmark(options: argparse.Namespace) -> list[Row]:
    """Prints steps/s with batches from the host and from the memory of the device, and the time waiting for input."""
    from imgcap_jax.training.feed import DeviceFeed, HostFeed, device_part
    from imgcap_jax.training.parallel import DataParallel

    s = decoder_sizes(options, batch=64)
    state, frozen, step = _model_and_step(options, s)
    (rows,), parallel = _rows(s, range(1)), DataParallel()
    steps = options.steps
    own_step = step(jax.random.key(0))

    def put(batch: Any) -> Any:
        return parallel.put(device_part(batch))

    feeds: dict[str, Any] = {
        "host": HostFeed(parallel.compile(own_step), _batches(rows), put),
        "device": DeviceFeed(partial(parallel.compile_loop, own_step), [rows], parallel, print, longest=steps),
    }
    states = {name: parallel.replicate(jax.tree.map(np.array, state)) for name in feeds}
    constants = parallel.replicate(frozen)
    calls = dict.fromkeys(feeds, 0)

    def run(name: str) -> None:
        done = 0
        while done < steps:
            states[name], ran = feeds[name].run(states[name], constants, steps - done)
            done += ran.steps
            calls[name] += 1
        jax.block_until_ready(states[name])

    compiled = {}
    for name in feeds:
        compiled[name] = first_call(partial(run, name), name)
        run(name)
    calls.update(dict.fromkeys(feeds, 0))
    feeds["host"].waited = 0.0
    plain, flops = matmul(options.dtype)
    things: dict[str, Any] = {name: partial(run, name) for name in feeds}
    found = medians({**things, "plain": plain}, options.rounds)
    waited = feeds["host"].waited / (options.rounds + 1)
    print(
        f"{options.decoder}, batch {s['B']} x {s['M']} captions of real lengths, N={s['N']}, V={s['V']}, {steps} steps "
        f"per round; plain matmul rate between them: {flops / found['plain'] / 1e9:.1f} GFLOP/s ({options.dtype})"
    )
    for name in feeds:
        line = f"  {name}: {steps / found[name]:.2f} steps/s, {calls[name] / (options.rounds + 1):.1f} calls per round"
        line += f", first round with compilation {compiled[name]:.0f} s"
        if name == "host":
            line += f", {1e3 * waited / steps:.2f} ms per step waiting for input ({waited / found[name]:.1%})"
        print(line)
    print(f"  ratio {found['host'] / found['device']:.2f} to host")
    for feed in feeds.values():
        feed.__exit__(None, None, None)
    model = _flops(options, s)
    return [
        Row(
            "input",
            f"step, from the {name}",
            options.dtype,
            1e3 * found[name] / steps,
            s["B"] * s["M"] * steps / found[name],
            model / 1e9,
            model * steps / found[name] / (flops / found["plain"]),
            compiled[name],
            waited / found[name] if name == "host" else 0.0,
        )
        for name in feeds
    ]


def population(options: argparse.Namespace) -> list[Row]:
    """Prints the time of a step of several runs as one program, and one after another."""
    from imgcap_jax.training.feed import DeviceFeed
    from imgcap_jax.training.parallel import DataParallel, MemberParallel

    s = decoder_sizes(options, batch=64)
    state, frozen, step = _model_and_step(options, s)
    members, steps = options.members, options.steps
    rows = _rows(s, range(members))
    together, alone = MemberParallel(members), DataParallel(devices=jax.devices()[:1])

    def of_member(state: Any, constants: Any, batch: Any) -> Any:
        key, frozen = constants
        return step(key)(state, frozen, batch)

    keys = [jax.random.key(seed) for seed in range(members)]
    shared = (False, jax.tree.map(lambda _: True, frozen))
    feed = DeviceFeed(partial(together.compile_loop, of_member, shared=shared), rows, together, print, longest=steps)
    single = DeviceFeed(partial(alone.compile_loop, of_member), rows[:1], alone, print, longest=steps)
    copies = [jax.tree.map(np.array, state) for _ in range(members)]
    held: dict[str, Any] = {"together": together.stack(copies), "one by one": alone.replicate(copies[0])}
    of_all = together.stack(keys), together.replicate(frozen)
    of_one = alone.replicate((keys[0], frozen))

    def run(name: str, feed: Any, constants: Any) -> None:
        done = 0
        while done < steps:
            held[name], ran = feed.run(held[name], constants, steps - done)
            done += ran.steps
        jax.block_until_ready(held[name])

    def one_by_one() -> None:
        for _ in range(members):
            run("one by one", single, of_one)

    things: dict[str, Any] = {"together": partial(run, "together", feed, of_all), "one by one": one_by_one}
    compiled = {}
    for name, thing in things.items():
        compiled[name] = first_call(thing, name)
    plain, flops = matmul(options.dtype)
    found = medians({**things, "plain": plain}, options.rounds)
    print(
        f"{options.decoder}, {members} runs on {len(together.devices)} device(s), batch {s['B']} x {s['M']} captions "
        f"of real lengths, N={s['N']}, V={s['V']}; plain matmul rate: {flops / found['plain'] / 1e9:.1f} GFLOP/s"
    )
    for name in things:
        seconds = found[name] / steps
        print(f"  {name}: {1e3 * seconds:.1f} ms per step of all runs, first round {compiled[name]:.0f} s")
    print(f"  ratio {found['one by one'] / found['together']:.2f} to one by one")
    model = members * _flops(options, s)
    return [
        Row(
            "population",
            f"step of {members} runs, {name}",
            options.dtype,
            1e3 * found[name] / steps,
            members * s["B"] * s["M"] * steps / found[name],
            model / 1e9,
            model * steps / found[name] / (flops / found["plain"]),
            compiled[name],
        )
        for name in things
    ]
