"""The input pipeline: the contents of batches, which depend only on the seed and the position."""

import io
import itertools
import json
import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.features import FeatureStore
from imgcap_jax.data.images import Augmentation, decode
from imgcap_jax.data.mixtures import describe_mixture, interleave, rows_per_epoch
from imgcap_jax.data.pipeline import CaptionData, TrainBatches, eval_batches, train_batches
from imgcap_jax.data.prefetch import device_prefetch
from imgcap_jax.data.rows import Batch
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import EOS
from imgcap_jax.tokenizers import DEFAULT

# Worker processes cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SIZE = 8
AUGMENTED = CaptionData(
    image_size=SIZE,
    batch_size=6,
    captions_per_image=3,
    max_words=3,
    augmentation=Augmentation(0.4, True, 0.3),
)


@dataclass(frozen=True)
class Example:
    image: bytes
    filename: str
    image_id: int
    captions: tuple[str, ...]


class Source:
    """An in-memory stand-in for CaptionSource.

    Image i has 1 + i % 5 captions, "id 0", "id 1", ..., where id is its image id. Its red value encodes i.
    """

    split = "train"

    def __init__(self, count: int, name: str = "tiny", first_id: int = 1000) -> None:
        self.name = name
        self.first_id = first_id
        self.images = []
        for i in range(count):
            pixels = np.full((12, 10, 3), (10 + 7 * i % 200, 90, 30), np.uint8)
            pixels[:, :5, 1] = 160
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            self.images.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], f"{i}.png", self.first_id + i, self.captions(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(f"{self.first_id + i} {k}" for k in range(1 + i % 5))

    def image_ids(self) -> list[int]:
        return [self.first_id + i for i in range(len(self))]


class Numbers:
    """A stand-in for Vocabulary, for captions that are numbers: "1007 2" is [bos, 1007, 2 + 4, eos, pad...]."""

    tokenizer = DEFAULT

    def ids(self, words: Sequence[str]) -> list[int]:
        return [int(word) + 4 * (len(word) == 1) for word in words]


def batches(config: CaptionData = AUGMENTED, source: Any = None, **options: Any) -> TrainBatches:
    return train_batches(config, source or Source(20), Numbers(), **({"seed": 1} | options))


def take(iterator: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def store(folder: Any, count: int, views: int = 2) -> FeatureStore:
    """A store of features [1, 4]: red and green of the leftmost and of the rightmost pixel of row 4."""

    def encode(images: np.ndarray) -> np.ndarray:
        return images[:, 4, [0, -1]][..., :2].reshape(len(images), 1, 4).astype(np.float32)

    return FeatureStore.build(
        Source(count),
        encode,
        regions=(1, 4),
        key={},
        root=folder,
        views=views,
        image_size=SIZE,
        batch_size=8,
        progress=False,
    )


def test_the_rows_of_a_batch_belong_together() -> None:
    batch = take(batches(), 4)[3]
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "image": ((6, SIZE, SIZE, 3), np.uint8),
        "tokens": ((6, 3, 5), np.int32),
        "number": ((6,), np.int32),
        "image_id": ((6,), np.int64),
        "weight": ((6,), np.float32),
    }
    np.testing.assert_array_equal(batch["weight"], 1)
    np.testing.assert_array_equal(batch["number"], batch["image_id"] - 1000)
    for image_id, tokens in zip(batch["image_id"], batch["tokens"], strict=True):
        there = 1 + (image_id - 1000) % 5
        count = min(3, there)
        # The image's own captions, none twice, then rows of pad.
        np.testing.assert_array_equal(tokens[:count, 1], image_id)
        assert len(set(tokens[:count, 2])) == count
        assert (tokens[:count, 2] < 4 + there).all()
        np.testing.assert_array_equal(tokens[count:], 0)
    plain = take(batches(replace(AUGMENTED, augmentation=Augmentation())), 1)[0]
    for image_id, image in zip(plain["image_id"], plain["image"], strict=True):
        np.testing.assert_array_equal(image, decode(Source(20).images[image_id - 1000], SIZE))


def test_all_captions_of_an_image_are_drawn() -> None:
    seen = Counter(
        (int(image_id), int(caption))
        for batch in take(batches(), 60)
        for image_id, tokens in zip(batch["image_id"], batch["tokens"], strict=True)
        for caption in tokens[tokens[:, 0] == 1, 2]
    )
    # 18 epochs; image 4 has five captions, three of which are drawn each time.
    counts = [seen[1004, 4 + k] for k in range(5)]
    assert sum(counts) == 18 * 3
    assert min(counts) >= 5


def test_each_epoch_is_a_new_permutation() -> None:
    ids = np.concatenate([batch["image_id"] for batch in take(batches(), 10)])
    epochs = ids.reshape(3, 20)
    for epoch in epochs:
        assert set(epoch) == set(range(1000, 1020))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    other = np.concatenate([batch["image_id"] for batch in take(batches(seed=2), 10)])
    assert (other != ids).any()
    # Seed 2 is not seed 1 shifted by one epoch.
    assert (other[:20] != ids[20:40]).any()


@pytest.mark.parametrize("changes", [{"threads": 0}, {"threads": 5}])
def test_threads_change_nothing(changes: dict[str, int]) -> None:
    assert_equal(take(batches(replace(AUGMENTED, **changes)), 8), take(batches(), 8))


def test_a_restored_state_continues_with_the_same_batches() -> None:
    # 20 images in batches of 6: the first epoch ends within batch 3, the second within batch 6.
    expected = take(batches(), 12)
    running = batches()
    states = [running.get_state()]
    for batch in expected:
        assert_equal([next(running)], [batch])
        states.append(running.get_state())
    for consumed in (0, 1, 3, 4, 7):
        fresh = batches(replace(AUGMENTED, threads=consumed % 3))
        fresh.set_state(json.loads(json.dumps(states[consumed])))
        assert fresh.get_state() == states[consumed]
        assert_equal(take(fresh, 12 - consumed), expected[consumed:])
    # A running iterator can be set back.
    running.set_state(states[2])
    assert_equal(take(running, 3), expected[2:5])
    running.close()
    assert_equal(take(running, 2), expected[5:7])


def test_worker_processes_change_nothing_and_resume() -> None:
    threads = batches()
    expected = take(threads, 9)
    workers = batches(replace(AUGMENTED, workers=2, threads=1))
    workers.set_state(threads.get_state() | {"batches": 2})
    assert_equal(take(workers, 3), expected[2:5])
    state = workers.get_state()
    workers.close()
    threads.set_state(state)
    assert_equal(take(threads, 4), expected[5:])


def test_a_state_of_other_data_is_refused() -> None:
    state = batches().get_state()
    others = [
        batches(replace(AUGMENTED, batch_size=4)),
        batches(seed=9),
        batches(source=Source(21)),
        batches(source=[(Source(20), 1.0), (Source(5, "more"), 1.0)]),
    ]
    for other in others:
        with pytest.raises(UserError, match="the saved position does not belong to this data"):
            other.set_state(state)
    with pytest.raises(UserError, match="batch_size 6 -> 4"):
        others[0].set_state(state)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch_row_by_row(processes: int) -> None:
    whole = take(batches(), 7)
    parts = [take(batches(process_index=p, process_count=processes), 7) for p in range(processes)]
    for step, batch in enumerate(whole):
        for row in range(6):
            part = parts[row % processes][step]
            for name in batch:
                np.testing.assert_array_equal(part[name][row // processes], batch[name][row])


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        batches(process_count=4)


def test_an_epoch_of_a_mixture_has_each_image_as_often_as_its_weight() -> None:
    small, large = Source(4, "small", 500), Source(20, "large", 1000)
    plain = take(batches(source=[(small, 1.0), (large, 1.0)]), 8)
    epochs = np.concatenate([batch["image_id"] for batch in plain]).reshape(2, 24)
    for epoch in epochs:  # each image once, whatever the sizes
        assert set(epoch) == {*range(500, 504), *range(1000, 1020)}
    for batch in plain:
        assert (batch["image_id"] < 1000).sum() == 1  # spread evenly: 4 of 24 rows
        np.testing.assert_array_equal(batch["tokens"][:, 0, 1], batch["image_id"])

    mixture = [(small, 3.0), (large, 0.5)]  # 12 + 10 rows per epoch
    weighted = take(batches(source=mixture), 11)
    epochs = np.concatenate([batch["image_id"] for batch in weighted]).reshape(3, 22)
    for epoch in epochs:
        assert Counter(epoch[epoch < 1000].tolist()) == dict.fromkeys(range(500, 504), 3)
    assert Counter(epochs[:2][epochs[:2] >= 1000].tolist()) == dict.fromkeys(range(1000, 1020), 1)
    assert rows_per_epoch(mixture) == [12, 10]
    assert describe_mixture(mixture) == (
        "an epoch has 22 images: small 4 images x 3 (54.5%), large 20 images x 0.5 (45.5%)"
    )

    resumed = batches(source=mixture)
    resumed.set_state(json.loads(json.dumps(resumed.get_state() | {"batches": 7})))
    assert_equal(take(resumed, 4), weighted[7:])


def test_positions_in_other_mixtures_are_refused() -> None:
    sources = Source(4, "small", 0), Source(20, "large", 1000)
    state = batches(source=[(sources[0], 2.0), (sources[1], 1.0)]).get_state()
    with pytest.raises(UserError, match="the saved position does not belong to this data"):
        batches(source=[(sources[0], 3.0), (sources[1], 1.0)]).set_state(state)
    del state["order"]  # as in runs of versions before it
    with pytest.raises(UserError, match=r"another version of imgcap_jax.*start a new run"):
        batches(source=[(sources[0], 2.0), (sources[1], 1.0)]).set_state(state)


def test_a_large_mixture_repeats_a_small_source_exactly() -> None:
    counts = [6001, 12, 1]
    of, rows = interleave(counts, np.arange(2 * sum(counts)))
    for source, count in enumerate(counts):
        np.testing.assert_array_equal(rows[of == source], np.arange(2 * count))


def test_features_come_from_the_row_of_the_image_in_a_random_view(tmp_path: Any) -> None:
    features = store(tmp_path, 20)
    config = replace(AUGMENTED, augmentation=Augmentation())
    drawn = take(batches(config, features=features), 20)
    views = Counter()
    for batch in drawn:
        assert "image" not in batch
        assert batch["regions"].dtype == np.float16
        np.testing.assert_array_equal(batch["tokens"][:, 0, 1], batch["image_id"])
        for image_id, regions in zip(batch["image_id"], batch["regions"], strict=True):
            matches = [np.array_equal(regions, features[image_id - 1000, view]) for view in range(2)]
            assert sum(matches) == 1
            views[matches.index(True)] += 1
    assert 35 < views[0] < 85
    # The same images in the same order as without features.
    assert_equal(
        [{"image_id": batch["image_id"]} for batch in drawn],
        [{"image_id": batch["image_id"]} for batch in take(batches(config), 20)],
    )


def test_a_mixture_has_a_store_for_each_source(tmp_path: Any) -> None:
    sources = [(Source(12), 1.0), (Source(20), 1.0)]
    stores = [store(tmp_path, 12), store(tmp_path, 20)]
    for batch in take(batches(source=sources, features=stores), 5):
        for image_id, regions in zip(batch["image_id"], batch["regions"], strict=True):
            # Both sources contain the same images under the same ids.
            assert any(np.array_equal(regions, stores[1][image_id - 1000, view]) for view in range(2))
    with pytest.raises(UserError, match="are of 20 images, but tiny split train has 12"):
        batches(source=sources, features=stores[::-1])


def test_an_unreadable_image_is_reported_and_replaced_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    source = Source(200)
    source.images[7] = source.images[8] = b"damaged"
    config = replace(AUGMENTED, augmentation=Augmentation(), batch_size=20)
    with caplog.at_level(logging.WARNING):
        drawn = take(batches(config, source), 20)
    ids = Counter(np.concatenate([batch["image_id"] for batch in drawn]).tolist())
    assert ids[1007] == ids[1008] == 0
    assert ids[1009] == 3 * ids[1010]
    for batch in drawn:
        np.testing.assert_array_equal(batch["tokens"][:, 0, 1], batch["image_id"])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any("tiny: image skipped: 7.png: " in message for message in messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_of_unreadable_images_stops(workers: int) -> None:
    source = Source(200)
    for i in (7, 8, 9):
        source.images[i] = b"damaged"
    running = batches(replace(AUGMENTED, workers=workers), source)
    with pytest.raises(UserError, match=r"3 of 200 images cannot be read.*prepare the dataset again"):
        take(running, 80)
    running.close()


def test_evaluation_is_in_order_with_a_padded_last_batch(tmp_path: Any) -> None:
    source = Source(20)
    config = replace(AUGMENTED, captions_per_image=3)
    images = list(eval_batches(config, source, batch_size=8, vocabulary=Numbers()))
    regions = list(eval_batches(config, source, batch_size=8, features=store(tmp_path, 20)))
    for given in (images, regions):
        assert len(given) == 3
        ids = np.concatenate([batch["image_id"] for batch in given])
        np.testing.assert_array_equal(ids, [*range(1000, 1020), -1, -1, -1, -1])
        np.testing.assert_array_equal(np.concatenate([batch["weight"] for batch in given]), [1] * 20 + [0] * 4)
    assert all(batch["image"].shape == (8, SIZE, SIZE, 3) for batch in images)
    np.testing.assert_array_equal(images[2]["image"][3], decode(source.images[19], SIZE))
    np.testing.assert_array_equal(images[0]["tokens"][4, :, 2], [4, 5, 6])
    np.testing.assert_array_equal(images[0]["tokens"][0, 1:], 0)
    assert "tokens" not in regions[0]
    stored = store(tmp_path, 20)
    np.testing.assert_array_equal(regions[1]["regions"], [stored[i, 0] for i in range(8, 16)])


def test_evaluation_reports_an_unreadable_image_by_name() -> None:
    source = Source(5)
    source.images[2] = b""
    with pytest.raises(UserError, match=r"tiny, split train: 2\.png: the file is empty"):
        list(eval_batches(AUGMENTED, source, batch_size=2))


def test_prefetching_gives_each_batch_with_the_state_right_after_it() -> None:
    expected = take(batches(), 8)
    put = lambda batch: {name: values.copy() for name, values in batch.items()}  # noqa: E731
    with device_prefetch(batches(), put, depth=3) as prefetched:
        drawn = [next(prefetched) for _ in range(5)]
    assert_equal([batch for batch, _ in drawn], expected[:5])
    resumed = batches()
    resumed.set_state(drawn[-1][1])
    assert_equal(take(resumed, 3), expected[5:])


def test_prefetching_ends_with_its_iterator_and_passes_its_errors_on() -> None:
    assert [item for item, _ in device_prefetch(iter(range(5)), str)] == ["0", "1", "2", "3", "4"]

    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the disk is gone")

    for iterator, put in ((failing(), int), (iter([1, 2, 0]), lambda value: 1 // value)):
        prefetched = device_prefetch(iterator, put, depth=1)
        # Batches before the error are still returned.
        next(prefetched)
        next(prefetched)
        with pytest.raises((UserError, ZeroDivisionError)):
            next(prefetched)
        with pytest.raises(StopIteration):
            next(prefetched)


def test_closing_prefetch_stops_its_thread_even_while_it_waits_for_room() -> None:
    before = threading.active_count()
    drawn = []
    prefetched = device_prefetch(itertools.count(), drawn.append, depth=2)
    next(prefetched)
    prefetched.close()
    prefetched.close()
    assert threading.active_count() <= before  # a thread of an earlier test may end meanwhile
    assert len(drawn) <= 5
    with pytest.raises(StopIteration):
        next(prefetched)


def test_references_are_whole_and_have_ids_for_words_outside_the_vocabulary() -> None:
    """Every row has all references of its own image, whichever captions it draws. This also holds for mixtures."""
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "0", "1", "1001"), (0,) * 7)
    sources = [Source(7), Source(5, "others", 2000)]
    table = CaptionTable.as_references(sources, vocabulary, eos=True)
    without = CaptionTable.as_references(sources, vocabulary, eos=False)
    names = dict(enumerate(vocabulary.words))
    for of_source in sources:
        for i in range(len(of_source)):
            for caption in of_source.captions(i):
                for word in caption.split():
                    if word not in names.values():
                        names[len(names)] = word
    assert table.words == len(names)
    table.norms = np.arange(1, len(table.tokens) + 1, dtype=np.float32)[:, None]
    own = replace(AUGMENTED, max_words=1)  # training captions are cut, references are not
    drawn = train_batches(own, [(sources[0], 1.0), (sources[1], 1.0)], vocabulary, seed=1, references=table)
    seen = set()
    for batch in take(drawn, 8):
        assert batch["references"].dtype == np.int32
        numbers = [int(n) for n in batch["reference_norms"][..., 0].reshape(-1)]
        for number, caption in zip(numbers, batch["references"].reshape(len(numbers), -1), strict=True):
            np.testing.assert_array_equal(caption, table.tokens[number - 1] if number else 0)
        for row, image_id in enumerate(batch["image_id"].tolist()):
            source = sources[image_id >= 2000]
            captions = source.captions(image_id - source.first_id)
            assert batch["reference_count"][row] == len(captions)
            read = [[names[n] for n in tokens if n] for tokens in batch["references"][row].tolist()]
            assert read == [[*caption.split(), "<eos>"] for caption in captions] + [[]] * (5 - len(captions))
            seen.add(image_id)
    assert len(seen) == 12
    assert (table.tokens != EOS).any()
    assert not (without.tokens == EOS).any()
    assert [[[names[n] for n in caption] for caption in image] for image in without.captions()] == [
        [caption.split() for caption in source.captions(i)] for source in sources for i in range(len(source))
    ]
    # References that differ only in words outside the vocabulary are other references.

    class Same(Source):
        def captions(self, i: int) -> tuple[str, ...]:
            return tuple(f"2000 {k}" for k in range(1 + i % 5))

    other = CaptionTable.as_references([sources[0], Same(5, "others", 2000)], vocabulary, eos=True)
    state = drawn.get_state()
    drawn.close()
    resumed = train_batches(own, [(sources[0], 1.0), (sources[1], 1.0)], vocabulary, seed=1, references=other)
    with pytest.raises(UserError, match="references"):
        resumed.set_state(state)
