"""`coco`: the official TFDS `coco_captions/2014`, Karpathy's splits of COCO 2014.

Preparing needs TensorFlow (extra `coco`), because the official builder does; reading does not.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from imgcap_jax.data.builders.layout import Origin
from imgcap_jax.errors import UserError

NAME = "coco_captions"
CONFIG = "2014"
# Karpathy's train (82,783) and restval (30,504), on which the field trains.
TRAIN_IMAGES = 113_287
ORIGIN = Origin(
    kind="coco",
    source="COCO 2014 with the splits of Karpathy and Li (2015), http://cocodataset.org",
    licence="captions CC BY 4.0; photos belong to their Flickr owners under their terms",
    fingerprint="coco_captions/2014:1.1.0",
)


def require_tensorflow() -> None:
    """Raises a UserError where TensorFlow is absent."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "coco: preparing the official coco_captions needs TensorFlow; pip install 'imgcap_jax[coco]' "
            "(reading the prepared dataset does not)"
        )


def check_train_size(count: int, folder: Path) -> None:
    """Raises a UserError unless train + restval holds all images of the official dataset."""
    if count != TRAIN_IMAGES:
        raise UserError(
            f"{folder}: {count:,} training images (train + restval), not COCO's {TRAIN_IMAGES:,}; "
            "remove this folder and run: imgcap data prepare coco"
        )


def build(data_dir: Path, download_dir: Path | None = None) -> Path:
    """Downloads COCO (20 GB) and prepares it as array_record; the folder of the dataset.

    Raises:
        UserError: without TensorFlow, or when the download fails.
    """
    require_tensorflow()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its greetings are of no interest here
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.object_detection.coco_captions import CocoCaptions

    with _without_test_images(CocoCaptions):
        builder = CocoCaptions(data_dir=data_dir, config=CONFIG)
        try:
            builder.download_and_prepare(file_format="array_record", download_dir=download_dir)
        except (tfds.download.DownloadError, NonMatchingChecksumError, requests.RequestException) as error:
            raise UserError(f"coco: the download failed ({error}); run the same command again to go on") from error
    return Path(builder.data_dir)


@contextlib.contextmanager
def _without_test_images(builder: type) -> Iterator[None]:
    """Spares the download of COCO's test images (20 GB more), of which coco_captions uses none."""
    config = builder.BUILDER_CONFIGS[0]  # type: ignore[attr-defined]
    splits = config.splits
    config.splits = [split for split in splits if not split.name.startswith("test")]
    try:
        yield
    finally:
        config.splits = splits
