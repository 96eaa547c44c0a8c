"""Document frequencies of a run's training captions, for captions that are chosen by CIDEr-D."""

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.sources import open_source, parse_mixture
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.cider_device import DocumentFrequencies, document_frequencies
from imgcap_jax.run.folder import Run
from imgcap_jax.training.parallel import is_first_process
from imgcap_jax.training.self_critical import FREQUENCIES


def frequencies_of(run: Run) -> DocumentFrequencies:
    """The document frequencies of the captions that a run was trained on.

    They are read from the run's folder. If they are not there, they are computed from the training split of each
    dataset, and kept in the folder. N-grams with eos are among them.

    Raises:
        UserError: they are damaged; or they are not there, and a dataset is missing.
    """
    path = run.folder / FREQUENCIES
    if path.is_file():
        return DocumentFrequencies.load(path)
    data = run.experiment.data
    try:
        sources = [open_source(name, "train", data.data_dir) for name, _ in parse_mixture(data.dataset)]
    except UserError as error:
        raise UserError(f"rerank needs the training captions for CIDEr-D: {error}") from error
    references = CaptionTable.as_references(sources, run.vocabulary, eos=True)
    frequencies = document_frequencies(list(references.captions()), references.words)
    if is_first_process():
        frequencies.save(path, references.fingerprint)
    return frequencies
