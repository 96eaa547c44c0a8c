"""Captioner: load a run and caption photos. The Python API for using a trained model."""

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from PIL import Image

from imgcap_jax.data.image_files import AnyImage, read_file
from imgcap_jax.data.images import decode, view
from imgcap_jax.data.photo_files import photo_path
from imgcap_jax.data.prefetch import map_ahead
from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.confidence import Confidence
from imgcap_jax.run.folder import Run, check_ensemble, shipped_model, use_weights
from imgcap_jax.run.generation import attention_function, caption_function, caption_rows, check_decoding
from imgcap_jax.run.hub import hub_name, run_place
from imgcap_jax.run.knowledge import knowledge_of
from imgcap_jax.tokenizers import text_of
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.user_code import load_all_code

Photo = str | Path | AnyImage
BATCH, SMALL_BATCH = 32, 8  # images per batch
_BATCHES_AT_ONCE = 2
# JAX's settings that a context manager changes in one thread only, and that change what is computed or where.
_THREAD_SETTINGS = ("default_device", "default_matmul_precision", "enable_x64", "debug_nans")
_VIEW = 512  # the longer side of a photo in a picture of attention, in pixels


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Caption:
    """A caption of a photo.

    Attributes:
        text: the sentence.
        log_prob: log-probability of the whole sentence under the model. It includes that of eos, unless the caption was
            cut at max_words, and is therefore below the sum of log_probs.
        words: its words.
        log_probs: the log-probability of each word.
        score: what the search ranked, with length penalty and rules; for a sample, its log-probability as drawn.
        attention: float32 [words,N], the attention of each word; rows can sum to less than 1 (the rest goes to a
            sentinel). None: not requested, or the decoder has no attention.
        confidence: the probability that the caption is right (see ``run.confidence``). None: it is not the best one
            of its photo, the run was not calibrated for this search, or there are several runs.
    """

    text: str
    log_prob: float
    words: tuple[str, ...]
    log_probs: tuple[float, ...]
    score: float
    attention: np.ndarray | None = None
    confidence: float | None = None


class _Batch(NamedTuple):
    """images: uint8 [B,s,s,3] per run. rows: int32 [B]. real: the number of images that are not padding."""

    images: list[np.ndarray]
    rows: np.ndarray
    real: int


