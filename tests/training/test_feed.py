"""Batches from the memory of the devices, compared with those that the host sends."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.pipeline import CaptionData, train_batches
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.session import check_feed
from imgcap_jax.train import train
from imgcap_jax.training import feed
from imgcap_jax.training.feed import DeviceFeed, HostFeed, PackedRegions, device_part, open_feed
from imgcap_jax.training.parallel import AXIS, DataParallel, MemberParallel

VOCABULARY = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "dog"), (0,) * 7)
CONFIG = CaptionData(batch_size=8, captions_per_image=2, max_words=4, threads=0)


class Source:
    """Image i has 1 + i % 4 captions."""

    split = "train"

    def __init__(self, name: str, count: int) -> None:
        self.name, self._count = name, count

    def __len__(self) -> int:
        return self._count

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(" ".join(["a", "red", "dog", self.name][: 1 + (i + k) % 4]) for k in range(1 + i % 4))

    def image_ids(self) -> list[int]:
        return list(range(len(self)))


class Regions:
    """Random regions [N,D], of which some exist."""

    def __init__(self, count: int, views: int, dtype: Any, *, masked: bool = True, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.views = views
        self.values = rng.normal(size=(count, views, 3, 5)).astype(dtype)
        self.masks = rng.random((count, 3)) < 0.6 if masked else None

    def __len__(self) -> int:
        return len(self.values)

    def read(self, i: int, view: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.values[i, view], None if self.masks is None else self.masks[i]


def batches(config: CaptionData = CONFIG, *, dtype: Any = np.float16, masked: bool = True, seed: int = 3) -> Any:
    """A mixture of two sources with regions in two views, and references."""
    mixture: Any = [(Source("mine", 13), 1.0), (Source("other", 6), 2.0)]
    references = CaptionTable.as_references([source for source, _ in mixture], VOCABULARY, eos=True)
    references.norms = np.random.default_rng(0).random((len(references.tokens), 4)).astype(np.float32)
    stores = [Regions(len(source), 2, dtype, masked=masked, seed=number) for number, (source, _) in enumerate(mixture)]
    return train_batches(config, mixture, VOCABULARY, seed=seed, features=stores, references=references)


def whole_batch(state: Any, constants: Any, batch: Any) -> tuple[Any, Any]:
    """A step whose metrics are the batches of all devices."""
    return state + 1, {name: lax.all_gather(leaf, AXIS) for name, leaf in batch.items()}


def host(parallel: DataParallel) -> HostFeed:
    return HostFeed(parallel.compile(whole_batch), batches(), lambda batch: parallel.put(device_part(batch)))


def device(parallel: DataParallel, **options: Any) -> DeviceFeed:
    return DeviceFeed(partial(parallel.compile_loop, whole_batch), [batches().rows], parallel, print, **options)


def collected(feed: Any, parallel: DataParallel, steps: int, limit: int = 100) -> list[dict[str, np.ndarray]]:
    state, found, done = parallel.replicate(np.int32(0)), [], 0
    with feed:
        while done < steps:
            state, ran = feed.run(state, parallel.replicate(np.float32(0)), min(limit, steps - done))
            done += ran.steps
            assert ran.batches == done
            for number in range(ran.steps):
                single = isinstance(feed, HostFeed)
                found.append({name: np.asarray(leaf if single else leaf[number]) for name, leaf in ran.metrics.items()})
    assert int(state) == steps
    return found


@pytest.mark.parametrize(
    ("mode", "devices", "shards"),
    [("pmap", 1, 1), ("pmap", 4, 2), ("shard_map", 4, 2), ("shard_map", 4, 4), ("shard_map", 2, 1)],
)
def test_devices_read_the_batches_of_the_host(mode: Any, devices: int, shards: int) -> None:
    parallel = DataParallel(mode, jax.devices()[:devices])
    sent = collected(host(parallel), parallel, 9)
    read, reads = PackedRegions.read, list[tuple[int, int]]()

    def counted(packed: PackedRegions, start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return read(packed, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedRegions, "read", counted)
        from_memory = device(parallel, shards=shards, longest=5)
    assert len(reads) == len(set(reads)) == shards
    drawn = collected(from_memory, parallel, 9, limit=4)
    for expected, found in zip(sent, drawn, strict=True):
        assert expected.keys() == found.keys() >= {"regions", "region_mask", "tokens", "references", "row", "weight"}
        for name, leaf in expected.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert len({batch["tokens"].tobytes() for batch in sent}) == 9


def test_wide_rows_are_divided_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU reads them without a copy of the table (tests/plan/test_tpu.py)."""
    assert PackedRegions([Regions(5, 2, np.float16)]).shape == (9,)
    monkeypatch.setattr(feed, "_TILE", 4)
    assert PackedRegions([Regions(5, 2, np.float16)]).shape == (12,)
    monkeypatch.setattr(feed, "_WIDEST", 4)
    monkeypatch.setattr(feed, "_TILE", 2)
    packed = PackedRegions([Regions(5, 2, np.float16)])
    assert (packed.shape, packed.words) == ((4, 4), 16)
    parallel = DataParallel("shard_map", jax.devices()[:4])
    sent, drawn = (collected(of, parallel, 3) for of in (host(parallel), device(parallel, shards=2, longest=3)))
    for expected, found in zip(sent, drawn, strict=True):
        for name, leaf in expected.items():
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.mark.parametrize("count", [2, 3])
def test_members_of_a_population_read_the_batches_of_their_own_orders(count: int) -> None:
    rows = [batches(seed=seed).rows for seed in range(count)]
    together = MemberParallel(count, jax.devices()[:2])
    assert len(together.devices) == (2 if count == 2 else 1)
    device = DeviceFeed(partial(together.compile_loop, whole_batch, shared=True), rows, together, print, longest=4)
    state = together.stack([np.int32(0)] * count)
    for first in (0, 1, 2):  # the first two calls are of one step
        state, ran = device.run(state, together.replicate(np.float32(0)), 3)
        assert ran.batches == first + ran.steps
        for number in range(ran.steps):
            for member, of in enumerate(rows):
                expected = of.region_batch(first + number)
                for name in ("regions", "region_mask", "tokens", "references", "reference_count"):
                    found = np.asarray(ran.metrics[name])[number, member, 0]
                    np.testing.assert_array_equal(found, expected[name], err_msg=name)
    assert ran.steps == 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("masked", [True, False])
