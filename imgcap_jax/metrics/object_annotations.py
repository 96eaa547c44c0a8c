"""COCO's instance annotations: the objects that annotators outlined in each image."""

import json
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import reading
from imgcap_jax.image_ids import parse_image_id
from imgcap_jax.metrics.object_names import OBJECTS

_EXPECTED = (
    'a file such as instances_val2014.json, with "categories": [{"id": 1, "name": "person"}, ...] and "annotations": '
    '[{"image_id": 1, "category_id": 1}, ...]'
)
_KEYS = ("images", "annotations", "categories", "id", "image_id", "category_id", "name")


def read_instances(path: Path) -> dict[int, frozenset[str]]:
    """The objects of each image in a file of COCO's instance annotations.

    Outlines are dropped while the file is parsed. The largest file, instances_train2014.json, has 330 MB.

    Returns:
        Image id -> names of objects, for all images that the file lists or annotates. The set of an image can be empty.

    Raises:
        UserError: the file is missing, does not have the format, or has a category that is not one of COCO's 80.
    """
    with reading(path, f"give {_EXPECTED}"):
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_needed)
    if not isinstance(document, dict) or not all(
        _is_list_of_objects(document.get(key)) for key in ("annotations", "categories")
    ):
        raise UserError(f"{path} does not contain instance annotations: expected {_EXPECTED}")
    names = {category.get("id"): category.get("name") for category in document["categories"]}
    if strange := [name for name in names.values() if name not in OBJECTS]:
        raise UserError(f"{path}: the category {strange[0]!r} is not one of COCO's 80 objects: expected {_EXPECTED}")
    images = document.get("images", [])
    if not _is_list_of_objects(images):
        raise UserError(f'{path}: "images" must be a list of {{"id": 1, ...}}')
    found: dict[int, set[str]] = {_id(path, "images", n, image, "id"): set() for n, image in enumerate(images)}
    for number, annotation in enumerate(document["annotations"]):
        category = annotation.get("category_id")
        if not isinstance(category, int) or category not in names:
            raise UserError(
                f"{path}: entry {number} of annotations: category_id {category!r} is not listed under 'categories'; "
                f"expected {_EXPECTED}"
            )
        found.setdefault(_id(path, "annotations", number, annotation, "image_id"), set()).add(names[category])
    return {image: frozenset(objects) for image, objects in found.items()}


def _needed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _KEYS if key in entry}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _id(path: Path, part: str, number: int, entry: dict[str, Any], key: str) -> int:
    try:
        return parse_image_id(entry.get(key))
    except ValueError as error:
        raise UserError(f"{path}: entry {number} of {part}: {key} {error}: use the COCO image id") from None
