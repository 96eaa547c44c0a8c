"""Where the captions of image files go: lines, tables, pictures, a page, and files beside the photos."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from imgcap_jax.captioner import Caption, Captioner
from imgcap_jax.errors import UserError, printable
from imgcap_jax.files import check_writable, disk_errors, reading, replacing, write_text
from imgcap_jax.image_ids import LIMIT
from imgcap_jax.metrics.coco_format import write_results
from imgcap_jax.report.attention import attention_picture
from imgcap_jax.report.figures import Row, WordAttention
from imgcap_jax.report.page import caption_page

_THUMBNAIL = 320  # the longer side of a photo in a gallery, in pixels
_GALLERY_MOST = 2_000  # photos of a gallery: 20 KB each on the page, 0.2 MB in memory


class Output(Protocol):
    """Receives the captions of photos, one photo at a time.

    Attributes:
        missing: what a photo lacks if the output fails for it, for a message, as in "no picture of its attention".
    """

    missing: str

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """Writes the captions of a photo, best first, and yields lines to print.

        Raises:
            ImageError, OSError, UserError: it fails for this photo.
        """
        ...

    def close(self) -> None:
        """Called once, after the last photo or an error. Raises UserError if the output can't be written."""
        ...


class Pictures:
    """Pictures of the attention of the words of the best caption.

    Attributes:
        latest: the picture of the latest photo; None: it could not be drawn.
    """

    missing = "no picture of its attention"

    def __init__(self, captioner: Captioner, folder: Path, photos: Sequence[Path]) -> None:
        """Writes nothing yet.

        Args:
            captioner: draws the part of a photo that the model sees.
            folder: of the pictures.
            photos: all photos, also those that an earlier call has captioned, which determine the names of pictures.
        """
        self._captioner, names = captioner, set[str]()
        self._files = {path: folder / _new_name(path, names) for path in photos}
        self.latest: Path | None = None

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        self.latest = None
        best, picture = captions[0], self._files[path]
        assert best.attention is not None
        view = self._captioner.view(path)
        attention_picture(view, best.words, best.log_probs, best.attention, picture)
        self.latest = picture
        return iter(())

    def close(self) -> None:
        """See ``Output``."""


class Lines:
    """One line per caption: text, or JSON."""

    missing = "its captions are not printed"

    def __init__(self, *, as_json: bool, pictures: Pictures | None = None) -> None:
        """Args:

        as_json: whether lines are JSON.
        pictures: an output that comes before this one, whose pictures are named.
        """
        self._as_json, self._pictures = as_json, pictures

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        picture = None if self._pictures is None else self._pictures.latest
        for rank, caption in enumerate(captions, 1):
            if self._as_json:
                maps = None if caption.attention is None else np.round(caption.attention.astype(float), 5).tolist()
                shown = {"picture": _text(picture)} if picture is not None and rank == 1 else {}
                yield json.dumps({"file": _text(path), "rank": rank, **asdict(caption), "attention": maps, **shown})
                continue
            place = f" {rank}. [score {caption.score:.2f}]" if len(captions) > 1 else ""
            sure = "" if caption.confidence is None else f" (confidence {100 * caption.confidence:.0f} %)"
            yield f"{shown_path(path)}:{place} {printable(caption.text)}{sure}"
        if picture is not None and not self._as_json:
            yield f"{shown_path(path)}: attention of its words: {shown_path(picture)}"

    def close(self) -> None:
        """See ``Output``."""


class CocoResults:
    """A file of the best captions in COCO's format, where `COCO_test2014_000000000016.jpg` is image 16."""

    missing = "its caption is not among the results"

    def __init__(self, file: Path, photos: Sequence[Path]) -> None:
        """Raises UserError if the name of a photo does not end in a number, or two end in the same one."""
        self._ids = _image_ids(photos)
        check_writable(file)
        self._file, self._found = file, dict[int, str]()

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        self._found[self._ids[path]] = captions[0].text
        return iter(())

    def close(self) -> None:
        """See ``Output``."""
        if self._found:
            write_results(self._file, self._found)


_COLUMNS = ("file", "rank", "caption", "confidence", "score", "log_prob")


class Table:
    """A CSV file with one row per caption, which grows while photos are captioned."""

    missing = "its captions are not in the table"

    def __init__(self, file: Path, *, resume: bool) -> None:
        """Opens the file.

        Args:
            file: is replaced, unless ``resume`` is set.
            resume: whether rows are added to an existing file. If its end is not complete, the rows of the last photo
                are deleted.

        Raises:
            UserError: the file can't be written, or it is not such a table.
        """
        check_writable(file)
        self._done = set[str]()
        text = self._complete(file) if resume and file.exists() else ""
        self._file = file
        with disk_errors(f"writing {file}"):
            write_text(file, text or _row(_COLUMNS))
            self._stream = file.open("a", encoding="utf-8", newline="")

    def _complete(self, file: Path) -> str:
        with reading(file, "give another file, or leave out --resume"):
            with file.open(encoding="utf-8", newline="") as stream:
                text = stream.read()
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=False))
            if rows and not text.endswith("\r\n"):
                rows.pop()
                last = rows[-1][:1] if len(rows) > 1 else []
                while len(rows) > 1 and rows[-1][:1] == last:  # it may lack captions
                    rows.pop()
            if rows and tuple(rows[0]) != _COLUMNS:
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            self._done = {os.path.abspath(row[0]) for row in rows[1:]}
            return "".join(map(_row, rows))

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        rows = [
            (
                _text(path),
                rank,
                one.text,
                "" if one.confidence is None else f"{one.confidence:.4f}",
                f"{one.score:.5f}",
                f"{one.log_prob:.5f}",
            )
            for rank, one in enumerate(captions, 1)
        ]
        self._stream.write("".join(map(_row, rows)))  # at once: a photo is in the table with all captions or none
        self._stream.flush()
        return iter(())

    def has(self, path: Path) -> bool:
        """Whether an earlier call has captioned a photo."""
        return os.path.abspath(_text(path)) in self._done

    def close(self) -> None:
        """See ``Output``."""
        with disk_errors(f"writing {self._file}"):
            self._stream.close()


