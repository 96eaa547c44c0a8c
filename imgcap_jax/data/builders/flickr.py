"""Flickr8k and Flickr30k: where their photos and splits come from, and the sizes of the splits."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from imgcap_jax.data.builders.folder import FolderContents, scan_images
from imgcap_jax.data.builders.karpathy import check_known_files
from imgcap_jax.data.builders.listed import shown
from imgcap_jax.errors import UserError, counted

_KAGGLE = "https://www.kaggle.com/datasets/shtvkumar/karpathy-splits"
_GITHUB = "https://github.com/Delphboy/karpathy-splits"


@dataclass(frozen=True)
class FlickrDataset:
    """A dataset that people download themselves.

    Attributes:
        name: the name of the prepared dataset.
        splits: the number of photos of each split.
        source: stored with the dataset.
        licence: stored with the dataset.
        photos: where to get the photos, one line each.
        captions: where to get the captions with the splits, one line each.
        example: the options of `imgcap data prepare` for the files as they are downloaded.
    """

    name: str
    splits: dict[str, int]
    source: str
    licence: str
    photos: tuple[str, ...]
    captions: tuple[str, ...]
    example: str

    @property
    def karpathy(self) -> str:
        """The name of Karpathy's file."""
        return f"dataset_{self.name}.json"

    def guide(self) -> list[str]:
        """The lines that say where the dataset comes from."""
        lines = [f"{self.source}: {sum(self.splits.values()):,} photos. {self.licence}"]
        for title, places in (("photos", self.photos), ("captions", self.captions)):
            lines += [f"  {title if number == 0 else '':11}{place}" for number, place in enumerate(places)]
        return [*lines, f"  {'then':11}imgcap data prepare {self.name} {self.example}"]


_TERMS = "The photos belong to their Flickr owners; the dataset is for non-commercial research and education"
DATASETS = {
    dataset.name: dataset
    for dataset in (
        FlickrDataset(
            name="flickr8k",
            splits={"train": 6_000, "val": 1_000, "test": 1_000},
            source="Flickr8k (Hodosh et al. 2013)",
            licence=_TERMS,
            photos=(
                "request form: https://forms.illinois.edu/sec/1713398",
                "copy: https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip (1.1 GB)",
                "copy: https://www.kaggle.com/datasets/adityajn105/flickr8k",
            ),
            captions=(
                "with the splits of the authors: "
                "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip",
                f"the same splits in Karpathy's dataset_flickr8k.json: {_KAGGLE}, {_GITHUB}",
            ),
            example="--images Flickr8k_Dataset.zip --split-file Flickr8k_text.zip",
        ),
        FlickrDataset(
            name="flickr30k",
            splits={"train": 29_000, "val": 1_014, "test": 1_000},
            source="Flickr30k (Young et al. 2014)",
            licence=_TERMS,
            photos=(
                "page of the authors: https://shannon.cs.illinois.edu/DenotationGraph/",
                "request form: https://forms.illinois.edu/sec/229675",
                "copy: https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/flickr30k-images.zip (4.4 GB)",
            ),
            captions=(
                f"with Karpathy's splits, dataset_flickr30k.json: {_KAGGLE}",
                f"the same, under the name dataset_flickr32k.json: {_GITHUB}",
                "the same splits: https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/"
                "flickr_annotations_30k.csv",
            ),
            example="--images flickr30k-images.zip --split-file dataset_flickr30k.json",
        ),
    )
}


def scan_flickr(
    dataset: FlickrDataset,
    images: Path,
    split_file: Path | None,
    staging: Callable[[], AbstractContextManager[Path]],
) -> FolderContents:
    """Finds the photos and captions of a dataset.

    Args:
        dataset: what is expected.
        images: a folder or a zip archive of photos.
        split_file: captions with splits: a file, a folder or a zip archive; None: Karpathy's file in `images`.
        staging: makes a temporary folder for the annotation files of an archive, and removes it.

    Raises:
        UserError: a path does not exist, photos are missing, or the splits have other sizes.
    """
    how = f"imgcap data prepare {dataset.name} without options says where to get the files"
    if not images.exists():
        raise UserError(f"{images} does not exist; check the path ({how})")
    if split_file is None:
        split_file = images / dataset.karpathy
        if not split_file.is_file():
            raise UserError(
                f"{dataset.name}: the captions are missing; pass {dataset.karpathy} or another file with the splits "
                f"with --split-file ({how})"
            )
    elif split_file.exists():
        check_known_files(split_file, dataset.karpathy)
    contents = scan_images(images, split_file, dataset.karpathy, staging)
    part = f"a part of the dataset is prepared by: imgcap data prepare FOLDER --name {dataset.name}"
    if contents.absent:
        first = ", ".join(f"{shown(entry.name)}: {entry.reason}" for entry in contents.absent[:3])
        more = ", ..." if len(contents.absent) > 3 else ""
        raise UserError(
            f"{images}: {counted(len(contents.absent), 'photo')} of the {contents.listed:,} in {split_file} cannot be "
            f"used ({first}{more}); add or replace them; {part}"
        )
    found = Counter(image.split for image in contents.images)
    wrong = [
        f"{split} has {counted(found[split], 'photo')} instead of {expected:,}"
        for split, expected in dataset.splits.items()
        if found[split] != expected
    ]
    wrong += [f"{split} is not a split of it" for split in found if split not in dataset.splits]
    if wrong:
        raise UserError(f"{split_file} does not have the splits of {dataset.name}: {', '.join(wrong)} ({how}); {part}")
    return contents
