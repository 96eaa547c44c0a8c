"""The feature store: resuming, views, limits of its dtypes, damage."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data import feature_files, features
from imgcap_jax.data.features import FeatureStore, PartOfStore
from imgcap_jax.data.images import Augmentation, decode
from imgcap_jax.errors import UserError

IMAGES, BATCH, SIZE = 22, 4, 16


@dataclass(frozen=True)
class Example:
    image: bytes
    filename: str
    image_id: int
    captions: tuple[str, ...]


class Source:
    """An in-memory stand-in for CaptionSource. Every third image has a caption that names a side."""

    name, split = "tiny", "train"

    def __init__(self, count: int = IMAGES) -> None:
        rng = np.random.default_rng(3)
        self.images = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(file, "PNG")
            self.images.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], f"{i}.png", 100 + i, self.captions(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return ("a dog", "a dog on the left" if i % 3 == 0 else "a cat")

    def image_ids(self) -> list[int]:
        return [100 + i for i in range(len(self.images))]


class Encode:
    """Region n is pixel row n, so that the features show which pixels were encoded."""

    def __init__(self, fail_at: int | None = None, kill_at: int | None = None) -> None:
        self.calls: list[np.ndarray] = []
        self.fail_at, self.kill_at = fail_at, kill_at

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if len(self.calls) == self.fail_at:
            raise RuntimeError("encoder failed")
        if len(self.calls) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls.append(images.copy())
        assert images.shape == (BATCH, SIZE, SIZE, 3)
        return images.reshape(BATCH, SIZE, SIZE * 3).astype(np.float32) / 8


def build(root: Path, encode: Encode, **changes: object) -> Any:
    settings = {
        "regions": (SIZE, SIZE * 3),
        "key": {"encoder": "rows", "weights": "f00"},
        "views": 2,
        "image_size": SIZE,
        "batch_size": BATCH,
        "progress": False,
        "augmentation": Augmentation(0.5, flip=True),
    }
    source = changes.pop("source", None) or Source()
    return FeatureStore.build(source, encode, root=root, **(settings | changes))


def contents(store: FeatureStore) -> np.ndarray:
    return np.stack([np.stack([store[i, v] for v in range(store.views)]) for i in range(len(store))])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_BLOCK_BATCHES", 1)


def build_until_killed(root: Path, calls: int) -> None:
    features._BLOCK_BATCHES = 3
    build(root, Encode(kill_at=calls))


def build_together(root: Path, log: Path, dies: bool) -> None:
    """Starts together with two other processes and logs the number of batches that this one encoded.

    If `dies`, the process is killed while it holds a block.
    """
    features._BLOCK_BATCHES = 1
    encode = Encode(kill_at=1 if dies else None)

    def slow(images: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return encode(images)

    log.with_suffix(".ready").touch()
    limit = time.monotonic() + 60
    while len(list(log.parent.glob("*.ready"))) < 3:
        assert time.monotonic() < limit
        time.sleep(0.01)
    build(root, slow)
    log.write_text(str(len(encode.calls)))


def another_interpreter(function: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Calls a function of this file in a new process. Forking a process with JAX's threads may hang."""
    script = "import pathlib, runpy, sys; a = sys.argv; "
    script += "runpy.run_path(a[1])[a[2]](pathlib.Path(a[3]), *(eval(x) for x in a[4:]))"
    return subprocess.Popen([sys.executable, "-c", script, __file__, function, *map(str, arguments)])


