"""The benchmark `checkpoint`: how long training stands still while a checkpoint is saved (see benchmark.py)."""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from benchmark_decoders import built_decoder
from checkouts import of_each_checkout
from measuring import PACKAGE, Row, Thing, decoder_sizes, matmul


class _Saves:
    """Saves one state again and again. A call returns when training can go on."""

    def __init__(self, save: Callable[[int], None], settle: Thing) -> None:
        self._save, self.settle, self._step = save, settle, 0

    def __call__(self) -> None:
        self._step += 1
        self._save(self._step)


def checkpoint(options: argparse.Namespace) -> list[Row]:
    """Prints the pause of training per checkpoint, the time until it is on disk, and what training loses meanwhile."""
    s = decoder_sizes(options, batch=1)
    place = Path(tempfile.mkdtemp(prefix="imgcap_checkpoints_"))
    sizes: dict[str, int] = {}

    def build() -> dict[str, Thing]:
        from imgcap_jax.models.model import CaptionModel, split_trained
        from imgcap_jax.training.checkpoints import Checkpoints, Progress
        from imgcap_jax.training.optimizer import Optimizer
        from imgcap_jax.training.parallel import DataParallel
        from imgcap_jax.training.step import first_state

        _, params, _ = split_trained(CaptionModel(None, built_decoder(options, s)))
        state = first_state(params, Optimizer().build(100, 1000), ema=options.ema > 0)
        state = jax.block_until_ready(DataParallel().replicate(state))
        checkpoints = Checkpoints(Path(tempfile.mkdtemp(dir=place)), writing=True)
        settle = getattr(checkpoints, "wait", lambda: None)  # other checkouts return when all is on disk
        kinds: dict[str, tuple[Any, Callable[[int], None]]] = {
            "state": (state, lambda step: checkpoints.save(state, Progress(step, {}))),
            "best parameters": (state.best_guess, lambda step: checkpoints.save_best(step, state.best_guess)),
        }
        sizes.update({name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, (tree, _) in kinds.items()})
        return {name: _Saves(save, settle) for name, (_, save) in kinds.items()}

    try:
        found, _ = of_each_checkout(options, build)
        product, _ = matmul(options.dtype, count=2)
        product()
        alone = statistics.median(_seconds(product) for _ in range(5 * options.rounds))
        pauses: dict[tuple[str, str], list[float]] = {key: [] for key in found}
        totals: dict[tuple[str, str], list[float]] = {key: [] for key in found}
        slowed: dict[tuple[str, str], list[float]] = {key: [] for key in found}
        for _ in range(options.rounds):
            for key, save in found.items():
                assert isinstance(save, _Saves)
                save.settle()
                start = time.perf_counter()
                pauses[key].append(_seconds(save))
                save.settle()
                totals[key].append(time.perf_counter() - start)
                save()
                slowed[key].append(_seconds_during(product, save.settle) / alone)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for (side, row), of in pauses.items():
        print(
            f"{side}: {row}, {sizes[row] / 1e6:.0f} MB: training stands still for {1e3 * statistics.median(of):.0f} ms "
            f"(longest {1e3 * max(of):.0f}), on disk after {1e3 * statistics.median(totals[side, row]):.0f} ms"
        )
        if side == PACKAGE:
            ratio = statistics.median(slowed[side, row])
            print(f"  matrix products while it is written take {ratio:.2f} times as long as alone")
    return [
        Row("checkpoint", f"{what}, {row}, {sizes[row] / 1e6:.0f} MB", options.dtype, 1e3 * statistics.median(of))
        for what, measured in (("pause", pauses), ("on disk", totals))
        for (side, row), of in measured.items()
        if side == PACKAGE
    ]


def _seconds_during(thing: Thing, wait: Thing) -> float:
    """Calls one thing again and again while another waits; returns the mean seconds of a call."""
    waiting = threading.Thread(target=wait)
    waiting.start()
    count, start = 0, time.perf_counter()
    while waiting.is_alive() or not count:
        thing()
        count += 1
    return (time.perf_counter() - start) / count


def _seconds(thing: Thing) -> float:
    start = time.perf_counter()
    thing()
    return time.perf_counter() - start
