"""The known copies of Karpathy's files of splits, and where they are."""

import hashlib
from pathlib import Path

from imgcap_jax.data.builders.archives import ZipMember, is_zip, members, read_annotation
from imgcap_jax.errors import UserError
from imgcap_jax.files import file_digest

ARCHIVE_SIZE = 36_745_453
# From url_checksums/coco_captions.txt of TFDS.
ARCHIVE_SHA256 = "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"
# The copy on GitHub has the same name and another format. Size and digest are those of its Git LFS pointer.
GITHUB_SIZE = 408_860_810
GITHUB_SHA256 = "af76e819987c9ced8452fdb4da823524e033f7baa097cf40bab83bdab4c469ea"
# Size in bytes -> name and SHA-256. Those of the files in caption_datasets.zip are as other projects publish them; the
# copies on Kaggle are the same.
KNOWN = {
    ARCHIVE_SIZE: ("caption_datasets.zip", ARCHIVE_SHA256),
    GITHUB_SIZE: ("dataset_coco.json", GITHUB_SHA256),
    144_186_139: ("dataset_coco.json", "2fd999220673258012acfb411a4e7e66af7d488050b2519b0badcc49b7600b8d"),
    38_318_553: ("dataset_flickr30k.json", "db779ee2c5df40c25ff0eebeca464f6124b620cc4a9398650aea71fd1b53d4af"),
    111_042_326: ("dataset_flickr32k.json", "64c85af0e9d187091cb88890e56b3f640ac48386196a930d3ff8433d73165135"),
}


def check_known(file: Path | ZipMember) -> None:
    """Raises a UserError if a file has the size of a known copy of Karpathy's files, and another SHA-256."""
    if isinstance(file, Path) and not file.is_file():
        return
    size = file.size if isinstance(file, ZipMember) else file.stat().st_size
    if size not in KNOWN:
        return
    name, expected = KNOWN[size]
    if isinstance(file, Path):
        digest = file_digest(file)
    else:
        digest = hashlib.sha256(read_annotation(file, "download it again")).hexdigest()
    if digest != expected:
        raise UserError(
            f"{file} has the size of Karpathy's {name}, but another SHA-256 ({digest[:16]}... instead of "
            f"{expected[:16]}...); download it again"
        )


def check_known_files(path: Path, name: str) -> None:
    """Applies `check_known` to a file, or to the file of a name in a folder or zip archive."""
    check_known(path)
    if path.is_dir():
        check_known(path / name)
    elif is_zip(path):
        for member in members(path):
            if member.path.name == name:
                check_known(member)