def test_packed_regions_are_those_of_the_store(dtype: Any, masked: bool) -> None:
    stores = [Regions(5, 2, dtype, masked=masked), Regions(4, 2, dtype, masked=masked, seed=1)]
    packed = PackedRegions(stores)
    assert packed.rows == 18
    whole = packed.read(0, 20)
    np.testing.assert_array_equal(np.concatenate([packed.read(0, 7), packed.read(7, 20)]), whole)
    found = jax.jit(packed.unpack)(whole)
    assert ("region_mask" in found) == masked
    for number in range(packed.rows):
        store, (image, view) = stores[number >= 10], divmod(number % 10, 2)
        regions, mask = store.read(image, view)
        assert found["regions"].dtype == regions.dtype
        np.testing.assert_array_equal(np.asarray(found["regions"][number]), regions)
        if masked:
            np.testing.assert_array_equal(np.asarray(found["region_mask"][number]), mask)


def test_a_feed_continues_where_the_other_one_stopped() -> None:
    parallel = DataParallel("pmap", jax.devices()[:1])
    expected = collected(host(parallel), parallel, 6)
    state = parallel.replicate(np.int32(0))
    _, ran = device(parallel, first=4).run(state, state, 1)
    np.testing.assert_array_equal(np.asarray(ran.metrics["tokens"][0]), expected[4]["tokens"])
    assert ran.batches == 5


