"""`imgcap caption`: every file is reported, none is lost, and every name can be printed."""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imgcap_jax import captioner as module
from imgcap_jax.captioner import Caption, Captioner
from imgcap_jax.captioning import outputs as outputs_module
from imgcap_jax.captioning.files import caption_files
from imgcap_jax.captioning.outputs import CocoResults, Lines, Output, Pictures
from imgcap_jax.cli.main import main
from imgcap_jax.data import image_files
from imgcap_jax.data.photo_files import photo_files
from imgcap_jax.data.scenes.builder import encode_png
from imgcap_jax.data.scenes.world import draw_scene, sample_scene
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.run.folder import Run


class Stub(Captioner):
    """Reads photos as a captioner does. Its captions name the red value of the photo."""

    def __init__(self) -> None:
        data = SimpleNamespace(image_size=8, resize="squash")
        self.runs = [SimpleNamespace(experiment=SimpleNamespace(data=data))]  # type: ignore[list-item]

    def turns(self, images: Iterable[Sequence[np.ndarray] | None], first_row: int = 0) -> Iterator[list[list[Caption]]]:
        yield [
            [Caption(f"red {image[0][0, 0, 0]}", -1.0, ("red",), (-1.0,), -1.0, np.full((1, 4), 0.25))]
            for image in images
            if image is not None
        ]


