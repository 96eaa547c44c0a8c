"""Karpathy's splits of COCO: his own file, or BLIP's lists."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from imgcap_jax.data.builders import json_lists
from imgcap_jax.data.builders.archives import ZipMember, annotations_by_name, is_zip
from imgcap_jax.data.builders.coco_annotations import Annotated, CocoImage
from imgcap_jax.data.builders.karpathy import check_known
from imgcap_jax.data.builders.listed import ListedImage, shown
from imgcap_jax.errors import UserError, counted

_KARPATHY = "dataset_coco.json"
_BLIP = {f"coco_karpathy_{split}.json": split for split in ("train", "val", "test")}
WHERE = (
    f"{_KARPATHY} is in https://www.kaggle.com/datasets/shtvkumar/karpathy-splits and "
    "https://github.com/Delphboy/karpathy-splits"
)


def read_splits(
    annotated: Annotated, path: Path, sizes: Mapping[str, int], say: Callable[[str], None]
) -> list[CocoImage]:
    """The images of Karpathy's splits, with captions, in the order of the records.

    The SHA-256 of a known copy of Karpathy's file is checked. Of other files, the sizes of the splits, the ids, and the
    folders train2014 and val2014 are checked.

    Args:
        annotated: COCO's annotations.
        path: Karpathy's dataset_coco.json, a folder or zip archive that contains it, or BLIP's files.
        sizes: the number of images of each split.
        say: receives a note if captions are not COCO's.

    Raises:
        UserError: the file does not have the splits of Karpathy.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path; {WHERE}")
    if path.name in _BLIP:
        path = path.parent
    check_known(path)
    single = path.is_file() and not is_zip(path)
    files = {_KARPATHY: path} if single else annotations_by_name(path, [_KARPATHY, *_BLIP])
    images = _of_karpathy(annotated, files[_KARPATHY]) if _KARPATHY in files else _of_blip(annotated, path, files)
    repeated = [name for name, count in Counter(image.filename for image in images).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path} lists {counted(len(repeated), 'image')} twice (first: {shown(repeated[0])}); use another copy: "
            f"{WHERE}"
        )
    counts = Counter(image.split for image in images)
    if counts != Counter(sizes):
        found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        expected = ", ".join(f"{split} {count:,}" for split, count in sizes.items())
        raise UserError(f"{path}: the splits have other sizes ({found}) than Karpathy's ({expected}); {WHERE}")
    if wrong := [image for image in images if not _has_captions_of(image, annotated)]:
        say(
            f"coco_captions: note: {path}: the captions of {counted(len(wrong), 'image')} are not COCO's "
            f"(first: {wrong[0].filename})"
        )
    # The order of the official builder: by the digest of split and file name.
    order = {split: number for number, split in enumerate(sizes)}
    return sorted(images, key=lambda image: (order[image.split], _position(image)))


def _position(image: CocoImage) -> bytes:
    return hashlib.md5(f"{image.split}{image.filename}".encode(), usedforsecurity=False).digest()


def _has_captions_of(image: CocoImage, annotated: Annotated) -> bool:
    """Whether the texts are those of COCO, except for spaces. True if COCO's captions are not there."""
    known = annotated.captions.get(image.image_id)
    return known is None or {" ".join(text.split()) for _, text in known} == {
        " ".join(text.split()) for _, text in image.captions
    }


def _of_karpathy(annotated: Annotated, file: Path | ZipMember) -> list[CocoImage]:
    check_known(file)
    images = []
    for listed in json_lists.read_json(file):
        if not isinstance(listed, ListedImage):
            raise UserError(f"{file} contains a list, not Karpathy's splits; {WHERE}")
        found = _known_image(annotated, listed.filename, listed.image_id, listed.where)
        if not listed.captions:
            raise UserError(f"{listed.where}: {shown(listed.filename)} has no caption; use another copy: {WHERE}")
        images.append(_in_split(found, listed.split, listed.captions, listed.where))
    return images


def _of_blip(annotated: Annotated, folder: Path, files: Mapping[str, Path | ZipMember]) -> list[CocoImage]:
    """The splits of BLIP's lists, whose train contains restval. The captions are COCO's, because theirs have no ids."""
    images = []
    for name, split in _BLIP.items():
        if name not in files:
            raise UserError(
                f"{folder / name} is missing; pass Karpathy's {_KARPATHY}, or a folder with {', '.join(_BLIP)}"
            )
        if not annotated.captions:
            raise UserError(f"{files[name]} has no ids of captions, so --annotations must have captions_train2014.json")
        rows = [row for row in json_lists.read_json(files[name]) if not isinstance(row, ListedImage)]
        for filename, row in {row.image.rsplit("/", 1)[-1]: row for row in rows}.items():
            found = _known_image(annotated, filename, row.image_id, row.where)
            place_split = "restval" if (split, found.place) == ("train", "val2014") else split
            images.append(_in_split(found, place_split, annotated.captions.get(found.image_id, ()), row.where))
    return images


def _known_image(annotated: Annotated, filename: str, image_id: int | None, where: str) -> CocoImage:
    """COCO's image of a name, which must have the id. BLIP's lists of val and test have no ids."""
    found = annotated.images.get(filename)
    if found is None or image_id not in (None, found.image_id):
        with_id = "" if image_id is None else f" with the id {image_id}"
        raise UserError(f"{where}: COCO has no image {shown(filename)}{with_id}; use another copy: {WHERE}")
    return found


def _in_split(image: CocoImage, split: str, captions: Sequence[tuple[int, str]], where: str) -> CocoImage:
    if (image.place == "train2014") != (split == "train"):
        raise UserError(
            f"{where}: {image.filename} is in {image.place}, and cannot be in the split {split!r}; use another copy: "
            f"{WHERE}"
        )
    return replace(image, split=split, captions=tuple(captions))
