"""`coco`: COCO 2014 with Karpathy's splits, as the official TFDS dataset `coco_captions/2014` has it.

The photos and annotations are COCO's archives, which are downloaded or given. This module reads the annotations and
finds the photos; `coco_builder` writes the records.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imgcap_jax.data.builders import json_lists
from imgcap_jax.data.builders.archives import ZipMember, check_space, files_by_name, texts
from imgcap_jax.data.builders.layout import Origin
from imgcap_jax.data.builders.listed import ListedImage, shown
from imgcap_jax.downloads import DownloadError, fetch
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import reading
from imgcap_jax.terminal import working

NAME = "coco_captions"
CONFIG, VERSION = "2014", "1.1.0"
# Karpathy's splits. Train + restval is the usual training set.
SPLITS = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
ORIGIN = Origin(
    kind="coco",
    source="COCO 2014 with the splits of Karpathy and Li (2015), http://cocodataset.org",
    licence="captions CC BY 4.0; photos belong to their Flickr owners under their terms",
    fingerprint="coco_captions/2014:1.1.0",
)
_PLACES = ("train2014", "val2014")
_CATEGORIES = 80
# Share of images whose captions may differ from COCO's in a file of splits that was downloaded from a mirror.
_DIFFERENT = 0.01


@dataclass(frozen=True)
class Archive:
    """A file on COCO's server: its address, its size in bytes and its SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