def photo(path: Path | bytes, red: int = 200, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> None:
    with open(path, "wb") as file:
        Image.new("RGB", size, (red, 0, 0)).save(file, kind)


def caption(
    *paths: Path,
    captioner: Captioner | None = None,
    as_json: bool = False,
    pictures: Path | None = None,
    results: Path | None = None,
    more: Sequence[Output] = (),
) -> tuple[list[str], list[str]]:
    """The lines of captions and the lines of failures."""
    lines = list(captioned(captioner or Stub(), photo_files(paths), as_json, pictures, results, more))
    return [line for line, failed in lines if not failed], [line for line, failed in lines if failed]


def captioned(
    captioner: Captioner,
    files: Sequence[Path],
    as_json: bool = False,
    pictures: Path | None = None,
    results: Path | None = None,
    more: Sequence[Output] = (),
) -> Iterator[tuple[str, bool]]:
    drawn = None if pictures is None else Pictures(captioner, pictures, files)
    outputs: list[Output] = [] if drawn is None else [drawn]
    outputs += [] if results is None else [CocoResults(results, files)]
    return caption_files(captioner, files, [*outputs, *more, Lines(as_json=as_json, pictures=drawn)])


NAMES = {  # as bytes on the disk, as printed, and as JSON
    b"caf\xe9.png": ("caf\\xe9.png", "caf\\xe9.png"),
    b"a\nb.png": ("a\\nb.png", "a\nb.png"),
    b"\x1b[31mred\x7f.png": ("\\x1b[31mred\\x7f.png", "\x1b[31mred\x7f.png"),
    "two\u2028lines.png".encode(): ("two\\u2028lines.png", "two\u2028lines.png"),
    "写真 😀.png".encode(): ("写真 😀.png", "写真 😀.png"),
    b"-dash.PNG": ("-dash.PNG", "-dash.PNG"),
}


def test_every_file_name_is_printed_in_one_line_and_valid_in_json(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in NAMES:
        photo(os.path.join(os.fsencode(folder), name))
    lines, failures = caption(folder)
    assert sorted(lines) == sorted(f"{folder}/{printed}: red 200" for printed, _ in NAMES.values())
    assert not failures
    assert all(line.encode() and len(line.splitlines()) == 1 for line in lines)
    lines, failures = caption(folder, as_json=True, pictures=tmp_path / "maps")
    assert not failures
    found = [json.loads(line.encode()) for line in lines]
    assert {one["file"] for one in found} == {f"{folder}/{name}" for _, name in NAMES.values()}
    for one in found:
        one["picture"].encode()
    assert len(list((tmp_path / "maps").iterdir())) == len(NAMES)


def test_all_photos_of_a_folder_are_captioned_or_reported(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.AVIF", "c.ppm"):  # the name does not decide how a file is read
        photo(tmp_path / name)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    os.mkfifo(tmp_path / "pipe.png")
    lines, failures = caption(tmp_path)
    assert lines == [f"{tmp_path}/{name}: red 200" for name in ("a.jfif", "b.AVIF", "c.ppm")]
    assert failures == [
        f"imgcap: {tmp_path}/dangling.jpg: No such file or directory; not captioned",
        f"imgcap: {tmp_path}/empty.png: the file is empty; not captioned",
        f"imgcap: {tmp_path}/loop.jpg: Too many levels of symbolic links; not captioned",
        f"imgcap: {tmp_path}/phone.heic: a HEIC image; convert it to JPEG ("
        f"{image_files.READS} are read); not captioned",
        f"imgcap: {tmp_path}/pipe.png: is a device or a pipe, not a file; not captioned",
        "imgcap: captioned 3 of 8 photos; left out 5",
    ]


def test_captions_and_failures_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    """Files are read in threads, and more than one batch of them ahead."""
    bad = (0, 1, 7, 33, 70, 98, 99)
    for number in range(100):
        path = tmp_path / f"{number:02}.png"
        if number in bad:
            path.write_bytes(b"no image")
        else:
            photo(path, number, (8, 8) if number % 3 else (900, 900))
    found = list(captioned(Stub(), photo_files([tmp_path])))
    *found, (last, _) = found
    assert last == "imgcap: captioned 93 of 100 photos; left out 7"
    assert [failed for _, failed in found] == [number in bad for number in range(100)]
    for number, (line, failed) in enumerate(found):
        assert f"{number:02}.png: " + ("unknown image format" if failed else f"red {number}") in line


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [(1, 1)]),
        (2, [(2, 8)]),
        (8, [(8, 8)]),
        (9, [(8, 8), (1, 8)]),
        (25, [(25, 32)]),
        (33, [(32, 32), (1, 8)]),
        (80, [(32, 32), (32, 32), (8, 8), (8, 8)]),
    ],
)
def test_a_remainder_of_photos_is_padded_to_batches_of_8(count: int, sizes: list[tuple[int, int]]) -> None:
    """More sizes would be compiled too."""
    images = [[np.full((2, 2, 3), number, np.uint8)] for number in range(count)]
    batches = [batch for batch in Stub()._batches(images, first_row=5) if batch is not None]
    assert [(batch.real, len(batch.rows)) for batch in batches] == sizes
    assert all(len(own) == len(batch.rows) for batch in batches for own in batch.images)
    rows = [row for batch in batches for row in batch.rows[: batch.real].tolist()]
    assert rows == list(range(5, 5 + count))
    shown = [red for batch in batches for red in batch.images[0][: batch.real, 0, 0, 0].tolist()]
    assert shown == list(range(count))


def test_samples_of_a_photo_in_a_folder_depend_on_its_place_only(trained: Path, tmp_path: Path) -> None:
    """Two batches are computed at a time, by one compiled program per size of a batch."""
    for number in range(70):
        (tmp_path / f"{number:02}.png").write_bytes(encode_png(draw_scene(sample_scene("test", number % 5), 32)))
    files = photo_files([tmp_path])
    captioner = Captioner(Run.load(trained), Decoding(samples=2, max_words=6))
    lines = [json.loads(line) for line, _ in captioned(captioner, files, as_json=True)]
    assert captioner._captions._cache_size() == 2  # type: ignore[attr-defined]
    for place in (0, 35, 69):
        [[alone]] = captioner.stream([captioner.pixels(files[place])], place)
        assert [one["text"] for one in lines[2 * place : 2 * place + 2]] == [one.text for one in alone]