def _row(values: Sequence[object]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)  # ends in \r\n, as RFC 4180 says
    return line.getvalue()


class Gallery:
    """An HTML page with all photos and their captions, without other files."""

    missing = "it is not on the page"

    def __init__(self, captioner: Captioner, file: Path, photos: Sequence[Path]) -> None:
        """Raises UserError if there are too many photos for one page, or if the file can't be written."""
        if len(photos) > _GALLERY_MOST:
            raise UserError(
                f"{len(photos):,} photos are too many for one page (at most {_GALLERY_MOST:,}); use --csv, or caption "
                f"one folder at a time"
            )
        check_writable(file)
        self._captioner, self._file, self._rows = captioner, file, list[Row]()

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        best, *others = captions
        view = self._captioner.view(path)
        name = shown_path(path)
        sure = "" if best.confidence is None else f"confidence {100 * best.confidence:.0f} %"
        self._rows.append(
            Row(
                _reduced(view),
                best.text,
                verdict=sure,
                note=name,
                attention=self._attention(best),
                others=tuple((f"{rank}.", one.text, "") for rank, one in enumerate(others, 2)),
                name=best.text,
            )
        )
        return iter(())

    def _attention(self, caption: Caption) -> WordAttention | None:
        maps = caption.attention
        side = 0 if maps is None else math.isqrt(maps.shape[-1])
        separator = " "
        if maps is None or side * side != maps.shape[-1] or separator.join(caption.words) != caption.text:
            return None
        return WordAttention(caption.words, separator, maps.reshape(-1, side, side))

    def close(self) -> None:
        """See ``Output``."""
        if self._rows:
            facts = {
                "photos": f"{len(self._rows):,}",
                "model": ", ".join(self._captioner.names),
            }
            caption_page(self._rows, self._file, "Captions", {}, facts=facts)


def _reduced(view: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(view)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


class Sidecars:
    """A text file beside each photo, with its best caption: `dog.txt` beside `dog.jpg`."""

    missing = "its caption is not written"

    def __init__(self, *, overwrite: bool) -> None:
        """overwrite: whether files that are already there are replaced."""
        self._overwrite, self._written = overwrite, set[Path]()

    def has(self, path: Path) -> bool:
        """Whether a photo has such a file."""
        return path.with_suffix(".txt").exists()

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``."""
        file = path.with_suffix(".txt")
        if file == path:
            raise UserError("the photo itself has the name of its text file")
        if file in self._written:
            raise UserError(f"{shown_path(file)} belongs to another photo of the same name")
        if not self._overwrite and os.path.lexists(file):
            raise UserError(f"{shown_path(file)} exists (--overwrite replaces it)")
        with replacing(file) as temporary:
            temporary.write_text(captions[0].text + "\n", encoding="utf-8")
        self._written.add(file)
        return iter(())

    def close(self) -> None:
        """See ``Output``."""


def shown_path(path: Path) -> str:
    """A path in one printable line."""
    return printable(str(path))


def _text(path: Path) -> str:
    """A path for JSON and CSV. Bytes that are not UTF-8 are escaped, because these have only whole characters."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _image_ids(files: Sequence[Path]) -> dict[Path, int]:
    """COCO's image ids: the numbers at the end of file names, after a separator (the end of a hash is not an id)."""
    image_ids: dict[Path, int] = {}
    named: dict[int, Path] = {}
    for path in files:
        if not path.exists():
            raise UserError(f"{shown_path(path)}: no such file or folder")
        found = re.search(r"(?<![0-9A-Za-z])[0-9]{1,19}\Z", path.stem)
        if found is None or int(found[0]) >= LIMIT:
            raise UserError(
                f"{shown_path(path)}: its name does not end in an image id, as COCO's do; leave out --results"
            )
        number = int(found[0])
        if number in named:
            both = f"{shown_path(path)} and {shown_path(named[number])}"
            raise UserError(f"{both} are both image {number}; leave one of them out")
        named[number], image_ids[path] = path, number
    return image_ids


def _new_name(path: Path, taken: set[str]) -> str:
    """The name of a picture: that of the photo, numbered if photos of several folders share a name."""
    name, number = f"{path.stem}_attention.png", 2
    while name in taken:
        name, number = f"{path.stem}_{number}_attention.png", number + 1
    taken.add(name)
    return name
