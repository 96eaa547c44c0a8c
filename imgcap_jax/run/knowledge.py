"""What captions that are chosen by agreement need of a run's training data: document frequencies, similar photos."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.regions import RegionSource, read_regions
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.decoding.mbr import Knowledge
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import json_digest
from imgcap_jax.metrics.cider_device import DocumentFrequencies, document_frequencies
from imgcap_jax.models.neighbours import NEIGHBOURS, VERSION, Neighbours, index
from imgcap_jax.remote import shown
from imgcap_jax.run.extraction import Extraction, uses_store
from imgcap_jax.run.folder import Run, without_weights_path
from imgcap_jax.special_tokens import PAD
from imgcap_jax.terminal import working
from imgcap_jax.training.parallel import DataParallel, is_first_process
from imgcap_jax.training.self_critical import FREQUENCIES

_LONGEST = 24  # words of a neighbour's caption; longer ones are left out
_BATCH = 64  # images whose regions are read at a time


def knowledge_of(
    run: Run, decoding: Decoding, *, cache: Path | None = None, parallel: DataParallel | None = None
) -> Knowledge | None:
    """What a decoding needs of the training data of a run; None: nothing.

    It is read from the run's folder. What is not there is computed from the training split of each dataset, and kept in
    the folder.

    Args:
        run: the run.
        decoding: the search settings.
        cache: folder of the feature stores; None: neighbours are not computed.
        parallel: the devices.

    Raises:
        UserError: a file is damaged; or it is not there, and a dataset is missing or neighbours cannot be computed.
    """
    if decoding.rerank == "none":
        return None
    frequencies = _frequencies(run)
    if not decoding.mbr_neighbours:
        return Knowledge(frequencies)
    neighbours = _neighbours(run, cache, parallel)
    photos = len(neighbours.vectors)
    if decoding.mbr_neighbours > photos:
        raise UserError(
            f"mbr_neighbours is {decoding.mbr_neighbours}; it must be at most {photos}, the training photos"
        )
    return Knowledge(frequencies, neighbours)


def _frequencies(run: Run) -> DocumentFrequencies:
    path = run.folder / FREQUENCIES
    if path.is_file():
        return DocumentFrequencies.load(path)
    references = CaptionTable.as_references(_training(run), run.vocabulary, eos=True)
    frequencies = document_frequencies(list(references.captions()), references.words)
    if is_first_process():
        frequencies.save(path, references.fingerprint)
    return frequencies


def _neighbours(run: Run, cache: Path | None, parallel: DataParallel | None) -> Neighbours:
    path = run.folder / NEIGHBOURS
    if run.experiment.compares_photos and not uses_store(run.experiment):  # an index of the pretrained features
        raise UserError(
            f"mbr_neighbours compares the stored features of a frozen encoder, and {shown(run.folder)} stores none; "
            f"leave it out"
        )
    # The model or the reward was made with the index of the training: it is never replaced.
    of = None if run.experiment.compares_photos else identity(run)
    found = Neighbours.load(path, of) if path.is_file() else None
    if found is not None:
        return found
    if cache is None or not uses_store(run.experiment):
        how = f"run: imgcap evaluate {run.folder} --decode.rerank mbr --decode.mbr-neighbours 20"
        raise UserError(
            f"mbr_neighbours needs {path}, which is made from the stored features of a frozen encoder; "
            + (how if uses_store(run.experiment) else "this run stores none; leave mbr_neighbours out")
        )
    sources = _training(run)
    extraction = Extraction(run.experiment, cache, progress=is_first_process(), parallel=parallel)
    stores = [extraction.regions(source, views=run.experiment.data.views) for source in sources]
    return index_training_photos(run, sources, stores)


def identity(run: Run) -> str:
    """What the index of a run's training photos depends on, as a digest."""
    experiment = run.experiment
    data = experiment.data
    what = [data.dataset, repr(without_weights_path(experiment.encoder)), run.weights, run.vocabulary.words]
    return json_digest([VERSION, *what, data.image_size, data.resize, data.feature_dtype])


def index_training_photos(run: Run, sources: Sequence[CaptionSource], stores: Sequence[RegionSource]) -> Neighbours:
    """Makes the index of a run's training photos, and writes it into the run's folder.

    Args:
        run: the run.
        sources: the training split of each dataset.
        stores: the regions of each source; view 0 is the photo itself.

    Raises:
        UserError: the number of regions varies.
    """
    features = []
    for source, store in zip(sources, stores, strict=True):
        with working("reading features", len(source), "images", shown=is_first_process()) as work:
            for start in range(0, len(source), _BATCH):
                images = np.arange(start, min(start + _BATCH, len(source)))
                regions, mask = read_regions(store, images, np.zeros(len(images), np.int32))
                if mask is not None:
                    raise UserError("photos with different numbers of regions cannot be compared; leave out neighbours")
                features.append(regions.astype(np.float32).mean(1))
                work.update(int(images[-1]) + 1)
    references = CaptionTable.as_references(sources, run.vocabulary, eos=False)
    captions = references.read(references.first_rows(np.arange(sum(map(len, sources))), references.most))
    captions[(captions != PAD).sum(-1) > _LONGEST] = PAD
    made = index(np.concatenate(features), captions[..., :_LONGEST])
    if not is_first_process():
        return made
    made.save(run.folder / NEIGHBOURS, identity(run))
    written = Neighbours.load(run.folder / NEIGHBOURS)  # rounded as it will be read
    assert written is not None
    return written


def _training(run: Run) -> list[CaptionSource]:
    data = run.experiment.data
    try:
        return [open_source(name, "train", data.data_dir) for name, _ in parse_mixture(data.dataset)]
    except UserError as error:
        raise UserError(f"rerank needs the training captions: {error}") from error
