"""`folder`: builds a dataset from a folder of images and its annotation files (see `annotations`)."""

import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from imgcap_jax.data.builders.annotations import ListedImage, find_annotations, read_annotations
from imgcap_jax.data.builders.base import CaptionBuilder, CaptionRecord, RecordShard
from imgcap_jax.data.builders.layout import Origin, Skipped
from imgcap_jax.errors import UserError

SHARD_BYTES = 128 * 2**20
# Largest share of the images, and of the captions, that may be skipped. Above it, the dataset as a whole is broken.
MAX_SKIPPED = 0.01
READ_AHEAD = 64
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class FolderContents:
    """The images that a folder's annotation files list, with the path and the size (bytes) of each image."""

    annotation_files: tuple[Path, ...]
    images: tuple[ListedImage, ...]
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    fingerprint: str


def scan_folder(path: Path) -> FolderContents:
    """Reads the annotation files and finds the images, without opening them.

    Raises:
        UserError: see `find_annotations` and `read_annotations`; or a listed image is missing or found more than once.
    """
    folder, files = find_annotations(path)
    images = read_annotations(files)
    paths = _find_images(folder, images)
    sizes = [path.stat().st_size for path in paths]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    for image, size in zip(images, sizes, strict=True):
        digest.update(f"{image.filename} {size}\n".encode())
    return FolderContents(tuple(files), tuple(images), tuple(paths), tuple(sizes), digest.hexdigest())


def _find_images(folder: Path, images: Sequence[ListedImage]) -> list[Path]:
    places = [folder, folder / "images", folder / "Images"]
    by_name: dict[str, list[Path]] | None = None
    paths: list[Path] = []
    absent: list[str] = []
    for image in images:
        exact = (place / image.subfolder / image.filename for place in places)
        path = next((path for path in exact if path.is_file()), None)
        if path is None:
            if by_name is None:
                by_name = {}
                for parent, _, names in os.walk(folder):
                    for name in names:
                        by_name.setdefault(name, []).append(Path(parent, name))
            found = by_name.get(Path(image.filename).name, [])
            if len(found) > 1:
                raise UserError(f"{image.filename}: found {len(found)} times below {folder}; list it with its path")
            path = found[0] if found else None
        if path is None:
            absent.append(image.filename)
        else:
            paths.append(path)
    if absent:
        raise UserError(
            f"{_first(absent)}: listed but not found below {folder} ({len(absent)} of {len(images)} images); "
            "add the images or remove them from the list"
        )
    return paths


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def read_image(path: Path) -> bytes:
    """Reads an encoded image. JPEG and PNG files are returned unchanged, other formats are re-encoded as PNG.

    Raises:
        ValueError: the image cannot be decoded completely.
    """
    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()  # opening a truncated file succeeds; only decoding fails
            if encoded.startswith((_JPEG, _PNG)):
                return encoded
            buffer = io.BytesIO()
            transposed = ImageOps.exif_transpose(image)
            transposed.convert("RGBA" if transposed.has_transparency_data else "RGB").save(buffer, "PNG")
            return buffer.getvalue()
    # Pillow's decoders raise many types on broken files, including struct.error and SyntaxError.
    except UnidentifiedImageError as error:
        raise ValueError("unknown image format, or the start of the file is damaged") from error
    except Exception as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


class FolderBuilder(CaptionBuilder):
    """Writes a scanned folder. Unreadable images and empty captions are skipped and recorded in `skipped`."""

    def __init__(
        self,
        contents: FolderContents,
        *,
        name: str,
        data_dir: Path,
        origin: Origin,
        on_image: Callable[[], None] = lambda: None,
    ) -> None:
        self._contents = contents
        self._on_image = on_image
        self._images_skipped: list[str] = []
        self._captions_skipped: list[str] = []
        self._caption_count = sum(len(image.captions) for image in contents.images)
        super().__init__(
            name=name, data_dir=data_dir, origin=origin, description=f"Captioned images from {origin.folder}."
        )

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        contents = self._contents
        shards: dict[str, list[RecordShard]] = {}
        for split in dict.fromkeys(image.split for image in contents.images):
            members = [i for i, image in enumerate(contents.images) if image.split == split]
            count = -(-sum(contents.sizes[i] for i in members) // SHARD_BYTES) or 1
            count = min(count, len(members))
            bounds = [len(members) * k // count for k in range(count + 1)]
            parts = [members[start:end] for start, end in itertools.pairwise(bounds)]
            shards[split] = [functools.partial(self._records, part, split) for part in parts]
        return shards

    def _records(self, members: Sequence[int], split: str) -> Iterator[CaptionRecord]:
        written = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(members), READ_AHEAD):
                chunk = members[start : start + READ_AHEAD]
                futures = [pool.submit(read_image, self._contents.paths[i]) for i in chunk]
                for i, future in zip(chunk, futures, strict=True):
                    image = self._contents.images[i]
                    self._on_image()
                    captions = self._captions(image)
                    try:
                        encoded = future.result()
                    except ValueError as error:
                        self._skip_image(image, str(error))
                        continue
                    if not captions:
                        self._skip_image(image, "no caption")
                        continue
                    written += 1
                    yield CaptionRecord(encoded, image.filename, image.image_id, captions)
        if not written:
            raise UserError(f"split {split!r}: none of its {len(members)} images can be used; check the image files")

    def _captions(self, image: ListedImage) -> list[tuple[int, str]]:
        kept = []
        for id, text in image.captions:
            # Captions are later written to line-based formats, so each must be a single line.
            text = " ".join(text.split())
            if text:
                kept.append((id, text))
                continue
            name = f"{image.filename} caption {id}"
            self._captions_skipped.append(name)
            self._skip(name, "empty caption", self._captions_skipped, self._caption_count, "captions are empty")
        return kept

    def _skip_image(self, image: ListedImage, reason: str) -> None:
        self._images_skipped.append(f"{image.filename} ({reason})")
        total = len(self._contents.images)
        self._skip(image.filename, reason, self._images_skipped, total, "images cannot be used")

    def _skip(self, name: str, reason: str, names: list[str], total: int, complaint: str) -> None:
        self.skipped.append(Skipped(name, reason))
        if len(names) > MAX_SKIPPED * total:
            where = ", ".join(map(str, self._contents.annotation_files))
            raise UserError(
                f"{where}: more than {MAX_SKIPPED:.0%} of its {total} {complaint}: {_first(names)}; fix or remove them"
            )
