"""Prepares datasets: draws or reads images and captions, and writes them as TFDS array_record."""

import contextlib
import difflib
import errno
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from imgcap_jax.data.builders import coco
from imgcap_jax.data.builders.archives import check_space
from imgcap_jax.data.builders.layout import INFO_FILE, ORIGIN_FILE, Origin, check_small_files, write_origin
from imgcap_jax.data.caption_checks import prepared_notes
from imgcap_jax.data.sources import default_data_dir, describe, find_prepared, open_source, read_origin
from imgcap_jax.data.staging import staging, write
from imgcap_jax.downloads import DownloadError
from imgcap_jax.errors import UserError
from imgcap_jax.files import check_name, disk_errors, file_digest, write_text
from imgcap_jax.remote import place, push_tree, shown
from imgcap_jax.terminal import working
from imgcap_jax.user_code import load_code

if TYPE_CHECKING:  # these import TFDS, which takes a while
    from imgcap_jax.data.builders.folder import FolderContents
    from imgcap_jax.data.scenes.builder import SceneSplits

_COCO = ("coco", coco.NAME)
_FLICKR = ("flickr8k", "flickr30k")
_RESERVED = ("scenes", *_COCO)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG)


def prepare(
    name_or_path: str | Path,
    *,
    name: str | None = None,
    data_dir: Path | None = None,
    licence: str = "",
    source: str = "",
    scenes: "SceneSplits | None" = None,
    images: Sequence[Path] = (),
    annotations: Path | None = None,
    split_file: Path | None = None,
    download_dir: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Prepares a known dataset, a folder of images with a caption file, or the dataset of a builder of your own.

    Does nothing if the dataset is already prepared from the same data and its files have the right sizes; otherwise
    replaces it. The folder appears under its name only when it is complete. A folder or a file that this function did
    not write is never replaced.

    Args:
        name_or_path: "scenes", "coco", "flickr8k", "flickr30k", a folder, the annotation file in it (see
            `builders.annotations`), or a Python file with a subclass of `builders.base.CaptionBuilder`. The file is
            executed.
        name: the dataset's name; None: that of the folder or file, or "scenes".
        data_dir: folder of prepared datasets; None: TFDS's standard folder.
        licence, source: notes on the images, stored with the dataset. Those of "scenes" and "coco" are known.
        scenes: the number of scenes, and how they are drawn.
        images: folders or zip archives with the photos of COCO (none: they are downloaded), Flickr8k or Flickr30k.
        annotations: folder or zip archive with the annotations of COCO; None: they are downloaded.
        split_file: captions with splits of Flickr8k or Flickr30k, or Karpathy's splits of COCO (None: they are
            downloaded): a file, a folder or a zip archive.
        download_dir: folder of COCO's archives; None: `downloads/coco` in the folder of datasets.
        progress: whether to show the progress on the standard error.
        say: receives one line per completed action.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: the folder, its annotations or the builder are not valid, the disk is full, or the dataset's folder
            contains files that were not written here.
    """
    data_dir = (place(str(data_dir)) if data_dir else default_data_dir()).expanduser().absolute()
    images = [path.expanduser() for path in images]
    annotations, split_file = (path.expanduser() if path is not None else None for path in (annotations, split_file))
    known = str(name_or_path)
    # A folder of that name in the current folder is prepared as every other folder.
    from_archives = known in _FLICKR and bool(images or split_file or not Path(name_or_path).is_dir())
    if (known in _COCO or from_archives) and name not in (None, known):
        raise UserError(f"--name has no effect on {known!r}, which keeps its name; leave it out")
    files = {
        "--images": (bool(images), (*_COCO, *_FLICKR)),
        "--split-file": (split_file is not None, (*_COCO, *_FLICKR)),
        "--annotations": (annotations is not None, _COCO),
        "--download-dir": (download_dir is not None, _COCO),
    }
    for option, (given, names) in files.items():
        if given and known not in names:
            raise UserError(f"{option} has no effect on {known!r}, only on {', '.join(names)}; leave it out")
    for option, note in {"--licence": licence, "--source-note": source}.items():
        if note and known in _RESERVED:
            raise UserError(f"{option} has no effect on {known!r}, whose licence and source are known; leave it out")
    if name and name != known:
        _check_name(name)
    with _file_errors(data_dir):
        if known == "scenes":
            folder = _prepare_scenes(scenes, name or known, data_dir, progress, say)
        elif known in _COCO:
            download_dir = (download_dir or data_dir / "downloads" / "coco").expanduser().absolute()
            folder = _prepare_coco(data_dir, images, annotations, split_file, download_dir, progress, say)
        elif from_archives:
            folder = _prepare_flickr(known, data_dir, images, split_file, licence, source, progress, say)
        elif known.endswith(".py"):
            folder = _prepare_own(Path(name_or_path), name, data_dir, licence, source, progress, say)
        else:
            folder = _prepare_folder(Path(name_or_path).expanduser(), name, data_dir, licence, source, progress, say)
        if known != "scenes" and known not in _COCO:
            _say_notes(folder.parent.name, data_dir, say)
        push_tree(folder, INFO_FILE)
        return folder


def _say_notes(name: str, data_dir: Path, say: Callable[[str], None]) -> None:
    """Reports the notes on the captions of a dataset, as on a low coverage of the vocabulary."""
    splits = describe(name, data_dir).splits
    training = "train" if "train" in splits else next(iter(splits))
    validation = open_source(name, "val", data_dir) if "val" in splits else None
    for note in prepared_notes(open_source(name, training, data_dir), validation):
        say(f"{name}: note: {note}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED:
        raise UserError(f"{name!r} cannot name a dataset; use lower-case letters, digits and _: --name my_photos")


def _prepare_scenes(
    splits: "SceneSplits | None", name: str, data_dir: Path, progress: bool, say: Callable[[str], None]
) -> Path:
    from imgcap_jax.data.scenes.builder import ScenesBuilder, SceneSplits

    splits = splits or SceneSplits()
    source = f"drawn by imgcap_jax from seed {splits.seed}, {splits.image_size} pixels a side"
    origin = Origin("scenes", source, "Apache-2.0, as imgcap_jax", splits.fingerprint())
    if (folder := _already_prepared(name, origin, data_dir, say)) is not None:
        return folder
    with working("drawing scenes", sum(splits.counts.values()), "images", shown=progress) as work:
        return write(
            name,
            data_dir,
            lambda place: ScenesBuilder(splits, data_dir=place, origin=origin, name=name, on_image=work.advance),
            say,
            shown=progress,
        )


def _prepare_folder(
    path: Path,
    name: str | None,
    data_dir: Path,
    licence: str,
    source: str,
    progress: bool,
    say: Callable[[str], None],
) -> Path:
    from imgcap_jax.data.builders.annotations import find_annotations
    from imgcap_jax.data.builders.folder import scan_folder

    folder = path.resolve()
    check_name(folder)
    if not path.exists():
        near = difflib.get_close_matches(str(path), [*_RESERVED, *_FLICKR], n=1, cutoff=0.7)
        advice = f"did you mean {near[0]}?" if near else "check the path"
        raise UserError(f"{path}: no such file or folder; {advice}")
    name = name or _default_name(find_annotations(path)[0].resolve())
    _check_name(name)
    origin = Origin("folder", source, licence, "", str(folder))
    return _prepare_contents(name, lambda: scan_folder(path), origin, data_dir, progress, say)


def _prepare_flickr(
    name: str,
    data_dir: Path,
    images: Sequence[Path],
    split_file: Path | None,
    licence: str,
    source: str,
    progress: bool,
    say: Callable[[str], None],
) -> Path:
    from imgcap_jax.data.builders.flickr import DATASETS, scan_flickr

    dataset = DATASETS[name]
    if not images:
        if split_file is None:
            for line in dataset.guide():
                say(line)
            raise UserError(f"{name} is not downloaded automatically; get its files as described, then use --images")
        raise UserError(f"{name}: the photos are missing; pass their folder or zip archive with --images")
    if len(images) > 1:
        raise UserError(f"{name}: --images is given {len(images)} times; pass one folder or zip archive")
    (place,) = images
    check_name(place.resolve())
    origin = Origin("folder", source or dataset.source, licence or dataset.licence, "", str(place.resolve()))
    temporary = functools.partial(staging, data_dir / name)
    return _prepare_contents(
        name,
        lambda: scan_flickr(dataset, place, split_file, temporary),
        origin,
        data_dir,
        progress,
        say,
        complete=True,
    )


def _prepare_contents(
    name: str,
    scan: "Callable[[], FolderContents]",
    origin: Origin,
    data_dir: Path,
    progress: bool,
    say: Callable[[str], None],
    *,
    complete: bool = False,
) -> Path:
    """Prepares images with their captions. The fingerprint of `origin` is that of the contents.

    `complete`: the dataset is a known one, which keeps its name, and of which no photo is left out.
    """
    from imgcap_jax.data.builders.folder import FolderBuilder
    from imgcap_jax.data.builders.listed import WrongRows

    report = data_dir / f"{name}_problems.txt"
    try:
        contents = scan()
    except WrongRows as error:
        if len(error.rows) <= 3:
            raise
        write_text(report, "".join(f"{row}\n" for row in error.rows))
        raise UserError(f"{error}; all are listed in {report}") from error
    for note in contents.notes:
        say(f"{name}: {note}")
    origin = replace(origin, fingerprint=contents.fingerprint)
    if (prepared := _already_prepared(name, origin, data_dir, say, renamable=not complete)) is not None:
        return prepared
    check_space((data_dir, sum(contents.sizes), "--data-dir"))
    with working(f"preparing {name}", len(contents.images), "images", shown=progress) as work:
        prepared = write(
            name,
            data_dir,
            lambda place: FolderBuilder(
                contents,
                name=name,
                data_dir=place,
                origin=origin,
                on_image=work.advance,
                report=report,
                complete=complete,
            ),
            say,
            shown=progress,
        )
    report.unlink(missing_ok=True)  # of an earlier refusal
    return prepared


def _prepare_own(
    path: Path,
    name: str | None,
    data_dir: Path,
    licence: str,
    source: str,
    progress: bool,
    say: Callable[[str], None],
) -> Path:
    from imgcap_jax.data.builders.base import CaptionBuilder

    check_name(path.resolve())
    module = load_code(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, CaptionBuilder) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(builder.__name__ for builder in found) or "none"
        raise UserError(f"{path} must define one subclass of CaptionBuilder; it defines {names}")
    (kind,) = found
    name = name or _default_name(path.with_suffix(""))
    _check_name(name)
    path = path.resolve()
    fingerprint = f"{file_digest(path)} {kind.source_fingerprint()}"
    origin = Origin(kind.__name__, source, licence, fingerprint, str(path))
    if (folder := _already_prepared(name, origin, data_dir, say)) is not None:
        return folder
    description = (kind.__doc__ or kind.__name__).strip()
    return write(
        name,
        data_dir,
        lambda place: kind(name=name, data_dir=place, origin=origin, description=description),
        say,
        shown=progress,
    )


def _default_name(folder: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", folder.name.lower()).strip("_")
    return name if name[:1].isalpha() else f"folder_{name}".rstrip("_")


def _prepare_coco(
    data_dir: Path,
    images: Sequence[Path],
    annotations: Path | None,
    split_file: Path | None,
    download_dir: Path,
    progress: bool,
    say: Callable[[str], None],
) -> Path:
    coco.check_given(images, annotations, split_file)
    folder = _already_prepared(coco.NAME, coco.ORIGIN, data_dir, say, renamable=False)
    if folder is not None:
        coco.check_train_size(describe(coco.NAME, data_dir).splits.get("train", 0), folder)
        return folder
    try:
        contents = coco.read_coco(
            data_dir,
            images=images,
            annotations=annotations,
            split_file=split_file,
            download_dir=download_dir,
            shown=progress,
            say=say,
        )
    except DownloadError:
        for line in coco.GUIDE:
            say(line)
        raise
    check_space((data_dir, sum(contents.sizes), "--data-dir"))
    from imgcap_jax.data.builders.coco_builder import CocoBuilder

    with working("preparing coco", len(contents.images), "images", shown=progress) as work:
        return write(
            coco.NAME,
            data_dir,
            lambda place: CocoBuilder(contents, data_dir=place, on_image=work.advance),
            say,
            shown=progress,
        )


def _already_prepared(
    name: str, origin: Origin, data_dir: Path, say: Callable[[str], None], *, renamable: bool = True
) -> Path | None:
    folder = find_prepared(name, data_dir)
    if folder is None:
        return None
    try:
        before = read_origin(folder)
    except UserError as error:
        # It is unknown what the dataset was prepared from, so it is not replaced.
        raise UserError(
            f"{folder} is damaged ({ORIGIN_FILE}); delete this folder and run the same command again"
        ) from error
    if before.fingerprint == origin.fingerprint:
        try:
            check_small_files(folder)  # all files would take a minute for COCO
        except UserError as error:
            say(f"{name}: damaged ({error}); preparing it again")
            return None
        notes = replace(before, source=origin.source or before.source, licence=origin.licence or before.licence)
        if notes != before:
            write_origin(folder, notes)
        say(f"{name}: already prepared in {shown(folder)}")
        return folder
    if before.folder != origin.folder:
        advice = "use another --name" if renamable else f"delete {folder} and run the same command again"
        raise UserError(f"{name!r} in {data_dir} was prepared from {before.folder or before.source}; {advice}")
    say(f"{name}: has changed since it was prepared in {shown(folder)}; preparing it again")
    return None


@contextlib.contextmanager
def _file_errors(data_dir: Path) -> Iterator[None]:
    """Turns errors of files into UserErrors that name the file, or the data folder if its disk fails.

    Libraries raise errors without a file name, which are those of the data folder if they are of the disk.
    """
    with disk_errors(str(data_dir)):
        try:
            yield
        except OSError as error:
            place = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else None
            # The folder that cannot be made can be above the data folder.
            ours = place is None or place.is_relative_to(data_dir) or data_dir.is_relative_to(place)
            reason = error.strerror or type(error).__name__
            if ours and error.errno in _UNWRITABLE:
                raise UserError(f"{place or data_dir} can't be written ({reason}); use another --data-dir") from error
            if error.errno in _DISK_ERRORS:
                with disk_errors(str(data_dir if ours else place)):
                    raise
            if place is None:
                raise
            raise UserError(f"{place}: {reason}; check this path and run the same command again") from error