class Captioner:
    """Captions photos with a trained run, or with an ensemble of runs.

    Example::

        captioner = Captioner.load()  # the model that comes with the package, or Captioner.load("runs/flickr8k")
        for caption in captioner(["dog.jpg", "beach.jpg"]):
            print(caption.text)
    """

    def __init__(self, runs: Run | Sequence[Run], decoding: Decoding | None = None, *, attention: bool = False) -> None:
        """Restores the best parameters of ``runs``.

        Args:
            runs: one run, or several with the same vocabulary, whose probabilities are averaged (see
                ``Decoding.pool``).
            decoding: search settings; None: those of the first run.
            attention: whether captions come with the attention of each word; for an ensemble, the mean.

        Raises:
            UserError: there are no trained parameters, vocabularies differ, or attention is requested of a decoder that
                has none.
        """
        runs = [runs] if isinstance(runs, Run) else list(runs)
        check_ensemble(runs)
        self.runs = runs
        decoding = decoding or runs[0].experiment.decoding
        self._check_decoding(decoding)  # before the parameters are read
        self._graphs, self._params, self._frozen, self._steps = [], [], [], list[int]()
        for run in runs:
            run.check_weights()
            graph, params, frozen = split_trained(run.model(with_encoder=True, restored=True))
            best, step = restore_best(run.folder, params)
            self._params.append(best)
            self._steps.append(step)
            self._graphs.append(graph)
            self._frozen.append(frozen)
        self._set_decoding(decoding)
        self._attention = [attention_function(graph) for graph in self._graphs] if attention else []
        self._check_attention()

    def with_decoding(self, decoding: Decoding) -> "Captioner":
        """A captioner with the same parameters, and attention if this one has it, but other search settings.

        Raises:
            UserError: the runs cannot decode with these settings.
        """
        self._check_decoding(decoding)
        other = copy.copy(self)
        other._set_decoding(decoding)
        return other

    def _check_decoding(self, decoding: Decoding) -> None:
        for run in self.runs:
            check_decoding(decoding, run.vocabulary, run.experiment.decoder)

    def _set_decoding(self, decoding: Decoding) -> None:
        self.decoding = decoding
        found = Confidence.load(self.runs[0].folder) if len(self.runs) == 1 else None
        self._confidence = found if found is not None and found.fits(decoding, self._steps[0]) else None
        self._knowledge = knowledge_of(self.runs[0], decoding)
        self._captions = caption_function(self._graphs, decoding, self.runs[0].vocabulary)

    @classmethod
    def load(
        cls,
        *folders: str | Path,
        decoding: Decoding | None = None,
        attention: bool = False,
        code: str | Path | Sequence[str | Path] = (),
        weights: str | Path | Sequence[str | Path] = (),
    ) -> "Captioner":
        """Loads the runs in ``folders``, or the model that comes with the package.

        Args:
            folders: one run, or several for an ensemble; none: the model that comes with the package.
            decoding: see ``Captioner``.
            attention: see ``Captioner``.
            code: Python files (or modules) that define classes of the runs. They are executed. Classes in modules that
                the program has already imported are found without them. Code in a run's folder is never executed.
            weights: the files with the pretrained weights of the encoders, if they are not where the runs read them.

        Raises:
            UserError: a run needs code that was not given; see also ``Captioner``.
        """
        load_all_code([code] if isinstance(code, str | Path) else code)
        places = [run_place(str(folder)) for folder in folders] or [shipped_model()]
        runs = [Run.load(folder) for folder in places]
        runs = use_weights(runs, [Path(file) for file in ([weights] if isinstance(weights, str | Path) else weights)])
        for note in (note for run in runs for note in run.code_changes()):
            warnings.warn(note, stacklevel=2)
        return cls(runs, decoding, attention=attention)

    @property
    def names(self) -> list[str]:
        """What people call the models: the names of their folders, or those on the Hub."""
        return [hub_name(run.folder) or run.folder.resolve().name for run in self.runs]

    def __call__(self, photos: Sequence[Photo]) -> list[Caption]:
        """The best caption of each photo: paths, encoded bytes, RGB arrays uint8 [h,w,3] or PIL images of any mode.

        The same photo has the same pixels in each of these forms (see ``data.image_files``).

        Raises:
            TypeError: a single photo instead of a list.
            ImageError: a photo cannot be decoded, or is larger than ``data.image_files.MAX_MEGAPIXELS``.
            OSError: a path cannot be opened.
            UserError: a text is a URL, not a path.
        """
        return [captions[0] for captions in self.n_best(photos)]

    def n_best(self, photos: Sequence[Photo]) -> list[list[Caption]]:
        """The ``decoding.n_best`` captions of each photo, best first, or all samples. Raises as ``__call__``."""
        if isinstance(photos, str | Path | bytes | np.ndarray | Image.Image) and not _is_batch(photos):
            raise TypeError("photos is a single photo; give a list")
        return [captions for group in self.stream(list(map(self.pixels, photos))) for captions in group]

    def pixels(self, photo: Photo) -> list[np.ndarray]:
        """A photo at the size of each run's encoder: uint8 [s,s,3]. Raises as ``__call__``."""
        image = _image(photo)
        return [decode(image, run.experiment.data.image_size, run.experiment.data.resize) for run in self.runs]

    def view(self, photo: Photo) -> np.ndarray:
        """The part of a photo that the first run's encoder sees, not squashed: uint8 [h,w,3], at most 512 a side.

        Raises as ``__call__``.
        """
        return view(_image(photo), _VIEW, self.runs[0].experiment.data.resize)

    def stream(self, images: Iterable[Sequence[np.ndarray]], first_row: int = 0) -> Iterator[list[list[Caption]]]:
        """All captions of images (as ``pixels`` returns them), one batch at a time, in order.

        Images are drawn while earlier ones are captioned. ``first_row`` is the place of the first image in the whole
        input, which determines samples.
        """
        return filter(None, self.turns(images, first_row))

    def turns(self, images: Iterable[Sequence[np.ndarray] | None], first_row: int = 0) -> Iterator[list[list[Caption]]]:
        """As ``stream``, with an empty list after each image that completes no batch, which gives the caller its turn.

        An image that is None has no captions and only gives the caller its turn.
        """
        compiled: set[int] = set()  # sizes of batches
        compiling = threading.Lock()  # otherwise each thread would compile the program

        def caption(batch: _Batch) -> list[list[Caption]]:
            with nullcontext() if len(batch.rows) in compiled else compiling:
                captions = self._caption(batch)
            compiled.add(len(batch.rows))
            return captions

        # The small operations of a search keep one core busy, so the next batch is encoded at the same time.
        batches = self._batches(images, first_row)
        ahead = _BATCHES_AT_ONCE - 1
        for captions in map_ahead(_with_these_settings(caption), batches, threads=_BATCHES_AT_ONCE, ahead=ahead):
            yield captions or []

    def _batches(self, images: Iterable[Sequence[np.ndarray] | None], first_row: int) -> Iterator[_Batch | None]:
        """Batches, padded with copies of their last image, and None after each image that completes no batch.

        There are three sizes, so that few programs are compiled: 32, 8 for a remainder of up to 24, and 1 for a single
        image.
        """

        def batch(some: Sequence[Sequence[np.ndarray]], size: int, start: int) -> _Batch:
            filled = [np.stack(own) for own in zip(*some, *[some[-1]] * (size - len(some)), strict=True)]
            return _Batch(filled, np.arange(size, dtype=np.int32) + first_row + start, len(some))

        group: list[Sequence[np.ndarray]] = []
        drawn = 0  # images in earlier batches
        for image in images:
            if image is not None:
                group.append(image)
            if len(group) < BATCH:
                yield None
                continue
            yield batch(group, BATCH, drawn)
            drawn, group = drawn + BATCH, []
        size = 1 if drawn + len(group) == 1 else SMALL_BATCH if len(group) <= BATCH - SMALL_BATCH else BATCH
        for start in range(0, len(group), size):
            yield batch(group[start : start + size], size, drawn + start)

    def _caption(self, batch: _Batch) -> list[list[Caption]]:
        """All captions of each image of a batch."""
        parts = [{"image": own, "row": batch.rows} for own in batch.images]
        decoded = jax.device_get(self._captions(self._params, self._frozen, parts, self._knowledge))
        maps = self._maps(batch.images, decoded.tokens)
        return [self._hypotheses(decoded, maps, row) for row in range(batch.real)]

    def _hypotheses(self, decoded: Decoded, maps: np.ndarray | None, row: int) -> list[Caption]:
        captions: list[Caption] = []
        for m in caption_rows(np.asarray(decoded.tokens[row]), self.decoding):
            vocabulary = self.runs[0].vocabulary
            words = tuple(vocabulary.decode_words(decoded.tokens[row, m]))
            text, log_prob = text_of(words, vocabulary.tokenizer), float(decoded.log_prob[row, m])
            confidence = None
            if self._confidence is not None and not captions:
                confidence = float(self._confidence.of(log_prob, len(text.split())))
            captions.append(
                Caption(
                    text,
                    log_prob,
                    words,
                    tuple(map(float, decoded.word_log_probs[row, m, : len(words)])),
                    float(decoded.score[row, m]),
                    None if maps is None else maps[row, m, : len(words)],
                    confidence,
                )
            )
        return captions

    def _check_attention(self) -> None:
        """Raises UserError if the requested attention maps do not exist, before any photo is read."""
        counts = set()
        for run, function, params, frozen in zip(self.runs, self._attention, self._params, self._frozen, strict=False):
            side = run.experiment.data.image_size
            batch = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
            maps = jax.eval_shape(function, params, frozen, batch, jax.ShapeDtypeStruct((1, 1, 1), np.int32))
            if maps is None:
                kind = type(run.experiment.decoder).__name__
                raise UserError(f"{run.folder} has a decoder without attention ({kind}); there are no attention maps")
            counts.add(maps.shape[-1])
        if len(counts) > 1:
            raise UserError("the runs of the ensemble have different regions, so their attention cannot be averaged")
        if self._attention and len({run.experiment.data.resize for run in self.runs}) > 1:
            raise UserError(
                "the runs of the ensemble see different parts of a photo (their data.resize differs), so their "
                "attention cannot be averaged; leave out --attention"
            )

    def _maps(self, images: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray | None:
        """Attention of the words of tokens [B,M,T]: [B,M,T,N]; None: not requested."""
        maps = [
            np.asarray(function(params, frozen, {"image": own}, tokens), np.float32)
            for function, params, frozen, own in zip(self._attention, self._params, self._frozen, images, strict=False)
        ]
        return np.mean(maps, axis=0) if maps else None


def _with_these_settings(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The function for other threads, with the settings of JAX that this thread has."""
    ours = {name: getattr(jax.config, f"jax_{name}") for name in _THREAD_SETTINGS}

    def called(item: Item) -> Result:
        with ExitStack() as stack:
            for name, value in ours.items():
                if getattr(jax.config, f"jax_{name}") != value:  # an equal one, set again, would compile again
                    stack.enter_context(getattr(jax, name)(value))
            return function(item)

    return called


def _image(photo: Photo) -> AnyImage:
    if isinstance(photo, str):
        photo = photo_path(photo)
    return read_file(photo) if isinstance(photo, Path) else photo


def _is_batch(photos: object) -> bool:
    return isinstance(photos, np.ndarray) and photos.ndim == 4
