"""What annotation files list, whatever their format: images with captions."""

import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from imgcap_jax.errors import UserError, printable
from imgcap_jax.image_ids import hashed_id, id_of_file_name

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The names of splits that people use (those of Hugging Face's image folders), and ours."""


@dataclass(frozen=True)
class ListedImage:
    """One image of an annotation file.

    Attributes:
        filename: its path as listed.
        subfolder: Karpathy's `filepath`; "" if there is none.
        image_id: the id that the file gives, or else that of the file name.
        split: train, val, test, ...
        captions: (id, raw text) pairs, unchanged.
        where: the place in the annotation file, for error messages.
        id_given: whether the file gives the id.
    """

    filename: str
    subfolder: str
    image_id: int
    split: str
    captions: tuple[tuple[int, str], ...]
    where: str
    id_given: bool = True

    @property
    def path(self) -> str:
        """The path as listed, below the subfolder if there is one."""
        return posixpath.join(self.subfolder, self.filename)


@dataclass(frozen=True)
class Row:
    """One entry of a list. Several rows can describe one image, with one caption each.

    `split` and `image_id` are None if the entry does not have them.
    """

    image: str
    captions: tuple[str, ...]
    where: str
    split: str | None = None
    image_id: int | None = None


class WrongRows(UserError):
    """Several entries of a list cannot be read. `rows` are their errors, one line each."""

    def __init__(self, file: object, rows: Sequence[str]) -> None:
        first = "; ".join(rows[:3]) + ("; ..." if len(rows) > 3 else "")
        super().__init__(first if len(rows) == 1 else f"{file}: {len(rows)} entries cannot be read: {first}")
        self.rows = tuple(rows)


def collect(file: object, readers: Iterable[Callable[[], Row]]) -> list[Row]:
    """Calls all readers of rows. Raises WrongRows with the errors of all of them."""
    rows, errors = [], []
    for reader in readers:
        try:
            rows.append(reader())
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise WrongRows(file, errors)
    return rows


def split_name(name: str) -> str:
    """Our name of a split: "validation" and "dev" are "val". Other names are returned unchanged."""
    return _SPLIT_NAMES.get(name.lower(), name)


def known_split(name: str) -> str | None:
    """Our name of a split, or None if the text is not the name of a split."""
    return _SPLIT_NAMES.get(name.lower())


def group(rows: Iterable[Row], split_of: Callable[[Row], str]) -> list[ListedImage]:
    """Joins the rows of each image of a split, in the order of their first rows.

    Raises:
        UserError: rows of one image have different ids.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.image, split_of(row)), []).append(row)
    images = []
    number = 0
    for (name, split), of_image in grouped.items():
        ids = {row.image_id: row for row in of_image if row.image_id is not None}
        if len(ids) > 1:
            one, other = list(ids.values())[:2]
            raise UserError(
                f"{other.where}: {shown(name)} has the image_id {other.image_id}, but {one.image_id} in {one.where}; "
                "give each photo one id, or remove the key"
            )
        captions = []
        for row in of_image:
            for text in row.captions:
                captions.append((number, text))
                number += 1
        image_id = next(iter(ids), id_of_file_name(name))
        images.append(ListedImage(name, "", image_id, split, tuple(captions), of_image[0].where, bool(ids)))
    return images


def with_distinct_ids(images: Sequence[ListedImage]) -> list[ListedImage]:
    """Gives images with computed ids, if another image has the same id, that of the digest of their names.

    Names of 12 digits are common outside of COCO, for example `cam1/000000000001.jpg` and `cam2/000000000001.jpg`.
    """
    paths: dict[int, set[str]] = {}
    for image in images:
        paths.setdefault(image.image_id, set()).add(image.path)
    return [
        image if image.id_given or len(paths[image.image_id]) == 1 else replace(image, image_id=hashed_id(image.path))
        for image in images
    ]


def shown(name: str) -> str:
    """A file name or caption for a message of one line: printable and not too long."""
    name = printable(name)
    return name if len(name) <= 300 else f"{name[:300]}..."
