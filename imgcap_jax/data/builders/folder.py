"""`folder`: builds a dataset from a folder or zip archive of images and annotation files (see `annotations`)."""

import functools
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn

from imgcap_jax.data.builders.annotations import ENDINGS, find_annotations, read_annotations
from imgcap_jax.data.builders.archives import ZipMember, is_zip, members, read_ahead, read_photo, texts, without_copies
from imgcap_jax.data.builders.base import CaptionBuilder, CaptionRecord, RecordShard, shard_ranges
from imgcap_jax.data.builders.layout import Origin, Skipped
from imgcap_jax.data.builders.listed import ListedImage, shown
from imgcap_jax.data.image_files import ImageError, storable
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import write_text
from imgcap_jax.text import tokenize

# Largest share of the images, and of the captions, that may be skipped. Above it, the dataset as a whole is broken.
MAX_SKIPPED = 0.01
_EMPTY, _WORDLESS, _NO_CAPTION = "empty caption", "caption without a word", "no caption"
_LINK = "a link to outside of"


@dataclass(frozen=True)
class FolderContents:
    """The images that a folder's annotation files list.

    Attributes:
        folder: the folder or zip archive of images.
        annotation_files: the annotation files.
        images: the images that were found, with the captions that can be used.
        paths: the file of each image.
        sizes: its size in bytes.
        listed: number of images that the files list.
        captions: number of captions that the files list.
        absent: images that were not found, or are not usable files of the folder.
        skipped: lines and captions that cannot be used.
        mended: captions that were changed.
        repeated: photos that are listed twice, in two splits or as two images.
        notes: one line each about the splits.
        fingerprint: changes if the images or captions change.
    """

    folder: Path
    annotation_files: tuple[Path, ...]
    images: tuple[ListedImage, ...]
    paths: tuple[Path | ZipMember, ...]
    sizes: tuple[int, ...]
    listed: int
    captions: int
    absent: tuple[Skipped, ...]
    skipped: tuple[Skipped, ...]
    mended: tuple[Skipped, ...]
    repeated: tuple[Skipped, ...]
    notes: tuple[str, ...]
    fingerprint: str


def scan_folder(path: Path) -> FolderContents:
    """Reads the annotation files of a folder and finds the images, without opening them.

    Raises:
        UserError: see `find_annotations` and `read_annotations`.
    """
    folder, files = find_annotations(path)
    return _scan(folder, files, files, folder)


def scan_images(
    images: Path, annotations: Path, preferred: str, staging: Callable[[], AbstractContextManager[Path]]
) -> FolderContents:
    """Reads annotation files that are not in the folder of images, and finds the images, without opening them.

    Args:
        images: a folder or a zip archive of images.
        annotations: an annotation file, or a folder or a zip archive that contains some.
        preferred: the name of the annotation file to read if the folder or archive contains it.
        staging: makes a temporary folder for the annotation files of an archive, and removes it.

    Raises:
        UserError: see `find_annotations` and `read_annotations`. A path does not exist, or an archive is damaged.
    """
    for path in (images, annotations):
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path")
    if not images.is_dir() and not is_zip(images):
        raise UserError(f"{images} is neither a folder nor a zip archive of images; pass one of them")

    def choose(names: set[str]) -> set[str]:
        return names & {preferred} or {name for name in names if name.endswith(ENDINGS)}

    with texts(annotations, choose, (preferred, *(f"*{ending}" for ending in ENDINGS)), staging) as place:
        _, files = find_annotations(found if (found := place / preferred).is_file() else place)
        named = [annotations / file.relative_to(place) for file in files]
        return _scan(images, files, named, place if place.is_dir() else place.parent)


