"""The models of an evaluation, alone or in an ensemble, and where they look when they write captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from imgcap_jax.data.pipeline import CaptionData, EvalBatches, eval_batches
from imgcap_jax.data.regions import RegionSource
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.models.model import CaptionModel, Frozen, Params, split_trained
from imgcap_jax.run.extraction import Extraction, reads_stored_regions
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import attention_function
from imgcap_jax.special_tokens import EOS, PAD
from imgcap_jax.terminal import working
from imgcap_jax.tokenizers import text_of, tokens_of
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.training.parallel import DataParallel, is_first_process

_BATCH = 64  # images whose attention is computed at a time


class Member(NamedTuple):
    """A model, alone or in an ensemble: its graph, how it reads images, and its stored regions if it has any."""

    graph: nnx.GraphDef[CaptionModel]
    data: CaptionData
    store: RegionSource | None


class Members(NamedTuple):
    """Models with their best parameters. steps: those of the parameters."""

    members: list[Member]
    params: list[Params]
    frozen: list[Frozen]
    steps: list[int]


@dataclass(frozen=True)
class Example:
    """An image of an evaluated split.

    Attributes:
        number: its number in the split.
        words: the words of its best caption.
        attention: float32 [words,N], the attention of each word, for an ensemble the mean; rows can sum to less than 1
            (the rest goes to a sentinel). None: the decoder has no attention, or the members have different regions or
            resize images differently.
    """

    number: int
    words: tuple[str, ...]
    attention: np.ndarray | None


def load_members(
    runs: Sequence[Run],
    source: CaptionSource,
    chosen: Sequence[int | None],
    images: Sequence[int],
    *,
    cache: Path,
    parallel: DataParallel,
    decodings: Sequence[Decoding] = (),
) -> Members:
    """Loads the best parameters of runs, and the regions of images of a split if they are stored.

    Args:
        runs: the runs.
        source: the split.
        chosen: the step of the parameters of each run; None: that of the best ones.
        images: the numbers of the images that are read.
        cache: folder of the feature stores.
        parallel: the devices.
        decodings: how the images are captioned.

    Raises:
        UserError: there are no trained parameters, or the weights of an encoder have changed.
    """
    loaded = Members([], [], [], [])
    for run, wanted in zip(runs, chosen, strict=True):
        run.check_weights()
        stored = reads_stored_regions(run.experiment, decodings)
        store = None
        if stored:
            extraction = Extraction(run.experiment, cache, progress=is_first_process(), parallel=parallel)
            store = extraction.regions(source, views=1, images=images)
        with working("loading the model", shown=is_first_process()):
            graph, own, rest = split_trained(run.model(with_encoder=not stored, restored=True))
            best, step = restore_best(run.folder, parallel.replicate(own), wanted)
        loaded.params.append(best)
        loaded.steps.append(step)
        loaded.frozen.append(parallel.replicate(rest))
        loaded.members.append(Member(graph, run.experiment.data, store))
    return loaded


def attend(
    members: Sequence[Member],
    params: Sequence[Params],
    frozen: Sequence[Frozen],
    images: Sequence[EvalBatches],
    numbers: Sequence[int],
    tokens: np.ndarray,
    vocabulary: Vocabulary,
) -> tuple[Example, ...]:
    """Where the models look when they write given captions.

    Args:
        members: the models, with their parameters and frozen parts.
        params, frozen: of each model.
        images: of each model, the images of the split.
        numbers: the numbers of the images in the split.
        tokens: int32 [images,T], the caption of each image, without bos.
        vocabulary: the words of the tokens.
    """
    alike = len({member.data.resize for member in members}) == 1  # the same region is the same part
    functions = [attention_function(member.graph) for member in members]
    examples = []
    for start in range(0, len(numbers), _BATCH):
        part = list(numbers[start : start + _BATCH])
        rows = np.resize(np.arange(start, start + len(part)), min(_BATCH, len(numbers)))  # one shape is compiled
        maps = []
        for function, own, rest, of_split in zip(functions, params, frozen, images, strict=True):
            read = of_split.of([numbers[int(row)] for row in rows])
            batch = {name: values for name, values in read.items() if name != "image_id"}
            maps.append(function(own, rest, batch, tokens[rows, None]))
        found = [np.asarray(one[: len(part), 0], np.float32) for one in maps if one is not None]
        same = alike and len(found) == len(maps) and len({one.shape for one in found}) == 1
        mean = np.mean(found, axis=0) if same else None
        for row, number in enumerate(part):
            words = tuple(vocabulary.decode_words(tokens[start + row]))
            examples.append(Example(number, words, None if mean is None else mean[row, : len(words)]))
    return tuple(examples)


def attention_of_captions(
    run: Run, source: CaptionSource, captions: Mapping[int, str], *, cache: Path
) -> dict[int, Example]:
    """Where a run with its best parameters looks when it writes captions that it has written before.

    Args:
        run: the run.
        source: the split.
        captions: the number of the image in the split -> its caption. Captions that are not exactly words of the
            vocabulary are left out.
        cache: folder of the feature stores.

    Returns:
        The number of the image -> its example.

    Raises:
        UserError: see ``load_members``.
    """
    vocabulary = run.vocabulary
    ids = {number: vocabulary.ids(tokens_of(caption, vocabulary.tokenizer)) for number, caption in captions.items()}
    ids = {
        number: found
        for number, found in ids.items()
        if text_of([vocabulary.words[word] for word in found], vocabulary.tokenizer) == captions[number]
    }
    if not ids:
        return {}
    numbers, length = list(ids), max(map(len, ids.values())) + 1
    tokens = np.full((len(ids), length), PAD, np.int32)
    for row, found in zip(tokens, ids.values(), strict=True):
        row[: len(found) + 1] = (*found, EOS)
    parallel = DataParallel(run.experiment.training.parallel)
    loaded = load_members([run], source, [None], numbers, cache=cache, parallel=parallel)
    images = eval_batches(run.experiment.data, source, batch_size=_BATCH, features=loaded.members[0].store)
    with working("attention of the captions"):
        examples = attend(loaded.members, loaded.params, loaded.frozen, [images], numbers, tokens, vocabulary)
    return {example.number: example for example in examples}