def test_an_interruption_in_the_third_batch_leaves_the_lines_and_results_of_the_first_two(tmp_path: Path) -> None:
    for number in range(5 * module.BATCH):
        photo(tmp_path / f"{number:03}.png", number % 256)

    class Interrupted(Stub):
        def _caption(self, batch: module._Batch) -> list[list[Caption]]:
            if batch.rows[0] >= 2 * module.BATCH:
                raise KeyboardInterrupt
            return [[Caption(f"red {image[0, 0, 0]}", -1.0, (), (), -1.0)] for image in batch.images[0]]

        turns = Captioner.turns

    found = captioned(Interrupted(), photo_files([tmp_path]), results=tmp_path / "results.json")
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        lines.extend(line for line, _ in found)  # keeps those before the error
    assert [line.partition(": ")[2] for line in lines] == [f"red {number}" for number in range(2 * module.BATCH)]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2 * module.BATCH


def test_lines_and_failures_do_not_wait_for_photos_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    go_on = threading.Event()  # without it, the last photo is never read
    for number in range(5):
        photo(tmp_path / f"{number}.png", number)
    (tmp_path / "0.png").write_bytes(b"no image")

    class Slow(Stub):
        def pixels(self, photo: Any) -> list[np.ndarray]:
            if photo.name == "4.png":
                assert go_on.wait(60)
            return super().pixels(photo)

        def _caption(self, batch: module._Batch) -> list[list[Caption]]:
            return [[Caption(f"red {image[0, 0, 0]}", -1.0, (), (), -1.0)] for image in batch.images[0]][: batch.real]

        turns = Captioner.turns

    found = captioned(Slow(), photo_files([tmp_path]))
    assert next(found)[1]
    go_on.set()
    assert [line.partition(": ")[2] for line, failed in found if not failed] == ["red 1", "red 2", "red 3", "red 4"]


def test_batches_are_captioned_with_the_settings_of_jax_in_the_callers_thread() -> None:
    found: list[tuple[object, object]] = []

    class Recording(Stub):
        def _caption(self, batch: module._Batch) -> list[list[Caption]]:
            found.append((jax.config.jax_default_matmul_precision, jnp.zeros(3).devices()))  # type: ignore[attr-defined]
            return [[] for _ in range(batch.real)]

        turns = Captioner.turns

    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices()[1]):
        assert sum(map(len, Recording().stream([[np.zeros((2, 2, 3), np.uint8)]] * 80))) == 80
    assert found == [("highest", {jax.devices()[1]})] * 4


def test_a_bad_photo_of_a_list_is_an_error_before_any_is_captioned() -> None:
    with pytest.raises(image_files.ImageError):  # a stub cannot caption
        Stub.n_best(Stub(), [np.zeros((4, 4, 3), np.uint8)] * 40 + [b"no image"])


def test_photos_that_are_all_missing_are_an_error_before_the_run_is_loaded(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    end = ["--run", str(tmp_path / "no_run")]
    assert refused(["caption", "gone.jpg", *end]) == "imgcap: gone.jpg: no such file or folder; check the path"
    assert "a.jpg, b.jpg, c.jpg and 1 more: no such" in refused(["caption", "a.jpg", "b.jpg", "c.jpg", "d.jpg", *end])
    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}; give" in refused(["caption", str(tmp_path / "empty"), *end])
    photo(tmp_path / "there.png")
    assert "no_run" in refused(["caption", "gone.jpg", str(tmp_path / "there.png"), *end])


def test_a_url_is_shown_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://example.org/photos//1.jpg"
    with pytest.raises(SystemExit):
        main(["caption", url, "--run", "no_run"])
    assert f"{url} is a URL; download the photo first" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{url} is a URL; download the photo first"):
        Stub()([url])


