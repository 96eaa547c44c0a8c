"""Captions in COCO's file formats, which all caption scorers read.

Results have one caption per image: ``[{"image_id": 1, "caption": "a dog"}, ...]``.

References are COCO annotations: ``{"images": [{"id": 1, "file_name": "1.jpg"}, ...], "annotations": [{"id": 1,
"image_id": 1, "caption": "a dog"}, ...]}``.

Results can contain file names too, under "file_name". COCO's tools ignore the key. It shows which photo a caption
belongs to, and `check_file_names` finds captions and references of different photos under the same id.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import reading, write_text
from imgcap_jax.image_ids import coco_number, parse_image_id

_IMAGE_ENDING = re.compile(r"\.(?:jpe?g|png|gif|bmp|webp|tiff?|avif|ppm)$", re.IGNORECASE)
_RESULTS = 'a list of {"image_id": 1, "caption": "..."}'
_REFERENCES = 'an object with "annotations": [{"image_id": 1, "caption": "..."}, ...]'


class Captions(dict[int, list[str]]):
    """Image id -> captions. `file_names` maps image ids to file names, for the images whose names the file gives."""

    def __init__(self) -> None:
        super().__init__()
        self.file_names: dict[int, str] = {}


def read_captions(path: Path) -> Captions:
    """All captions of each image, in the order of the file.

    An image can have several entries with one caption each, or one entry with several captions. ``imgcap evaluate``
    writes n-best lists in the second form: ``[{"image_id": 1, "captions": [{"caption": "a dog"}, ...]}, ...]``.

    Returns:
        Image id -> captions.

    Raises:
        UserError: the file is missing or does not have the format.
    """
    entries = _read(path, _RESULTS)
    if isinstance(entries, dict) and "annotations" in entries:
        raise UserError(f"{path} contains references (COCO annotations), not results: expected {_RESULTS}")
    captions = Captions()
    for image_id, caption in _entries(entries, path, "", _RESULTS):
        captions.setdefault(image_id, []).append(caption)
    captions.file_names = _file_names(entries, "image_id")
    return captions


def first_captions(captions: Mapping[int, Sequence[str]]) -> tuple[dict[int, str], list[int]]:
    """The first caption of each image, and the ids of the images with several captions."""
    several = [image_id for image_id, found in captions.items() if len(found) > 1]
    return {image_id: found[0] for image_id, found in captions.items()}, several


def write_results(path: Path, captions: Mapping[int, str], file_names: Mapping[int, str] | None = None) -> None:
    """Writes one candidate caption per image. `file_names` maps all image ids to file names, if they are known."""
    results: list[dict[str, Any]] = [{"image_id": int(i), "caption": caption} for i, caption in captions.items()]
    if file_names is not None:
        results = [{**result, "file_name": file_names[result["image_id"]]} for result in results]
    write_text(path, _json(results))


def check_file_names(path: Path, captions: Captions, references_path: Path, references: Captions) -> list[str]:
    """Checks that the images with the same id have the same file name in both files.

    Folders, file endings and case do not matter, nor what precedes the number in a name of COCO: systems store the same
    photo as `COCO_val2014_000000000042.jpg` and `000000000042.png`.

    Returns:
        A warning if some names differ; otherwise an empty list.

    Raises:
        UserError: more than half of the names differ, so that captions would be compared with references of other
            photos.
    """
    both = [image_id for image_id in captions.file_names if image_id in references.file_names]
    differ = [i for i in both if _photo(captions.file_names[i]) != _photo(references.file_names[i])]
    if not differ:
        return []
    first = differ[0]
    message = (
        f"{counted(len(differ), 'image')} of {len(both):,} with another file name in {path} than in {references_path} "
        f"(first: image {first}, {captions.file_names[first]!r} and {references.file_names[first]!r})"
    )
    if 2 * len(differ) > len(both):
        raise UserError(
            f"{message}: the files are of different datasets, or of one whose ids have changed; caption the images "
            "again, or remove the file names from one file if the ids are right"
        )
    return [f"{message}: check that they are the same photos"]


def _photo(name: str) -> int | str:
    """What file names of the same photo have in common."""
    name = _IMAGE_ENDING.sub("", PurePosixPath(name.replace("\\", "/")).name)
    number = coco_number(name)
    return name.casefold() if number is None else number


def read_references(path: Path) -> Captions:
    """The references of each image, in the order of the annotations.

    Images that are listed but have no caption are omitted.

    Returns:
        Image id -> captions.

    Raises:
        UserError: the file is missing, does not have the format, or lists an image twice.
    """
    document = _read(path, _REFERENCES)
    if isinstance(document, list):
        raise UserError(f"{path} contains a list, as results files do, not references: expected {_REFERENCES}")
    if not isinstance(document, dict) or "annotations" not in document:
        raise UserError(f"{path} has no 'annotations': expected {_REFERENCES}")
    images = document.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise UserError(f'{path}: "images" must be a list of {{"id": 1, ...}}')
    listed: set[int] = set()
    for number, image in enumerate(images):
        image_id = _id(image.get("id"), f"{path}: entry {number} of images", "id")
        if image_id in listed:
            raise UserError(f"{path} lists image {image_id} twice under 'images': keep one entry per image")
        listed.add(image_id)
    references = Captions()
    for image_id, caption in _entries(document["annotations"], path, "annotations", _REFERENCES):
        if listed and image_id not in listed:
            raise UserError(f"{path}: image {image_id} has a caption but is not listed under 'images': add it there")
        references.setdefault(image_id, []).append(caption)
    references.file_names = _file_names(images, "id")
    return references


def write_references(
    path: Path, references: Mapping[int, Sequence[str]], file_names: Mapping[int, str] | None = None
) -> None:
    """Writes references as COCO annotations. `file_names` maps all image ids to file names, if they are known."""
    images: list[dict[str, Any]] = [{"id": int(image)} for image in references]
    if file_names is not None:
        images = [{**image, "file_name": file_names[image["id"]]} for image in images]
    captions = [(int(image), caption) for image, texts in references.items() for caption in texts]
    annotations = [
        {"id": number, "image_id": image, "caption": caption} for number, (image, caption) in enumerate(captions, 1)
    ]
    write_text(path, _json({"images": images, "annotations": annotations}))


def _read(path: Path, expected: str) -> Any:
    # Unlike `files.read_json`, this accepts NaN in the many keys that are not used, such as a score.
    with reading(path, f"give a JSON file with {expected}"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def _entries(entries: Any, path: Path, key: str, expected: str) -> list[tuple[int, str]]:
    """The image id and caption of each entry of a list. `key` is the name of the list in the file, or empty."""
    if not isinstance(entries, list) or not entries:
        what = "is not a list" if not isinstance(entries, list) else "is empty"
        raise UserError(f"{path}: {key or 'the document'} {what}: expected {expected}")
    pairs = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}{' of ' + key if key else ''}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is not an object: expected {expected}")
        several = entry.get("captions") if entry.get("caption") is None else None
        if several is not None and (not isinstance(several, list) or not several):
            raise UserError(
                f"{where}: 'captions' is {several!r}, not a list of at least one caption: expected {expected}"
            )
        for one in [entry] if several is None else several:
            found = one if isinstance(one, dict) else {"caption": one}
            for name, value in (("image_id", entry.get("image_id")), ("caption", found.get("caption"))):
                if value is None:
                    raise UserError(f"{where} has no {name!r}: expected {expected}")
            image_id, caption = _id(entry["image_id"], where, "image_id"), found["caption"]
            if isinstance(caption, list) and len(caption) == 1:  # LAVIS
                (caption,) = caption
            if not isinstance(caption, str):
                raise UserError(f"{where}: caption {caption!r} is not a string: put the sentence in quotes")
            if re.search("[\ud800-\udfff]", caption):
                raise UserError(
                    f"{where}: caption {caption!r} contains a lone surrogate, which no file can store: remove it"
                )
            pairs.append((image_id, caption))
    return pairs


def _id(value: Any, where: str, key: str) -> int:
    try:
        return parse_image_id(value)
    except ValueError as error:
        raise UserError(f"{where}: {key} {error}: use the COCO image id") from None


def _file_names(entries: Sequence[Mapping[str, Any]], key: str) -> dict[int, str]:
    """The file names in a list whose entries have been checked."""
    names = ((entry[key], entry.get("file_name")) for entry in entries)
    return {parse_image_id(image_id): name for image_id, name in names if isinstance(name, str)}


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)