@pytest.mark.parametrize("per_step", [0.003, 0.6, 4.0, 30.0])
def test_calls_of_the_device_feed_take_at_most_five_seconds(per_step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that works in order, and a loop that reads the results one call late and sometimes waits for longer."""
    clock, free = [100.0], [0.0]

    class Result:
        def __init__(self, steps: int) -> None:
            free[0] = self.done = max(clock[0], free[0]) + steps * per_step

        def is_ready(self) -> bool:
            return clock[0] >= self.done

        def block_until_ready(self) -> "Result":
            clock[0] = max(clock[0], self.done)
            return self

    monkeypatch.setattr(feed.time, "monotonic", lambda: clock[0])
    pace, calls = feed._Pace(), list[int]()
    pending: Result | None = None
    for number in range(40):
        steps = min(pace.steps(), 256)
        calls.append(steps)
        result = Result(steps)
        pace.started(steps, result)  # type: ignore[arg-type]
        if number == 0:
            result.block_until_ready()
        if pending is not None:
            pending.block_until_ready()
        pending = result
        if number in (15, 16, 27):  # a validation waits for the state, and takes a minute
            result.block_until_ready()
            pending = None
            clock[0] += 60.0
    assert all(steps == 1 or steps * per_step <= 5.01 for steps in calls)
    assert calls[-1] == min(256, max(1, int(5.0 / per_step + 1e-6)))


def test_features_are_split_over_as_few_devices_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = DataParallel("pmap", jax.devices()[:4])
    said: list[str] = []
    wanted = replace(CONFIG, feed="device")
    size = 4 * PackedRegions(batches().rows.stores).words * 2 * 19
    for room, shards in ((1.1 * size, 1), (0.6 * size, 2), (0.3 * size, 4), (0.2 * size, None)):
        monkeypatch.setattr(feed, "_free_memory", lambda parallel, room=room: room / 0.6)
        found = open_feed(whole_batch, batches(wanted), parallel, said.append)
        with found:
            assert isinstance(found, HostFeed if shards is None else DeviceFeed)
            assert getattr(found, "shards", None) == shards
    assert said[0] == f"batches from device memory ({size / 1e9:.3g} GB on each of 4 devices)"
    assert said[1].endswith("GB on each of 4 devices, split over 2)")
    assert said[-1].startswith("note: the features take 0.0 GB on each of 4 devices, more than 60% of the 0.0 GB")


def test_device_feed_needs_stored_features(tiny: Experiment, tmp_path: Path) -> None:
    experiment = replace(tiny, data=replace(tiny.data, feed="device"))
    with pytest.raises(UserError, match=r"but the encoder is trained; set it to host, or use a frozen one$"):
        train(experiment, tmp_path / "run", cache=tmp_path / "cache", show=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_only_what_is_missing_for_stored_features_is_named(tiny: Experiment) -> None:
    data = CaptionData(feed="device", augmentation=Augmentation(flip=True))
    trained = SimpleNamespace(frozen=False)
    for encoder, views, message in (
        (
            SimpleNamespace(frozen=True),
            1,
            "but data.augmentation changes each image in each epoch; set it to host, or ",
        ),
        (trained, 2, "but the encoder is trained; set it to host, or use a frozen one"),
        (trained, 1, "or use a frozen one and set data.views above 1"),
    ):
        experiment: Any = SimpleNamespace(data=replace(data, views=views), encoder=encoder)
        with pytest.raises(UserError) as error:
            check_feed(experiment)
        assert message in str(error.value)
    check_feed(tiny)  # data.feed is auto


@pytest.mark.parametrize(
    ("wanted", "line"),
    [("auto", "batches from the host, because the encoder is trained"), ("host", "batches from the host")],
)
def test_accelerators_say_why_the_host_sends_batches(wanted: Any, line: str) -> None:
    rows: Any = SimpleNamespace(config=SimpleNamespace(feed=wanted), stores=None)
    for platform, expected in (("cpu", []), ("tpu", [line])):
        parallel: Any = SimpleNamespace(devices=[SimpleNamespace(platform=platform)])
        said: list[str] = []
        assert feed.device_shards(rows, parallel, said.append, "the encoder is trained") is None
        assert said == expected