def _scan(folder: Path, files: Sequence[Path], named: Sequence[Path], root: Path) -> FolderContents:
    """Scans a folder or archive of images.

    Args:
        folder: the folder or archive.
        files: the annotation files.
        named: the annotation files as messages name them.
        root: the folder that contains the annotation files.
    """
    listed = read_annotations(root, files)
    skipped, mended = list(listed.skipped), []
    images: list[ListedImage] = []
    for image in listed.images:
        captions = []
        for number, text in image.captions:
            name = f"{image.filename} caption {number}"
            text, lost = _one_line(text)
            if lost:
                mended.append(Skipped(name, "a lone surrogate was removed"))
            if reason := _unusable(text):
                skipped.append(Skipped(name, reason))
            else:
                captions.append((number, text))
        images.append(replace(image, captions=tuple(captions)))
    find = _find_images if folder.is_dir() else _find_members
    found = list(zip(images, find(folder, images), strict=True))
    there = [(image, *one) for image, one in found if not isinstance(one, str)]
    absent = [Skipped(image.filename, one) for image, one in found if isinstance(one, str)]

    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.name) + file.read_bytes())
    for image, _, size in there:
        digest.update(f"{image.filename} {size}\n".encode())
    for entry in skipped:
        if entry.reason == _WORDLESS:
            digest.update(f"{entry.name}\n".encode("utf-8", "surrogatepass"))
    if listed.from_rows:  # ids and splits can be computed
        for image in listed.images:
            digest.update(f"{image.image_id} {image.split}\n".encode())
    return FolderContents(
        folder=folder,
        annotation_files=tuple(named),
        images=tuple(image for image, _, _ in there),
        paths=tuple(path for _, path, _ in there),
        sizes=tuple(size for _, _, size in there),
        listed=len(images),
        captions=sum(len(image.captions) for image in listed.images) + len(listed.skipped),
        absent=tuple(absent),
        skipped=tuple(skipped),
        mended=tuple(mended),
        repeated=tuple(_repeated([(image, path) for image, path, _ in there])),
        notes=listed.notes,
        fingerprint=digest.hexdigest(),
    )


def _one_line(text: str) -> tuple[str, bool]:
    """The caption as a single line, as line-based formats need it, and whether a lone surrogate was removed.

    JSON writes an emoji as two codes, a surrogate pair. Programs that cut texts can leave one of them, which no file
    can store.
    """
    whole = re.sub("[\ud800-\udfff]", "", text)
    return " ".join(whole.split()), whole != text


def _unusable(text: str) -> str:
    """Why a caption cannot be used, or ""."""
    if not text:
        return _EMPTY
    return "" if any(map(str.isalnum, text)) and tokenize(text) else _WORDLESS


def _find_images(folder: Path, images: Sequence[ListedImage]) -> list[tuple[Path, int] | str]:
    """The resolved path and the size in bytes of each image, or the reason why it cannot be used."""
    root = folder.resolve()
    places = [folder, folder / "images", folder / "Images"]
    resolved = functools.cache(Path.resolve)  # of folders, which many images share

    @functools.cache
    def by_name() -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for parent, _, names in os.walk(folder):
            for name in names:
                found.setdefault(name, []).append(Path(parent, name))
        return found

    def find(image: ListedImage) -> tuple[Path, int] | str:
        path, status = None, None
        for name in dict.fromkeys((image.path, image.path.replace("\\", "/"))):  # as listed, or a path of Windows
            exact = (place / name for place in places)
            path, status = next(((path, found) for path in exact if (found := _status(path))), (None, None))
            if path is not None:
                break
        if path is None:
            candidates = by_name().get(Path(name).name, [])
            if len(candidates) > 1:
                return f"found {len(candidates)} times below {folder}; list it with its path"
            path = next(iter(candidates), None)
            status = _status(path) if path is not None else None
        if path is None or status is None:
            return "not found"
        if not stat.S_ISREG(status.st_mode):
            return "a pipe or a device, not an image"
        real = path.resolve() if path.is_symlink() else resolved(path.parent) / path.name
        if not real.is_relative_to(root):
            lies_inside = Path(os.path.abspath(path)).is_relative_to(folder.absolute())
            return f"{_LINK} {root}" if lies_inside else f"outside of {root}; copy it into this folder"
        return real, status.st_size

    return [find(image) for image in images]


def _find_members(archive: Path, images: Sequence[ListedImage]) -> list[tuple[ZipMember, int] | str]:
    """The file in a zip archive and the size in bytes of each image, or the reason why it cannot be used."""
    by_path = {member.name: member for member in members(archive)}
    by_name: dict[str, list[Path | ZipMember]] = {}
    for member in by_path.values():
        by_name.setdefault(member.path.name, []).append(member)

    def find(image: ListedImage) -> tuple[ZipMember, int] | str:
        path = image.path.replace("\\", "/")
        candidates = [by_path[path]] if path in by_path else without_copies(by_name.get(PurePosixPath(path).name, []))
        if len(candidates) > 1:
            return f"{len(candidates)} different files of this name in {archive}; list it with its path"
        return next(((member, member.size) for member in candidates if isinstance(member, ZipMember)), "not found")

    return [find(image) for image in images]


