"""`coco`: the official TFDS dataset `coco_captions/2014`, COCO 2014 with Karpathy's splits.

Preparing it needs TensorFlow (extra `coco`), because the official builder does. Reading it does not.
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
# Karpathy's train (82,783) plus restval (30,504), the usual training set.
TRAIN_IMAGES = 113_287
ORIGIN = Origin(
    kind="coco",
    source="COCO 2014 with the splits of Karpathy and Li (2015), http://cocodataset.org",
    licence="captions CC BY 4.0; photos belong to their Flickr owners under their terms",
    fingerprint="coco_captions/2014:1.1.0",
)


def require_tensorflow() -> None:
    """Raises a UserError if TensorFlow is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "coco: preparing the official coco_captions needs TensorFlow; run: pip install 'imgcap_jax[coco]' "
            "(reading the prepared dataset does not)"
        )


def check_train_size(count: int, folder: Path) -> None:
    """Raises a UserError unless train + restval contains all images of the official dataset."""
    if count != TRAIN_IMAGES:
        raise UserError(
            f"{folder}: {count:,} training images (train + restval), not COCO's {TRAIN_IMAGES:,}; "
            "delete this folder and run: imgcap data prepare coco"
        )


def build(data_dir: Path, download_dir: Path | None = None) -> Path:
    """Downloads COCO (20 GB) and prepares it as array_record.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: TensorFlow is not installed, or the download fails.
    """
    require_tensorflow()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hides TensorFlow's startup messages
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.object_detection.coco_captions import CocoCaptions

    with _without_test_images(CocoCaptions):
        builder = CocoCaptions(data_dir=data_dir, config=CONFIG)
        try:
            builder.download_and_prepare(file_format="array_record", download_dir=download_dir)
        except (tfds.download.DownloadError, NonMatchingChecksumError, requests.RequestException) as error:
            raise UserError(f"coco: the download failed ({error}); run the same command again to continue") from error
    return Path(builder.data_dir)


@contextlib.contextmanager
def _without_test_images(builder: type) -> Iterator[None]:
    """Skips the download of COCO's test images (another 20 GB), which coco_captions does not use."""
    config = builder.BUILDER_CONFIGS[0]  # type: ignore[attr-defined]
    splits = config.splits
    config.splits = [split for split in splits if not split.name.startswith("test")]
    try:
        yield
    finally:
        config.splits = splits
