"""What all exported programs share."""

from pathlib import Path
from typing import Any

from flax import nnx

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.staged import StagedEncoder
from imgcap_jax.models.model import CaptionModel, Frozen, Params, split_trained
from imgcap_jax.run.folder import Run
from imgcap_jax.tokenizers import PennTreebank
from imgcap_jax.training.checkpoints import restore_best

LOADER = Path(__file__).parent / "loader.py"


def check_exportable(run: Run, decoding: Decoding) -> None:
    """Raises UserError if a loader without this package could not write the run's captions."""
    if not isinstance(run.vocabulary.tokenizer, PennTreebank):
        raise UserError(
            f"the loader of programs joins words with blanks, and the tokenizer {run.vocabulary.tokenizer.label} does "
            f"not; export the run as a folder"
        )
    if decoding.rerank != "none":
        raise UserError("rerank needs files of the training data, which a program does not have; leave it out")


def loaded(run: Run, folder: Path) -> tuple[nnx.GraphDef[CaptionModel], Params, Frozen]:
    """The model of a run, which does not depend on the number of images, with the best parameters in a folder."""
    run.check_weights()
    model: Any = run.model(with_encoder=True, restored=True)
    for _, part in nnx.iter_graph(model):
        if isinstance(part, StagedEncoder):
            part.chunk = 0  # the number of images is symbolic, so they cannot be split
    graph, params, frozen = split_trained(model)
    return graph, restore_best(folder, params)[0], frozen