def test_a_failed_build_continues_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", Encode())
    interrupted = Encode(fail_at=4)
    with pytest.raises(RuntimeError, match="encoder failed"):
        build(tmp_path / "parts", interrupted)
    (folder,) = (tmp_path / "parts").iterdir()
    with pytest.raises(UserError, match=r"not all of its 44 .* run the extraction again"):
        FeatureStore(folder)
    rest = Encode()
    store = build(tmp_path / "parts", rest)
    # Nothing is computed twice.
    assert len(interrupted.calls) + len(rest.calls) == -(-IMAGES * 2 // BATCH)
    np.testing.assert_array_equal(contents(store), contents(whole))
    again = Encode()
    build(tmp_path / "parts", again)
    assert not again.calls


@pytest.mark.parametrize("calls", [0, 5, 7])
def test_kill_9_loses_no_finished_block(tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    process = another_interpreter("build_until_killed", tmp_path / "parts", calls)
    assert process.wait(60) == -signal.SIGKILL
    monkeypatch.setattr(features, "_BLOCK_BATCHES", 3)
    rest = Encode()
    store = build(tmp_path / "parts", rest)
    assert len(rest.calls) == 11 - calls // 3 * 3
    np.testing.assert_array_equal(contents(store), contents(build(tmp_path / "whole", Encode())))


def test_processes_share_the_work_and_take_over_from_one_that_dies(tmp_path: Path) -> None:
    logs = [tmp_path / f"{n}.log" for n in range(3)]
    processes = [
        another_interpreter("build_together", tmp_path / "shared", f"pathlib.Path({str(log)!r})", log is logs[2])
        for log in logs
    ]
    assert [process.wait(60) for process in processes] == [0, 0, -signal.SIGKILL]
    counts = [int(log.read_text()) for log in logs[:2]]
    assert min(counts) > 0
    assert sum(counts) == 11 - 1  # nothing is computed twice; the third process wrote one batch before it died
    np.testing.assert_array_equal(
        contents(build(tmp_path / "shared", Encode())), contents(build(tmp_path / "whole", Encode()))
    )


def test_finished_blocks_of_an_earlier_store_are_ignored(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build(tmp_path / "parts", Encode(fail_at=5))
    (folder,) = (tmp_path / "parts").iterdir()
    (folder / "manifest.json").unlink()
    rest = Encode()
    np.testing.assert_array_equal(contents(build(tmp_path / "parts", rest)), contents(build(tmp_path / "w", Encode())))
    assert len(rest.calls) == 11


def test_views(tmp_path: Path) -> None:
    source = Source()
    store = build(tmp_path, Encode(), views=4)
    assert store.shape == (IMAGES, 4, SIZE, SIZE * 3)
    for i in range(IMAGES):
        plain = decode(source.images[i], SIZE)
        mirrored = plain[:, ::-1]
        views = [(store[i, v] * 8).astype(int).reshape(SIZE, SIZE, 3) for v in range(4)]
        np.testing.assert_array_equal(views[0], plain)
        if i % 3:
            np.testing.assert_array_equal(views[1], mirrored)
        else:
            assert (views[1] != mirrored).any()
            assert (views[1] != plain).any()
        assert (views[2] != views[3]).any()
    # A view depends on its image and its number only, not on the number of views.
    fewer = build(tmp_path, Encode(), views=3)
    assert fewer.folder != store.folder
    np.testing.assert_array_equal(contents(fewer), contents(store)[:, :3])


def test_a_part_has_the_features_of_the_whole(tmp_path: Path) -> None:
    """Also of random views, whose random numbers depend on the number of the image in the split."""
    images = [2, 3, 9, 17]
    part = build(tmp_path / "part", Encode(), views=3, images=images)
    whole = build(tmp_path / "whole", Encode(), views=3)
    assert isinstance(part, PartOfStore)
    assert (len(part), part.views, len(part.store)) == (IMAGES, 3, len(images))
    for store in (part, pickle.loads(pickle.dumps(part))):
        for image in images:
            for view in range(3):
                np.testing.assert_array_equal(store.read(image, view)[0], whole[image, view])
    encode = Encode()
    assert build(tmp_path / "whole", encode, views=3, images=images).shape == whole.shape  # the whole store is there
    assert not encode.calls


def test_views_need_a_crop(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="crop_scale_min"):
        build(tmp_path, Encode(), augmentation=Augmentation(flip=True))


def test_reading(tmp_path: Path) -> None:
    store = build(tmp_path, Encode())
    everything = contents(store)
    assert store[3, 1].dtype == np.float16
    for i, view in ((5, 1), (0, 0), (21, 1)):
        regions, mask = store.read(i, view)
        np.testing.assert_array_equal(regions, everything[i, view])
        assert mask is None
    np.testing.assert_array_equal(contents(pickle.loads(pickle.dumps(store))), everything)
    assert (store.folder / "regions.npy").stat().st_size == pytest.approx(everything.nbytes, abs=256)


def test_everything_that_changes_the_features_changes_the_folder(tmp_path: Path) -> None:
    class OtherCaptions(Source):
        def captions(self, i: int) -> tuple[str, ...]:
            return ("a bird",)

    variants = [
        {},
        {"key": {"encoder": "rows", "weights": "f01"}},
        {"key": {"encoder": "rows", "weights": "f00", "dtype": "bfloat16"}},
        {"views": 3},
        {"resize": "crop"},
        {"augmentation": Augmentation(0.6, flip=True)},
        {"dtype": "bfloat16"},
        {"source": Source(IMAGES - 1)},
        {"source": OtherCaptions()},
    ]
    folders = {build(tmp_path, Encode(), **variant).folder for variant in variants}
    assert len(folders) == len(variants)
    # With a single view, the augmentation does not matter.
    one = [build(tmp_path, Encode(), views=1, augmentation=Augmentation(scale)) for scale in (0.5, 1.0)]
    assert one[0].folder == one[1].folder


def test_values_beyond_float16_are_refused_and_fit_bfloat16(tmp_path: Path) -> None:
    class Large(Encode):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            return super().__call__(images) * 1e4

    with pytest.raises(UserError, match=r"up to 3\.15e\+05 do not fit float16; set data\.feature_dtype to bfloat16"):
        build(tmp_path, Large())
    store = build(tmp_path, Large(), dtype="bfloat16")
    assert str(store[0, 0].dtype) == "bfloat16"
    expected = decode(Source().images[2], SIZE).reshape(SIZE, -1).astype(np.float32) * 1250
    np.testing.assert_allclose(store[2, 0].astype(np.float32), expected, rtol=2**-8)
    assert str(store.read(1, 1)[0].dtype) == "bfloat16"


def test_nan_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        build(tmp_path, lambda images: np.full((BATCH, SIZE, SIZE * 3), np.nan))


def test_a_full_disk_keeps_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = 0

    def fsync(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs > 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(feature_files.os, "fsync", fsync)
        with pytest.raises(UserError, match=r"no disk space .* continues where it stopped"):
            build(tmp_path, Encode())
    rest = Encode()
    store = build(tmp_path, rest)
    assert 0 < len(rest.calls) < 11
    np.testing.assert_array_equal(contents(store), contents(build(tmp_path / "whole", Encode())))


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="are needed"):
        build(tmp_path, Encode())


@pytest.mark.parametrize(
    "text",
    [
        *(b"{", b"[]", b"\xff{}", b"[" * 100_000, b'{"shape": [1, 2], "done": true}'),
        *(b'{"shape": [2, 2, 2, %s], "done": true, "block_rows": 1, "dtype": "float16"}' % n for n in (b"-1", b"1.5")),
    ],
)
def test_a_damaged_manifest_says_what_to_do(tmp_path: Path, text: bytes) -> None:
    folder = build(tmp_path, Encode()).folder
    (folder / "manifest.json").write_bytes(text)
    for use in (lambda: FeatureStore(folder), lambda: build(tmp_path, Encode())):
        with pytest.raises(UserError, match=r"damaged .* delete the folder"):
            use()


def test_a_truncated_file_is_reported(tmp_path: Path) -> None:
    folder = build(tmp_path, Encode()).folder
    with (folder / "regions.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="damaged"):
        build(tmp_path, Encode())
    write_manifest(folder, done=False)
    with pytest.raises(UserError, match="size does not match the manifest"):
        build(tmp_path, Encode())


def write_manifest(folder: Path, **changes: object) -> None:
    """Changes a manifest as its writer would; None deletes an entry."""
    path = folder / "manifest.json"
    manifest = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    manifest.pop("digest", None)
    if "digests" in manifest:
        feature_files._write_manifest(folder, manifest)
    else:  # as earlier versions wrote it
        path.write_text(json.dumps(manifest))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_reported_or_changes_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path, Encode(), views=1).folder
    intact = contents(FeatureStore(folder))
    reported = dict.fromkeys(("regions.npy", "digests.bin", "manifest.json"), 0)
    rng = np.random.default_rng(0)
    for name in reported:
        for bit in rng.integers(8 * (folder / name).stat().st_size, size=60).tolist():
            flip(folder / name, bit)
            try:
                np.testing.assert_array_equal(contents(FeatureStore(folder)), intact)
            except UserError as error:
                reported[name] += bool(re.search(rf"{name} is damaged \(.*\): delete the folder {folder} ", str(error)))
            flip(folder / name, bit)
    # Blanks in the header and in the manifest change nothing.
    assert reported["regions.npy"] >= 58
    assert reported["digests.bin"] == 60
    assert reported["manifest.json"] > 50


def test_damage_is_found_when_its_row_is_read(tmp_path: Path) -> None:
    store = build(tmp_path, Encode())
    header = (store.folder / "regions.npy").stat().st_size - IMAGES * 2 * SIZE * SIZE * 3 * 2
    flip(store.folder / "regions.npy", 8 * (header + 7 * SIZE * SIZE * 3 * 2 + 11))
    opened = pickle.loads(pickle.dumps(store))
    opened.read(3, 0)
    for image in (3, 3 - IMAGES):
        with pytest.raises(UserError, match=r"regions\.npy is damaged \(row 7 has changed since it was written\)"):
            opened[image, 1]


def test_damage_to_a_half_built_store_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build(tmp_path, Encode(fail_at=5))
    (folder,) = tmp_path.iterdir()
    flip(folder / "regions.npy", 8 * 200)
    store = build(tmp_path, Encode())
    with pytest.raises(UserError, match="row 0 has changed"):
        store[0, 0]
    with pytest.raises(RuntimeError):
        build(tmp_path / "other", Encode(fail_at=5))
    (folder,) = (tmp_path / "other").iterdir()
    (folder / "digests.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"digests\.bin is damaged .* delete the folder"):
        build(tmp_path / "other", Encode())


def test_stores_of_earlier_versions_have_no_digests(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", Encode())
    expected = contents(whole)
    (whole.folder / "digests.bin").unlink()
    write_manifest(whole.folder, digests=None)
    np.testing.assert_array_equal(contents(FeatureStore(whole.folder)), expected)
    with pytest.raises(RuntimeError):
        build(tmp_path / "half", Encode(fail_at=5))
    (folder,) = (tmp_path / "half").iterdir()
    (folder / "digests.bin").unlink()
    write_manifest(folder, digests=None)
    rest = Encode()
    np.testing.assert_array_equal(contents(build(tmp_path / "half", rest)), expected)
    assert len(rest.calls) == 11 - 5


def test_the_store_of_other_features_under_this_name_is_refused(tmp_path: Path) -> None:
    one, other = build(tmp_path, Encode()), build(tmp_path, Encode(), key={"encoder": "columns"})
    shutil.rmtree(one.folder)
    other.folder.rename(one.folder)
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(its fingerprint is .* delete the folder"):
        build(tmp_path, Encode())


def link(folder: Path, name: str, target: Path) -> None:
    """Moves a file out of a half-built store and puts a link in its place."""
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    with pytest.raises(RuntimeError):
        build(tmp_path / "stores", Encode(fail_at=5))
    (folder,) = (tmp_path / "stores").iterdir()
    return folder


@pytest.mark.parametrize("name", ["lock", "regions.npy", "digests.bin"])
def test_links_in_a_store_are_not_followed(tmp_path: Path, half: Path, name: str) -> None:
    link(half, name, tmp_path / "target")
    if name == "lock":
        (tmp_path / "target").write_bytes(b"content of another file")
    before = (tmp_path / "target").read_bytes()
    with pytest.raises(UserError, match=f"{name} is a symbolic link; delete it"):
        build(tmp_path / "stores", Encode())
    assert (tmp_path / "target").read_bytes() == before


def test_a_link_in_the_place_of_the_manifest_is_replaced(tmp_path: Path, half: Path) -> None:
    link(half, "manifest.json", tmp_path / "target")
    before = (tmp_path / "target").read_bytes()
    assert b'"done": false' in before
    build(tmp_path / "stores", Encode())
    assert (tmp_path / "target").read_bytes() == before
    assert not (half / "manifest.json").is_symlink()
    assert b'"done": true' in (half / "manifest.json").read_bytes()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"features can't be written to .*Not a directory.* another --cache"):
        build(tmp_path / "file" / "stores", Encode())


def test_an_unreadable_image_is_reported_by_name(tmp_path: Path) -> None:
    source = Source()
    source.images[7] = b"no image"
    with pytest.raises(UserError, match=r"tiny: 7\.png: .*prepare the dataset again"):
        build(tmp_path, Encode(), source=source)
