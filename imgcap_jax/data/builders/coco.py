"""`coco`: COCO 2014 with Karpathy's splits, as the official TFDS dataset `coco_captions/2014` has it.

The photos and annotations are COCO's archives, which are downloaded or given. This module downloads them and finds the
photos. `coco_annotations` and `coco_splits` read the lists, and `coco_builder` writes the records.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgcap_jax.data.builders.archives import ZipMember, check_space, files_by_name, without_copies
from imgcap_jax.data.builders.coco_annotations import Annotated, CocoImage, read_annotations
from imgcap_jax.data.builders.coco_splits import WHERE, read_splits
from imgcap_jax.data.builders.karpathy import ARCHIVE_SHA256, ARCHIVE_SIZE, GITHUB_SHA256, GITHUB_SIZE
from imgcap_jax.data.builders.layout import Origin
from imgcap_jax.downloads import DownloadError, fetch
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import file_digest
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


@dataclass(frozen=True)
class Archive:
    """A file to download: its address, its size in bytes and its SHA-256."""

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
# Copies of Karpathy's file. The original address does not answer.
MIRRORS = (
    Archive(
        "https://huggingface.co/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip",
        ARCHIVE_SIZE,
        ARCHIVE_SHA256,
    ),
    Archive("https://github.com/Delphboy/karpathy-splits/raw/main/dataset_coco.json", GITHUB_SIZE, GITHUB_SHA256),
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
class CocoContents:
    """What is written.

    Attributes:
        images: in the order of the records.
        files: the file of each image.
        sizes: the size of each file in bytes.
        categories: the names of the categories of objects.
    """

    images: tuple[CocoImage, ...]
    files: tuple[Path | ZipMember, ...]
    sizes: tuple[int, ...]
    categories: tuple[str, ...]


def check_train_size(count: int, folder: Path) -> None:
    """Raises a UserError unless train + restval contains all images of the official dataset."""
    expected = SPLITS["train"] + SPLITS["restval"]
    if count != expected:
        raise UserError(
            f"{folder}: {count:,} training images (train + restval), not COCO's {expected:,}; "
            "delete this folder and run: imgcap data prepare coco"
        )


def check_given(images: Sequence[Path], annotations: Path | None, split_file: Path | None) -> None:
    """Raises a UserError if a path that the user gave does not exist."""
    for path in (*images, annotations):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist; check the path")
    if split_file is not None and not split_file.exists():
        raise UserError(f"{split_file} does not exist; check the path; {WHERE}")


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
        UserError: a file is missing or damaged, the splits are not Karpathy's, photos are missing or found more than
            once, or there is not enough space.
    """
    # Of the copies of the splits, the space for the largest one is reserved.
    largest = max(MIRRORS, key=lambda mirror: mirror.size)
    splits = [largest] if not any((download_dir / mirror.name).is_file() for mirror in MIRRORS) else []
    wanted = [
        *([] if images else PHOTOS),
        *([ANNOTATIONS] if annotations is None else []),
        *(splits if split_file is None else []),
    ]
    size = 0 if images else sum(archive.size for archive in PHOTOS)  # of given photos, the sizes are found later
    missing = sum(_missing(archive, download_dir) for archive in wanted)
    check_space((download_dir, missing, "--download-dir"), (data_dir, size, "--data-dir"))
    if annotations is None:
        annotations = _fetched(ANNOTATIONS, download_dir, shown, say)
    with working("reading COCO's annotations", shown=shown):
        annotated = read_annotations(annotations)
    if split_file is None:
        listed = _downloaded_splits(annotated, download_dir, shown, say)
    else:
        with working("reading Karpathy's splits", shown=shown):
            listed = read_splits(annotated, split_file, SPLITS, say)
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
                f"{path} has {size:,} bytes instead of {archive.size:,}; delete it and run the same command again"
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


def _downloaded_splits(
    annotated: Annotated, download_dir: Path, shown: bool, say: Callable[[str], None]
) -> list[CocoImage]:
    """The images with the splits of the first copy that can be downloaded. Earlier downloads come first."""
    advice = f"pass it with --split-file; {WHERE}"
    failures = []
    for mirror in sorted(MIRRORS, key=lambda mirror: not (download_dir / mirror.name).is_file()):
        path = download_dir / mirror.name
        before = path.is_file()
        if before and (path.stat().st_size, file_digest(path)) != (mirror.size, mirror.sha256):
            say(f"{NAME}: {path} is not the published file; downloading it again")
            path.unlink()
            before = False
        try:
            fetch(
                mirror.url,
                path,
                by_hand=advice,
                elsewhere="use another --download-dir",
                sha256=mirror.sha256,
                size=mirror.size,
                shown=shown,
            )
        except DownloadError as error:
            failures.append(f"{mirror.url}: {error.__cause__}" if error.__cause__ else str(error))
            continue
        try:
            listed = read_splits(annotated, path, SPLITS, say)
        except UserError as error:
            path.unlink()
            failures.append(f"{mirror.url} is not Karpathy's file ({error})")
            continue
        if not before:
            say(f"{NAME}: downloaded {path}")
        return listed
    raise DownloadError(f"no copy of Karpathy's splits can be downloaded ({'; '.join(failures)}); {advice}")


def _with_photos(images: Sequence[CocoImage], categories: tuple[str, ...], places: Sequence[Path]) -> CocoContents:
    found = files_by_name(places)
    if any(image.filename not in found for image in images):
        archives = [place / archive.name for place in places for archive in PHOTOS]
        for name, files in files_by_name([path for path in archives if path.is_file()]).items():
            found.setdefault(name, files)
    where = ", ".join(map(str, places))
    missing = [image for image in images if image.filename not in found]
    if missing:
        counts = Counter(image.place for image in missing)
        parts = " and ".join(f"{count:,} of {place}" for place, count in counts.items())
        raise UserError(
            f"{where}: {parts} are missing (first: {missing[0].filename}); pass their folders or archives with "
            "--images, which can be repeated"
        )
    chosen = [_candidates(image, found[image.filename]) for image in images]
    if several := [files for files in chosen if len(files) > 1]:
        raise UserError(
            f"{where}: {counted(len(several), 'photo')} found more than once (first: {several[0][0]} and "
            f"{several[0][1]}); pass only one of these places with --images"
        )
    photos = tuple(file for (file,) in chosen)
    sizes = tuple(file.size if isinstance(file, ZipMember) else file.stat().st_size for file in photos)
    return CocoContents(tuple(images), photos, sizes, categories)


def _candidates(image: CocoImage, files: Sequence[Path | ZipMember]) -> list[Path | ZipMember]:
    """The files of a photo: those in a folder with COCO's name, train2014 or val2014, if there are some."""
    if len(files) == 1:
        return list(files)
    parents = [file.path.parent.name if isinstance(file, ZipMember) else file.parent.name for file in files]
    of_coco = [file for file, parent in zip(files, parents, strict=True) if parent == image.place]
    return without_copies(of_coco or files)
