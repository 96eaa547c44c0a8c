"""The outputs of `imgcap caption`: what is written beside, inside and instead of lines, and what is never replaced."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.captioner import Caption, Captioner
from imgcap_jax.captioning.files import caption_files
from imgcap_jax.captioning.metadata import Metadata
from imgcap_jax.captioning.outputs import Gallery, Output, Pictures, Sidecars, Table
from imgcap_jax.cli.main import main
from imgcap_jax.data.photo_files import photo_files
from imgcap_jax.errors import UserError

TEXT = 'a "red" dog, running, in the snow'


class Stub(Captioner):
    """Two captions per photo; the first one has a confidence."""

    def __init__(self) -> None:
        data = SimpleNamespace(image_size=8, resize="squash")
        self.runs = [SimpleNamespace(experiment=SimpleNamespace(data=data), folder=Path("model"))]  # type: ignore[list-item]
        self.seen = 0

    def turns(self, images: Iterable[Sequence[np.ndarray] | None], first_row: int = 0) -> Iterator[list[list[Caption]]]:
        for image in images:
            if image is not None:
                self.seen += 1
                words = tuple(TEXT.split())
                maps = np.full((len(words), 4), 0.25, np.float32)
                best = Caption(TEXT, -1.5, words, (-0.2,) * len(words), -0.5, maps, 0.75)
                yield [[best, Caption("a cat", -9.0, ("a", "cat"), (-4.0, -5.0), -3.0)]]


def photo(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path, **options)  # type: ignore[arg-type]
    return path


def run(files: Sequence[Path], *outputs: Output, captioner: Stub | None = None) -> list[str]:
    return [line for line, _ in caption_files(captioner or Stub(), files, outputs, quiet=True)]


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_table_can_be_read_by_other_programs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    files = [photo(tmp_path / f"{name}.png") for name in ("a", "new\nline", 'c"')]
    path = tmp_path / "captions.csv"
    assert run(files[:2], Table(path, resume=False)) == []
    head, *found = rows(path)
    assert head == ["file", "rank", "caption", "confidence", "score", "log_prob"]
    best = ["1", TEXT, "0.7500", "-0.50000", "-1.50000"]
    assert found[:2] == [[str(files[0]), *best], [str(files[0]), "2", "a cat", "", "-3.00000", "-9.00000"]]
    assert [row[0] for row in found] == [str(file) for file in files[:2] for _ in range(2)]
    # The process is killed while it writes the captions of the third photo.
    whole = path.read_bytes()
    path.write_bytes(whole + f'"{files[2]}",1,"a dog",,-1,-2\r\n"{files[2]}",2,"half a cap'.encode())
    table = Table(path, resume=True)
    assert [table.has(file) for file in files] == [True, True, False]
    run([file for file in files if not table.has(file)], table)
    assert path.read_bytes().startswith(whole)
    assert [row[0] for row in rows(path)[1:]] == [str(file) for file in files for _ in range(2)]
    path.write_text("something,else\r\n1,2\r\n")
    with pytest.raises(UserError, match="its columns are not file, rank"):
        Table(path, resume=True)
    assert path.read_text().startswith("something")


def test_a_text_file_beside_a_photo_is_never_replaced_unless_asked(tmp_path: Path) -> None:
    files = [photo(tmp_path / name) for name in ("a.png", "b.png", "b.jpg")]
    (tmp_path / "a.txt").write_text("my own words")
    lines = run(files, Sidecars(overwrite=False))
    assert [line.partition("; ")[2] for line in lines[:2]] == ["its caption is not written"] * 2
    assert lines[2:] == ["imgcap: captioned 3 of 3 photos; left out 0; 2 of the captioned ones lack an output"]
    assert "a.txt exists (--overwrite replaces it)" in lines[0]
    assert "b.txt belongs to another photo of the same name" in lines[1]
    assert (tmp_path / "a.txt").read_text() == "my own words"
    assert (tmp_path / "b.txt").read_text() == TEXT + "\n"
    assert [Sidecars(overwrite=False).has(file) for file in files] == [True] * 3
    assert run(files[:1], Sidecars(overwrite=True)) == []
    assert (tmp_path / "a.txt").read_text() == TEXT + "\n"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_a_caption_in_a_photo_leaves_its_pixels_and_other_metadata_as_they_are(tmp_path: Path, name: str) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="writes metadata: pip install pyexiv2")
    exif = Image.Exif()
    exif[0x013B], exif[0x0112] = "An artist", 6
    path = photo(tmp_path / name, exif=exif, dpi=(300, 300))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    path.chmod(0o640)
    before = np.asarray(Image.open(path))
    assert run([path], Metadata(overwrite=False)) == []
    np.testing.assert_array_equal(np.asarray(Image.open(path)), before)
    assert (path.stat().st_mtime, path.stat().st_mode & 0o777) == (1_000_000_000, 0o640)
    image = pyexiv2.Image(str(path))
    found, xmp = image.read_exif(), image.read_xmp()
    image.close()
    assert found["Exif.Image.ImageDescription"] == TEXT
    assert found["Exif.Image.Artist"] == "An artist"
    assert found["Exif.Image.Orientation"] == "6"
    assert xmp == {"Xmp.iptc.AltTextAccessibility": {'lang="x-default"': TEXT}}
    # What a person has written is kept.
    (line,) = run([path], Metadata(overwrite=False))
    assert "it has the description" in line
    assert line.endswith("nothing is written into it")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_metadata_in_other_encodings_is_kept_and_stops_nothing(tmp_path: Path) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="writes metadata: pip install pyexiv2")
    artist, described = photo(tmp_path / "a.jpg"), photo(tmp_path / "b.jpg")
    for path, key, text in (
        (artist, "Exif.Image.Artist", "Jos\xe9"),
        (described, "Exif.Image.ImageDescription", "M\xfc"),
    ):
        image = pyexiv2.Image(str(path))
        image.modify_exif({key: text}, encoding="latin-1")
        image.close()
    other = photo(tmp_path / "c.jpg")
    with open(os.fsencode(tmp_path) + b"/d\xe9.jpg", "wb") as file:
        file.write(other.read_bytes())
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9.jpg"))
    lines = run([artist, described, strange, other], Metadata(overwrite=False))
    assert len(lines) == 3
    assert "it has the description" in lines[0]
    assert "not UTF-8" in lines[1]
    image = pyexiv2.Image(str(artist))
    assert image.read_exif(encoding="latin-1")["Exif.Image.Artist"] == "Jos\xe9"
    image.close()


def test_a_format_without_metadata_is_reported_and_left_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("pyexiv2", reason="writes metadata: pip install pyexiv2")
    path = photo(tmp_path / "a.gif")
    before = path.read_bytes()
    (line,) = run([path], Metadata(overwrite=False))
    assert "not supported" in line
    assert path.read_bytes() == before


def test_a_page_has_each_photo_once_with_its_captions(tmp_path: Path) -> None:
    files = [photo(tmp_path / name) for name in ("a.png", "<b>.png")]
    (tmp_path / "c.png").write_bytes(b"no image")
    lines = run([*files, tmp_path / "c.png"], Gallery(Stub(), tmp_path / "page.html", files))
    assert len(lines) == 2
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure") == page.count("data:image/") == 2
    assert page.count("<dd>a cat") == 2
    assert page.count("confidence 75 %") == 2
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page
    with pytest.raises(UserError, match="too many for one page"):
        Gallery(Stub(), tmp_path / "page.html", files * 1001)


def test_subfolders_are_searched_only_if_asked_and_without_circles(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.jpg", "a/d/e.PNG", ".hidden/f.jpg"):
        photo(tmp_path / name)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert photo_files([tmp_path]) == [tmp_path / "b.jpg"]
    found = photo_files([tmp_path, tmp_path / "b.jpg"], recursive=True)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.jpg", "a/c.jpg", "a/d/e.PNG"]
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(UserError, match="--recursive searches subfolders"):
        photo_files([tmp_path])


def test_what_is_there_is_never_replaced_unless_asked(
    trained: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path, table = photo(tmp_path / "a.png"), tmp_path / "b.csv"
    table.write_text("a night's work")
    for option in ("--csv", "--html", "--results"):
        command = ["caption", str(path), "--run", str(trained), option]
        assert "exists; --overwrite replaces it" in refused([*command, str(table)])
        assert "a.png exists" in refused([*command, str(path)])  # as in --csv *.png
        assert "is a photo, and an output" in refused([*command, str(path), "--overwrite"])
    # Another output refuses the photos: nothing has been written yet.
    end = ["--csv", str(table), "--overwrite", "--results", str(tmp_path / "r.json")]
    assert "does not end in an image id" in refused(["caption", str(path), "--run", str(trained), *end])
    assert table.read_text() == "a night's work"
    assert main(["caption", str(path), "--run", str(trained), "--csv", str(table), "--overwrite"]) == 0
    assert len(rows(table)) == 2


def test_pictures_of_a_resumed_call_do_not_replace_those_of_other_photos(tmp_path: Path) -> None:
    files = [photo(tmp_path / name / "same.png") for name in ("a", "b")]
    for part in ([files[0]], [files[1]]):  # interrupted after the first
        run(part, Pictures(Stub(), tmp_path / "maps", files))
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["same_2_attention.png", "same_attention.png"]


def test_all_outputs_are_closed_if_one_fails(tmp_path: Path) -> None:
    class Failing(Sidecars):
        def close(self) -> None:
            raise UserError("no")

    path = photo(tmp_path / "a.png")
    page = tmp_path / "page.html"
    with pytest.raises(UserError, match="no"):
        run([path], Failing(overwrite=False), Gallery(Stub(), page, [path]))
    assert page.exists()


def test_options_without_effect_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = str(photo(tmp_path / "a.png"))
    for options, message in (
        (["--resume"], "--resume needs --csv or --sidecar"),
        (["--overwrite"], "--overwrite has no effect without"),
        (["--resume", "--csv", "x.csv", "--html", "x.html"], "contain the photos of one call only"),
        (["--resume", "--csv", "x.csv", "--results", "x.json"], "contain the photos of one call only"),
        (["--csv", "x", "--html", "x"], "two outputs are the same file"),
        (["--resume", "--sidecar", "--overwrite"], "leave out one of them"),
        (["--attention-dir", "x"], "--attention-dir has no effect without"),
    ):
        assert message in refused(["caption", path, *options])
