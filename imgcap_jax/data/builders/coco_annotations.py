"""COCO's annotations: the images, their captions and their objects."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.data.builders import json_lists
from imgcap_jax.data.builders.archives import ZipMember, annotations_by_name, read_annotation
from imgcap_jax.data.builders.listed import ListedImage
from imgcap_jax.errors import UserError
from imgcap_jax.files import explaining

PLACES = ("train2014", "val2014")
_CATEGORIES = 80
_ADVICE = "pass COCO's annotations_trainval2014.zip or its extracted folder with --annotations"


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
    width: int
    height: int
    split: str
    captions: tuple[tuple[int, str], ...]
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class Annotated:
    """What COCO's annotations list.

    Attributes:
        images: by file name, without split and captions.
        categories: names of the categories of objects.
        captions: (id, text) of each caption by image id; empty if their files are missing.
    """

    images: dict[str, CocoImage]
    categories: tuple[str, ...]
    captions: dict[int, list[tuple[int, str]]]


def read_annotations(path: Path) -> Annotated:
    """Reads instances_train2014.json and the like.

    Args:
        path: COCO's archive of annotations, its extracted folder, or one of the files in it.

    Raises:
        UserError: a file is missing or damaged.
    """
    if path.suffix == ".json":
        path = path.parent
    files = annotations_by_name(
        path, [f"{kind}_{place}.json" for kind in ("instances", "captions") for place in PLACES]
    )
    images: dict[str, CocoImage] = {}
    categories: dict[int, str] = {}
    for place in PLACES:
        name = f"instances_{place}.json"
        file = files.get(name, path / name)
        with explaining(Path(str(file)), _ADVICE):
            # Outlines would take most of the memory.
            document = json.loads(read_annotation(file, _ADVICE), object_hook=_without_outline)
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
                    width=width,
                    height=height,
                    split="",
                    captions=(),
                    objects=tuple(_object(annotation, width, height, categories) for annotation in found),
                )
    return Annotated(images, tuple(categories.values()), _read_captions(files))


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


def _read_captions(files: Mapping[str, Path | ZipMember]) -> dict[int, list[tuple[int, str]]]:
    """Image id -> (id, text) of each caption, in the order of the files; empty if there are no such files."""
    captions: dict[int, list[tuple[int, str]]] = {}
    for place in PLACES:
        name = f"captions_{place}.json"
        for image in json_lists.read_json(files[name]) if name in files else ():
            if not isinstance(image, ListedImage):
                raise UserError(f"{files[name]} contains a list, not COCO's captions; {_ADVICE}")
            captions[image.image_id] = list(image.captions)
    return captions
