"""Trains on several devices, with both modes, objectives and feeds. Run by ``test_device_counts``.

    device_counts.py EXPECTED                          on 1, 2, 4 and 8 devices of one process; writes the file EXPECTED
    device_counts.py EXPECTED HOST:PORT,COUNT,INDEX    on all devices of several processes; reads the file

With a last argument, the name of an objective, only this one is trained, with all modes and feeds.

Prints one line of JSON per combination: the largest difference of its parameters and losses from those of one device.
"""

import json
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.rows import TrainingRows
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.metrics.cider_device import document_frequencies
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.training import feed as feeds
from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
from imgcap_jax.training.feed import DeviceFeed, HostFeed, device_part
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel, join_processes
from imgcap_jax.training.self_critical import Constants, FunctionWords, SelfCritical, self_critical_step
from imgcap_jax.training.step import first_state

STEPS, MAX_WORDS = 20, 5
WORDS = ("a", "red", "dog", "runs", "on", "grass")
VOCABULARY = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS), (0,) * 10)
# Adam would hide a wrong factor of the gradient, and enlarge the rounding of small gradients.
SGD = Optimizer("sgd", 0.2, schedule="constant", warmup_epochs=0, clip_norm=None).build(1, STEPS)


class Source:
    name, split = "random", "train"

    def __len__(self) -> int:
        return 24

    def captions(self, i: int) -> tuple[str, ...]:
        rng = np.random.default_rng(i)
        return tuple(" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(1 + i % 3))

    def image_ids(self) -> list[int]:
        return list(range(len(self)))


class Regions:
    views = 2

    def __init__(self, images: list[int]) -> None:
        self.first, self._images = images[0], images

    def __len__(self) -> int:
        return 24

    def read(self, i: int, view: int) -> tuple[np.ndarray, None]:
        if i not in self._images:
            raise KeyError(i)
        return np.random.default_rng([i, view]).normal(size=(3, 6)).astype(np.float16), None


def main() -> None:
    """Trains all combinations."""
    path, *arguments = sys.argv[1:]
    only = arguments.pop() if arguments and ":" not in arguments[-1] else None
    alone = not arguments
    if not alone:
        join_processes(arguments[0])
    source: Any = Source()
    config: Any = SimpleNamespace(batch_size=8, captions_per_image=3, max_words=MAX_WORDS, feed="device")
    references = CaptionTable.as_references([source], VOCABULARY, eos=True)
    make_rows = partial(TrainingRows, config, [(source, 1.0)], VOCABULARY, seed=0, references=references)
    rows = make_rows(features=[Regions(list(range(24)))])
    decoder = ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=8, dropout=0.5)
    graph, params, frozen = split_trained(
        CaptionModel(None, decoder.build(6, len(VOCABULARY), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, params))]
    key = jax.random.key(1)
    critical = self_critical_step(
        graph,
        SelfCritical(samples=3, baseline="greedy", kl=0.1),
        SGD,
        key=key,
        max_words=MAX_WORDS,
        bad_endings=[4],
        function_words=FunctionWords((4,)),
    )
    frequencies = document_frequencies(list(references.captions()), references.words)
    steps: dict[str, Any] = {
        "cross-entropy": (cross_entropy_step(graph, CrossEntropy(), SGD, key=key, ema_decay=0.9), frozen),
        "self-critical": (critical, Constants(frozen, frequencies, params)),
    }

    def run(objective: str, mode: Any, devices: int, feed: str) -> tuple[list[np.ndarray], list[float]]:
        step, constants = steps[objective]
        parallel = DataParallel(mode, jax.devices()[:devices])
        state = parallel.replicate(first_state(jax.tree.map(np.array, params), SGD, ema=True))
        source: Any
        if feed == "host":
            mine = slice(jax.process_index(), None, jax.process_count())
            batches = (rows.region_batch(number, mine) for number in range(STEPS))
            source = HostFeed(parallel.compile(step), batches, lambda batch: parallel.put(device_part(batch)))
        else:
            shards, own = min(devices, 2), rows
            if jax.process_count() > 1:  # each process has the features of its own devices only
                feeds._free_memory = lambda parallel: 2001.0  # room for a quarter of the 48 rows
                found = feeds.images_of_devices("device", [24], 2, 100, parallel)
                assert found is not None
                shards, (images,) = found
                assert (shards, len(images)) == (4, 12)
                own = make_rows(features=[Regions(images)])
            source = DeviceFeed(partial(parallel.compile_loop, step), [own], parallel, print, shards=shards, longest=8)
        losses: list[float] = []
        own = parallel.replicate(constants)
        with source:
            while len(losses) < STEPS:
                state, ran = source.run(state, own, STEPS - len(losses))
                losses += np.atleast_1d(np.asarray(ran.metrics["loss"]))[: ran.steps].tolist()
        return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.ema))], losses

    one_process = (("pmap", 1, "device"), ("pmap", 2, "host"), ("shard_map", 4, "device"))
    combinations = (*one_process, ("shard_map", 8, "host"), ("pmap", 8, "device"))
    all_devices = len(jax.devices())
    known = {}
    if not alone:
        combinations = tuple((mode, all_devices, feed) for mode, feed in (("pmap", "host"), ("shard_map", "device")))
        known = dict(np.load(path))
    every = tuple((mode, all_devices, feed) for mode in ("pmap", "shard_map") for feed in ("host", "device"))
    for objective in steps if only is None else [only]:
        if alone:
            expected, losses = run(objective, "pmap", 1, "host")
            known |= {f"{objective} {number}": leaf for number, leaf in enumerate([np.array(losses), *expected])}
        expected_losses, *expected = (known[f"{objective} {number}"] for number in range(len(leaves) + 1))
        moved = max(float(np.abs(a - b).max()) for a, b in zip(expected, leaves, strict=True))
        # Self-critical steps take longer to compile. Their feed and mode are the same code.
        chosen = combinations if objective == "cross-entropy" else combinations[-1:]
        for mode, devices, feed in chosen if only is None else dict.fromkeys((*combinations, *every)):
            found, losses = run(objective, mode, devices, feed)
            difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
            of_losses = float(np.abs(np.array(losses) - expected_losses).max())
            line = {"objective": objective, "mode": mode, "devices": devices, "feed": feed, "moved": moved}
            print(json.dumps({**line, "difference": difference, "losses": of_losses}), flush=True)
    if alone:
        np.savez(path, **known)


if __name__ == "__main__":
    main()