def _status(path: Path) -> os.stat_result | None:
    """The status of anything except a folder; None if there is nothing at the path."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a lone surrogate or a NUL in the name
        return None
    return None if stat.S_ISDIR(found.st_mode) else found


def _repeated(found: Iterable[tuple[ListedImage, Path | ZipMember]]) -> Iterator[Skipped]:
    """Photos that are listed more than once, under one path or several."""
    first: dict[Path | ZipMember, ListedImage] = {}
    for image, path in found:
        other = first.setdefault(path, image)
        if other is not image:
            named = "" if other.filename == image.filename else f" as {other.filename}"
            yield Skipped(
                image.filename,
                f"in {other.split}{named} and in {image.split}"
                if other.split != image.split
                else f"listed twice, with the ids {other.image_id} and {image.image_id}",
            )


def read_image(path: Path | ZipMember) -> bytes:
    """Reads an image file as the dataset stores it (see `image_files.storable`).

    Raises:
        ImageError: the file cannot be read, or the image cannot be decoded completely or is too large.
    """
    try:
        return storable(read_photo(path))
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


class FolderBuilder(CaptionBuilder):
    """Writes a scanned folder. Up to 1 % of unreadable images and unusable captions are skipped and recorded.

    A dataset with more of them is refused, as is one with absent or repeated photos. All images are then checked, so
    that a single refusal lists everything. If the sizes of the splits are known, no image may be skipped.
    """

    def __init__(
        self,
        contents: FolderContents,
        *,
        name: str,
        data_dir: Path,
        origin: Origin,
        on_image: Callable[[], None] = lambda: None,
        report: Path | None = None,
        complete: bool = False,
    ) -> None:
        """Plans the records of a folder.

        Args:
            contents: the scanned folder.
            name: the dataset's name.
            data_dir: folder of prepared datasets.
            origin: where the dataset comes from.
            on_image: called after each image.
            report: the file that lists all problems if the dataset is refused.
            complete: whether a single image that cannot be used is a reason to refuse the dataset.
        """
        self._max_images = 0.0 if complete else MAX_SKIPPED
        self._contents = contents
        self._on_image = on_image
        self._report = report
        self._unread = set(range(len(contents.images)))
        self._broken: list[Skipped] = []
        self._first_with: dict[bytes, int] = {}  # digest of an encoded image -> its number
        self._copies: list[Skipped] = []
        super().__init__(
            name=name, data_dir=data_dir, origin=origin, description=f"Captioned images from {origin.folder}."
        )
        self.skipped += [*contents.skipped, *contents.mended]

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        contents = self._contents
        if contents.absent or contents.repeated or self._too_many_captions():
            self._refuse()
        shards: dict[str, list[RecordShard]] = {}
        for split in dict.fromkeys(image.split for image in contents.images):
            members = [i for i, image in enumerate(contents.images) if image.split == split]
            ranges = shard_ranges([contents.sizes[i] for i in members])
            shards[split] = [functools.partial(self._records, [members[k] for k in shard]) for shard in ranges]
        return shards

    def _records(self, members: Sequence[int]) -> Iterator[CaptionRecord]:
        written = 0
        for i, encoded in self._read(members):
            if self._too_many_images():
                self._refuse()
            if encoded is not None:
                image = self._contents.images[i]
                written += 1
                yield CaptionRecord(encoded, image.filename, image.image_id, image.captions)
        if not written:
            self._refuse()

    def _read(self, members: Sequence[int]) -> Iterator[tuple[int, bytes | None]]:
        """Yields each image, encoded, or None if it cannot be used."""
        contents = self._contents
        for i, future in read_ahead(lambda i: _read_with_digest(contents.paths[i]), members):
            image = contents.images[i]
            self._unread.discard(i)
            self._on_image()
            reason = "" if image.captions else _NO_CAPTION
            try:
                encoded, digest = future.result()
            except ValueError as error:
                reason = str(error)
            if reason:
                self._broken.append(Skipped(image.filename, reason))
                yield i, None
                continue
            self._note_copy(i, digest)
            yield i, encoded

    def _note_copy(self, i: int, digest: bytes) -> None:
        contents = self._contents
        first = self._first_with.setdefault(digest, i)
        image, other = contents.images[i], contents.images[first]
        splits = {"train" if one.split == "restval" else one.split for one in (image, other)}
        if len(splits) > 1 and contents.paths[i] != contents.paths[first]:
            same = f"in {image.split}, is the same image as {other.filename} in {other.split}"
            self._copies.append(Skipped(image.filename, same))

    def finished(self) -> None:
        self.skipped += [*self._broken, *self._copies]
        if self._copies:
            first = self._copies[0]
            self.notes.append(
                f"{counted(len(self._copies), 'image')} in two splits under different names ({shown(first.name)}, "
                f"{shown(first.reason)}); scores on them are not those of unseen images"
            )

    def _too_many_images(self) -> bool:
        return len(self._broken) > self._max_images * self._contents.listed

    def _too_many_captions(self) -> bool:
        return len(self._contents.skipped) > MAX_SKIPPED * self._contents.captions

    def _refuse(self) -> NoReturn:
        """Checks the images that were not read yet, writes the report and raises a UserError."""
        contents, broken = self._contents, self._broken
        for _ in self._read(sorted(self._unread)):
            pass
        unusable = {entry.name for entry in broken}
        usable = {image.split for image in contents.images if image.filename not in unusable}
        empty = sorted({image.split for image in contents.images} - usable)
        limit = f"more than {MAX_SKIPPED:.0%}"
        images = f"of its {counted(contents.listed, 'image')}"
        captions = f"of its {counted(contents.captions, 'caption')}"
        too_many_captions = self._too_many_captions()
        # The captions are named, so the images that are left without one are not.
        named = [entry for entry in broken if not (too_many_captions and entry.reason == _NO_CAPTION)]
        too_many_images = len(named) > self._max_images * contents.listed
        # Whether the dataset is refused because of them, what is wrong, and the entries.
        problems: list[tuple[bool, str, Sequence[Skipped]]] = [
            (bool(contents.absent), f"{len(contents.absent)} {images} cannot be read", contents.absent),
            (
                bool(contents.repeated),
                f"{counted(len(contents.repeated), 'photo')} listed more than once",
                contents.repeated,
            ),
            (
                too_many_images,
                f"{limit} {images} cannot be used ({len(named)})"
                if self._max_images
                else f"{len(named)} {images} cannot be used",
                named,
            ),
            (
                bool(empty),
                f"no image of the split {' and '.join(empty)} can be used",
                () if too_many_images or too_many_captions else broken,
            ),
            (
                too_many_captions,
                f"{limit} {captions} cannot be used ({len(contents.skipped)})",
                contents.skipped,
            ),
        ]
        reasons = [what + (f": {_first(entries)}" if entries else "") for refused, what, entries in problems if refused]
        lines = [
            f"{shown(entry.name)}\t{shown(entry.reason)}\n"
            for entries in (contents.absent, contents.repeated, broken, contents.skipped, self._copies)
            for entry in entries
        ]
        where = ", ".join(map(str, contents.annotation_files))
        advice = "fix or remove them" if self._max_images else "replace them with undamaged copies"
        if any(entry.reason.startswith(_LINK) for entry in contents.absent):
            folder = shlex.quote(str(contents.folder))
            advice += f"; this makes a copy with files in place of links: cp -rL {folder} COPY"
        raise UserError(f"{where}: {'; '.join(reasons)}{self._saved(lines)}; {advice}")

    def _saved(self, lines: Sequence[str]) -> str:
        """Writes the report. Returns the part of the error message that names it."""
        if self._report is None:
            return ""
        try:
            write_text(self._report, "".join(lines))
        except (UserError, OSError) as error:
            return f"; the list of {counted(len(lines), 'problem')} could not be written ({error})"
        return f"; {counted(len(lines), 'problem')} listed in {self._report}"


def _read_with_digest(path: Path | ZipMember) -> tuple[bytes, bytes]:
    encoded = read_image(path)
    return encoded, hashlib.sha256(encoded).digest()


def _first(entries: Sequence[Skipped], count: int = 3) -> str:
    names = [f"{shown(entry.name)} ({shown(entry.reason)})" for entry in entries[:count]]
    return ", ".join(names) + (", ..." if len(entries) > count else "")
