"""Captioner: load a run and caption photos. The Python API for using a trained model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from imgcap_jax.data.images import ImageError, decode
from imgcap_jax.generation import Decoding, caption_function
from imgcap_jax.models.model import split_trained
from imgcap_jax.run import Run
from imgcap_jax.training.checkpoints import Checkpoints

Photo = str | Path | bytes | np.ndarray | Image.Image
BATCH = 8
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Caption:
    """text: the sentence; words with log_probs, each word's own; log_prob: of the whole sentence, eos included."""

    text: str
    log_prob: float
    words: tuple[str, ...]
    log_probs: tuple[float, ...]


class Captioner:
    """Captions photos with a trained run.

    Example::

        captioner = Captioner.load("runs/flickr8k")
        for caption in captioner(["dog.jpg", "beach.jpg"]):
            print(caption.text)
    """

    def __init__(self, run: Run, decoding: Decoding | None = None) -> None:
        """Restores the best parameters of ``run``. Raises UserError where there are none."""
        self.run = run
        graph, params, self._frozen = split_trained(run.model(with_encoder=True))
        checkpoints = Checkpoints(run.folder)
        self._params = checkpoints.restore_best(params)
        checkpoints.close()
        self._captions = caption_function(graph, decoding or run.experiment.decoding)

    @classmethod
    def load(cls, folder: str | Path, decoding: Decoding | None = None) -> "Captioner":
        """Loads the run in ``folder``; ``decoding`` replaces the run's own search settings."""
        return cls(Run.load(Path(folder)), decoding)

    def __call__(self, photos: Sequence[Photo]) -> list[Caption]:
        """Captions photos: paths, encoded bytes, arrays uint8 [h,w,3] or PIL images.

        Raises:
            ImageError: a photo can't be read.
            OSError: a path can't be opened.
        """
        return [caption for group in self.stream([self.pixels(photo) for photo in photos]) for caption in group]

    def pixels(self, photo: Photo) -> np.ndarray:
        """A photo as the run's encoder wants it: uint8 [s,s,3]. Raises as ``__call__``."""
        data = self.run.experiment.data
        if isinstance(photo, Image.Image):
            photo = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
        elif isinstance(photo, str | Path):
            photo = Path(photo).read_bytes()
        return decode(photo, data.image_size, data.resize)

    def stream(self, images: Sequence[np.ndarray]) -> Iterator[list[Caption]]:
        """Captions images uint8 [s,s,3], a batch at a time.

        A batch is filled up, so that there are two compiled shapes: one for a single image, one for more.
        """
        vocabulary = self.run.vocabulary
        for first in range(0, len(images), BATCH):
            group = list(images[first : first + BATCH])
            size = 1 if len(images) == 1 else BATCH
            filled = np.stack(group + [group[-1]] * (size - len(group)))
            decoded = jax.device_get(self._captions(self._params, self._frozen, {"image": filled}))
            captions = []
            for row in range(len(group)):
                text = vocabulary.decode(decoded.tokens[row, 0])
                words = tuple(text.split())
                log_probs = decoded.word_log_probs[row, 0, : len(words)]
                captions.append(Caption(text, float(decoded.log_prob[row, 0]), words, tuple(map(float, log_probs))))
            yield captions


def caption_files(captioner: Captioner, paths: Sequence[Path], *, as_json: bool) -> Iterator[tuple[str, bool]]:
    """Captions files and the images in folders, one line each: (line, whether it tells of a failure).

    A file that can't be read is told by name, and the others are still captioned.
    """
    files = list(_files(paths))
    if not files:
        yield f"imgcap: no images in {', '.join(map(str, paths))}", True
    groups = _chunks(files, BATCH)
    for group in groups:
        images: list[np.ndarray] = []
        read: list[Path] = []
        for path in group:
            try:
                images.append(captioner.pixels(path))
                read.append(path)
            except (ImageError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                yield f"imgcap: {path}: {reason}; not captioned", True
        if not images:
            continue
        captions = [caption for part in captioner.stream(images) for caption in part]
        for path, caption in zip(read, captions, strict=True):
            yield (json.dumps({"file": str(path), **asdict(caption)}) if as_json else f"{path}: {caption.text}"), False


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def _chunks(items: list[Path], size: int) -> Iterator[list[Path]]:
    return (items[first : first + size] for first in range(0, len(items), size))