def test_a_picture_that_fails_loses_neither_its_caption_nor_the_photos_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reds = (10, 20, 30, 40)
    for red in reds:
        photo(tmp_path / f"photo_{red}.png", red)
    draw = outputs_module.attention_picture
    errors: dict[int, Exception] = {
        10: OSError(28, "No space left on device"),
        20: image_files.ImageError("damaged\nin two lines"),
        30: UserError("the folder can't be written"),
    }

    def drawn(pixels: np.ndarray, *rest: object) -> None:
        if error := errors.get(int(pixels[0, 0, 0])):
            raise error
        draw(pixels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs_module, "attention_picture", drawn)
    results = tmp_path / "results.json"
    lines, failures = caption(tmp_path, pictures=tmp_path / "maps", results=results)
    assert [line for line in lines if "attention of its words" not in line] == [
        f"{tmp_path}/photo_{red}.png: red {red}" for red in reds
    ]
    reasons = ("No space left on device", "damaged in two lines", "the folder can't be written")
    assert failures == [
        f"imgcap: {tmp_path}/photo_{red}.png: {reason}; no picture of its attention"
        for red, reason in zip(reds, reasons, strict=False)
    ] + ["imgcap: captioned 4 of 4 photos; left out 0; 3 of the captioned ones lack an output"]
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["photo_40_attention.png"]
    assert len(json.loads(results.read_text())) == len(reds)
    lines, _ = caption(tmp_path, pictures=tmp_path / "maps", as_json=True)
    assert ["picture" in json.loads(line) for line in lines] == [False, False, False, True]


def test_the_picture_of_a_huge_jpeg_is_drawn_at_a_reduced_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 0.3)
    photo(tmp_path / "pano.jpg", size=(2000, 1000), kind="JPEG")
    photo(tmp_path / "pano.png", size=(2000, 1000))
    photo(tmp_path / "zebra.png")
    assert Stub().view(tmp_path / "pano.jpg").shape == (256, 512, 3)
    lines, failures = caption(tmp_path, pictures=tmp_path / "maps")
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"pano_attention.png", "zebra_attention.png"}
    assert len(lines) == 4
    assert len(failures) == 2
    assert "pano.png: the image has 2000 x 1000 pixels (2 megapixels); images of at most 0.3 megapixels" in failures[0]


def test_ids_of_results_are_at_the_very_end_of_a_name_and_fit_64_bits(tmp_path: Path) -> None:
    for name in ("photo_7\n.png", f"photo_{2**63}.png"):
        photo(tmp_path / name)
        with pytest.raises(UserError, match="does not end in an image id") as raised:
            caption(tmp_path / name, results=tmp_path / "results.json")
        assert len(str(raised.value).splitlines()) == 1
        (tmp_path / name).unlink()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_strict_terminal(
    trained: Path, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 100.0)
    for name in (b"caf\xe9.png", "写真.png".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encode_png(draw_scene(sample_scene("test", 0), 32)))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict"))
    assert main(["caption", str(tmp_path), "--run", str(trained), "--max-megapixels", "0.01"]) == 0
    lines = printed.getvalue().decode(encoding).splitlines()
    shown = "写真" if encoding == "utf-8" else "\\u5199\\u771f"
    assert [line.partition(": ")[0] for line in lines] == [f"{tmp_path}/caf\\xe9.png", f"{tmp_path}/{shown}.png"]
    assert image_files.MAX_MEGAPIXELS == 0.01
    assert main(["caption", str(tmp_path), "--run", str(trained), "--max-megapixels", "0.001"]) == 2
    assert main(["caption", str(tmp_path), "--run", str(trained), "--max-megapixels", "0"]) == 2


def test_a_dataset_is_prepared_with_the_limit_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 100.0)
    photo(tmp_path / "a.png", size=(30, 20))
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "captions": ["a dog"], "split": "train"}\n')
    command = ["data", "prepare", str(tmp_path), "--name", "limited", "--data-dir", str(tmp_path / "data")]
    assert "30 x 20 pixels" in refused([*command, "--max-megapixels", "0.0005"])
    assert main([*command, "--max-megapixels", "0.0006"]) == 0


def test_progress_is_shown_where_there_is_no_terminal(tmp_path: Path, progress_lines: list[str]) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    caption(tmp_path)
    assert [line.split("  ")[0] for line in progress_lines] == [f"captioning: {done}/3 photos" for done in (1, 2, 3)]