# Sizes and digests as in `url_checksums/coco_captions.txt` of TFDS.
PHOTOS = (
    Archive(
        "http://images.cocodataset.org/zips/train2014.zip",
        13_510_573_713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    ),
    Archive(
        "http://images.cocodataset.org/zips/val2014.zip",
        6_645_013_297,
        "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    ),
)
ANNOTATIONS = Archive(
    "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
    252_872_794,
    "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
)
# Copies of Karpathy's file. The original address, the last one, often answers 404.
MIRRORS = (
    "https://huggingface.co/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip",
    "https://github.com/Delphboy/karpathy-splits/raw/main/dataset_coco.json",
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
)
_KARPATHY = "dataset_coco.json"
_BLIP = {f"coco_karpathy_{split}.json": split for split in ("train", "val", "test")}
_WHERE_SPLITS = (
    f"{_KARPATHY} is in https://www.kaggle.com/datasets/shtvkumar/karpathy-splits and "
    "https://github.com/Delphboy/karpathy-splits"
)
GUIDE = (
    f"COCO 2014 with Karpathy's splits: {sum(SPLITS.values()):,} photos. Captions: CC BY 4.0. The photos belong to "
    "their Flickr owners: https://cocodataset.org/#termsofuse",
    f"  photos       {PHOTOS[0].url} ({PHOTOS[0].size / 1e9:.1f} GB)",
    f"               {PHOTOS[1].url} ({PHOTOS[1].size / 1e9:.1f} GB)",
    f"  annotations  {ANNOTATIONS.url} ({ANNOTATIONS.size / 1e9:.1f} GB)",
    "  splits       dataset_coco.json or caption_datasets.zip: "
    "https://www.kaggle.com/datasets/shtvkumar/karpathy-splits, https://github.com/Delphboy/karpathy-splits",
    "               or BLIP's coco_karpathy_train.json, coco_karpathy_val.json and coco_karpathy_test.json in one "
    "folder: https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_train.json",
    "  then         imgcap data prepare coco --images train2014.zip --images val2014.zip "
    "--annotations annotations_trainval2014.zip --split-file dataset_coco.json",
)


@dataclass(frozen=True)
class CocoObject:
    """An object in an image: its box is (ymin, xmin, ymax, xmax) as shares of the image's height and width."""

    id: int
    area: float
    box: tuple[float, float, float, float]
    label: str
    is_crowd: bool


@dataclass(frozen=True)
class CocoImage:
    """An image with its captions (id, text) and objects, as COCO lists them. `place` is train2014 or val2014."""

    image_id: int
    filename: str
    place: str
    split: str
    captions: tuple[tuple[int, str], ...]
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class CocoContents:
    """What is written: the images in the order of the records, their files, and the names of the categories."""

    images: tuple[CocoImage, ...]
    files: tuple[Path | ZipMember, ...]
    sizes: tuple[int, ...]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class _Annotated:
    """COCO's own annotations. `captions` are empty if they are not needed and their files are missing."""

    images: dict[str, CocoImage]
    categories: tuple[str, ...]
    captions: dict[int, list[tuple[int, str]]] = field(default_factory=dict)


def check_train_size(count: int, folder: Path) -> None:
    """Raises a UserError unless train + restval contains all images of the official dataset."""
    expected = SPLITS["train"] + SPLITS["restval"]
    if count != expected:
        raise UserError(
            f"{folder}: {count:,} training images (train + restval), not COCO's {expected:,}; "
            "delete this folder and run: imgcap data prepare coco"
        )


def read_coco(
    data_dir: Path,
    *,
    images: Sequence[Path],
    annotations: Path | None,
    split_file: Path | None,
    download_dir: Path,
    shown: bool,
    say: Callable[[str], None],
) -> CocoContents:
    """Downloads what is not given, reads the annotations and finds the photos. Small files come first.

    Args:
        data_dir: folder of prepared datasets, whose disk must have enough space.
        images: folders and zip archives with the photos; empty: they are downloaded.
        annotations: folder, zip archive or one file of COCO's annotations; None: they are downloaded.
        split_file: a file with Karpathy's splits, as in `--split-file`; None: it is downloaded.
        download_dir: folder of downloads. Complete files in it are used.
        shown: whether to show the progress.
        say: receives one line per completed action.

    Raises:
        DownloadError: a file cannot be downloaded.
        UserError: a file is missing or damaged, the splits are not Karpathy's, photos are missing, or there is not
            enough space.
    """
    wanted = [*([] if images else PHOTOS), *([ANNOTATIONS] if annotations is None else [])]
    size = 0 if images else sum(archive.size for archive in PHOTOS)  # of given photos, the sizes are found later
    missing = sum(_missing(archive, download_dir) for archive in wanted)
    check_space((download_dir, missing, "--download-dir"), (data_dir, size, "--data-dir"))
    if annotations is None:
        annotations = _fetched(ANNOTATIONS, download_dir, shown, say)
    with _folder_of_annotations(annotations) as folder:
        with working("reading COCO's annotations", shown=shown):
            annotated = _read_annotations(folder)
        if split_file is None:
            listed = _with_downloaded_splits(annotated, download_dir, shown, say)
        else:
            listed = _with_splits(annotated, split_file, say)
    places = list(images) if images else [_fetched(archive, download_dir, shown, say) for archive in PHOTOS]
    return _with_photos(listed, annotated.categories, places)


def _missing(archive: Archive, download_dir: Path) -> int:
    """The number of bytes that must still be downloaded."""
    path = download_dir / archive.name
    part = path.with_name(f"{archive.name}.part")
    if path.is_file():
        return 0
    return archive.size - (part.stat().st_size if part.is_file() else 0)


def _fetched(archive: Archive, download_dir: Path, shown: bool, say: Callable[[str], None]) -> Path:
    path = download_dir / archive.name
    if path.is_file():
        if (size := path.stat().st_size) != archive.size:
            raise UserError(
                f"{path} has {size:,} bytes instead of {archive.size:,}; delete it and give the same command again"
            )
        return path
    option = "--annotations" if archive == ANNOTATIONS else "--images"
    fetch(
        archive.url,
        path,
        by_hand=f"download it by other means into {download_dir}, or pass it with {option}",
        elsewhere="use another --download-dir",
        sha256=archive.sha256,
        size=archive.size,
        shown=shown,
    )
    say(f"{NAME}: downloaded {path}")
    return path


@contextlib.contextmanager
def _folder_of_annotations(path: Path) -> Iterator[Path]:
    """The folder that contains instances_train2014.json and the like, which a zip archive is extracted to."""
    if path.suffix == ".json":
        path = path.parent
    names = {f"{kind}_{place}.json" for kind in ("instances", "captions") for place in _PLACES}
    with texts(path, names.__contains__) as folder:
        below = folder / "annotations"
        yield below if below.is_dir() else folder


def _read_annotations(folder: Path) -> _Annotated:
    images: dict[str, CocoImage] = {}
    categories: dict[int, str] = {}
    for place in _PLACES:
        path = folder / f"instances_{place}.json"
        with reading(path, "pass COCO's annotations_trainval2014.zip or its extracted folder with --annotations"):
            # Outlines would take most of the memory.
            document = json.loads(path.read_bytes(), object_hook=_without_outline)
            named = {int(category["id"]): str(category["name"]) for category in document["categories"]}
            if len(named) != _CATEGORIES or categories not in ({}, named):
                raise ValueError(f"{len(named)} categories instead of the {_CATEGORIES} of COCO")
            categories = named
            objects: dict[int, list[dict[str, Any]]] = {}
            for annotation in document["annotations"]:
                objects.setdefault(int(annotation["image_id"]), []).append(annotation)
            for image in document["images"]:
                found = sorted(objects.get(int(image["id"]), ()), key=lambda annotation: int(annotation["id"]))
                width, height = int(image["width"]), int(image["height"])
                images[image["file_name"]] = CocoImage(
                    image_id=int(image["id"]),
                    filename=str(image["file_name"]),
                    place=place,
                    split="",
                    captions=(),
                    objects=tuple(_object(annotation, width, height, categories) for annotation in found),
                )
    return _Annotated(images, tuple(categories.values()), _read_captions(folder))


def _without_outline(value: dict[str, Any]) -> dict[str, Any]:
    value.pop("segmentation", None)
    return value


def _object(annotation: Mapping[str, Any], width: int, height: int, categories: Mapping[int, str]) -> CocoObject:
    left, top, across, down = annotation["bbox"]
    return CocoObject(
        id=int(annotation["id"]),
        area=float(annotation["area"]),
        box=(top / height, left / width, (top + down) / height, (left + across) / width),
        label=categories[int(annotation["category_id"])],
        is_crowd=bool(annotation["iscrowd"]),
    )


def _read_captions(folder: Path) -> dict[int, list[tuple[int, str]]]:
    """Image id -> (id, text) of each caption, in the order of the files; empty if there are no such files."""
    captions: dict[int, list[tuple[int, str]]] = {}
    for place in _PLACES:
        path = folder / f"captions_{place}.json"
        if path.is_file():
            for image in json_lists.read_json(path):
                if isinstance(image, ListedImage):
                    captions[image.image_id] = list(image.captions)
    return captions


def _with_downloaded_splits(
    annotated: _Annotated, download_dir: Path, shown: bool, say: Callable[[str], None]
) -> list[CocoImage]:
    """The images with the splits of the first mirror that has Karpathy's file, or of an earlier download."""
    for name in dict.fromkeys(url.rsplit("/", 1)[1] for url in MIRRORS):
        if (path := download_dir / name).is_file():
            return _with_splits(annotated, path, say)
    advice = f"pass it with --split-file; {_WHERE_SPLITS}"
    failures = []
    for url in MIRRORS:
        path = download_dir / url.rsplit("/", 1)[1]
        try:
            fetch(url, path, by_hand=advice, elsewhere="use another --download-dir", shown=shown)
        except DownloadError as error:
            failures.append(str(error.__cause__ or error))
            continue
        try:
            listed = _with_splits(annotated, path, say, trusted=False)
        except UserError as error:
            path.unlink()
            failures.append(f"{url} is not Karpathy's file ({error})")
            continue
        say(f"{NAME}: downloaded {path}")
        return listed
    raise DownloadError(f"no copy of Karpathy's splits can be downloaded ({failures[0]}); {advice}")


def _with_splits(
    annotated: _Annotated, path: Path, say: Callable[[str], None], *, trusted: bool = True
) -> list[CocoImage]:
    """The images of Karpathy's splits, with captions, in the order of the records.

    Args:
        annotated: COCO's annotations.
        path: Karpathy's dataset_coco.json, a folder or zip archive that contains it, or BLIP's files.
        say: receives a note if captions are not COCO's.
        trusted: whether the user chose the file. If not, wrong captions are an error.

    Raises:
        UserError: the file does not have the splits of Karpathy.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; {_WHERE_SPLITS}")
    if path.name in _BLIP:
        path = path.parent
    with texts(path, lambda name: name == _KARPATHY or name in _BLIP) as place:
        karpathy = place / _KARPATHY if place.is_dir() else place
        images = _of_karpathy(annotated, karpathy) if karpathy.is_file() else _of_blip(annotated, place)
    counts = Counter(image.split for image in images)
    if counts != Counter(SPLITS):
        found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        expected = ", ".join(f"{split} {count:,}" for split, count in SPLITS.items())
        raise UserError(f"{path}: the splits have other sizes ({found}) than Karpathy's ({expected}); {_WHERE_SPLITS}")
    if wrong := [image for image in images if not _has_captions_of(image, annotated)]:
        message = f"{path}: the captions of {counted(len(wrong), 'image')} are not COCO's (first: {wrong[0].filename})"
        if not trusted and len(wrong) > _DIFFERENT * len(images):
            raise UserError(message)
        say(f"{NAME}: note: {message}")
    # The order of the official builder: by the digest of split and file name.
    order = {split: number for number, split in enumerate(SPLITS)}
    return sorted(images, key=lambda image: (order[image.split], _position(image)))


def _position(image: CocoImage) -> bytes:
    return hashlib.md5(f"{image.split}{image.filename}".encode(), usedforsecurity=False).digest()


def _has_captions_of(image: CocoImage, annotated: _Annotated) -> bool:
    """Whether the texts are those of COCO, except for spaces. True if COCO's captions are not there."""
    known = annotated.captions.get(image.image_id)
    return known is None or {" ".join(text.split()) for _, text in known} == {
        " ".join(text.split()) for _, text in image.captions
    }


def _of_karpathy(annotated: _Annotated, path: Path) -> list[CocoImage]:
    images = []
    for listed in json_lists.read_json(path):
        if not isinstance(listed, ListedImage):
            raise UserError(f"{path} contains a list, not Karpathy's splits; {_WHERE_SPLITS}")
        found = annotated.images.get(listed.filename)
        if found is None or found.image_id != listed.image_id:
            raise UserError(f"{listed.where}: COCO has no image {shown(listed.filename)} with the id {listed.image_id}")
        if not listed.captions:
            raise UserError(f"{listed.where}: {shown(listed.filename)} has no caption")
        images.append(_in_split(found, listed.split, listed.captions, listed.where))
    _refuse_repeated(path, images)
    return images


def _of_blip(annotated: _Annotated, folder: Path) -> list[CocoImage]:
    """The splits of BLIP's lists, whose train contains restval. The captions are COCO's, because theirs have no ids."""
    images = []
    for name, split in _BLIP.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; pass Karpathy's {_KARPATHY}, or a folder with {', '.join(_BLIP)}")
        if not annotated.captions:
            raise UserError(f"{path} has no ids of captions, so --annotations must contain captions_train2014.json")
        rows = [row for row in json_lists.read_json(path) if not isinstance(row, ListedImage)]
        for filename, row in {row.image.rsplit("/", 1)[-1]: row for row in rows}.items():
            found = annotated.images.get(filename)
            if found is None or row.image_id != found.image_id:
                raise UserError(f"{row.where}: COCO has no image {shown(filename)} with the id {row.image_id}")
            place_split = "restval" if (split, found.place) == ("train", "val2014") else split
            images.append(_in_split(found, place_split, annotated.captions.get(found.image_id, ()), row.where))
    _refuse_repeated(folder, images)
    return images


def _in_split(image: CocoImage, split: str, captions: Sequence[tuple[int, str]], where: str) -> CocoImage:
    if (image.place == "train2014") != (split == "train"):
        raise UserError(f"{where}: {image.filename} is in {image.place}, and cannot be in the split {split!r}")
    return replace(image, split=split, captions=tuple(captions))


def _refuse_repeated(path: Path, images: Sequence[CocoImage]) -> None:
    repeated = [name for name, count in Counter(image.filename for image in images).items() if count > 1]
    if repeated:
        raise UserError(f"{path} lists {counted(len(repeated), 'image')} twice (first: {repeated[0]})")


def _with_photos(images: Sequence[CocoImage], categories: tuple[str, ...], places: Sequence[Path]) -> CocoContents:
    found = files_by_name(_with_archives(places))
    missing = [image for image in images if image.filename not in found]
    if missing:
        counts = Counter(image.place for image in missing)
        parts = " and ".join(f"{count:,} of {place}" for place, count in counts.items())
        raise UserError(
            f"{', '.join(map(str, places))}: {parts} are missing (first: {missing[0].filename}); pass their folders or "
            "archives with --images, which can be repeated"
        )
    files = tuple(found[image.filename][0] for image in images)
    sizes = tuple(file.size if isinstance(file, ZipMember) else file.stat().st_size for file in files)
    return CocoContents(tuple(images), files, sizes, categories)


def _with_archives(places: Sequence[Path]) -> list[Path]:
    """The places, and COCO's archives that lie in one of them."""
    names = [archive.name for archive in PHOTOS]
    return [*places, *(place / name for place in places for name in names if (place / name).is_file())]
