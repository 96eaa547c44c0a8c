"""A run's folder: the experiment, the vocabulary and the checkpoints of one training."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, differences, from_json, to_json
from imgcap_jax.files import write_text
from imgcap_jax.models.model import CaptionModel

EXPERIMENT = "experiment.json"
VOCABULARY = "vocabulary.json"
INIT_FROM = "init_from.json"


@dataclass(frozen=True)
class Run:
    """A folder with its experiment and vocabulary; its other files are written by who makes them.

    init_from: the run whose best weights were its start; None: it started afresh.
    """

    folder: Path
    experiment: Experiment
    vocabulary: Vocabulary
    init_from: Path | None = None

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads a run's folder.

        Raises:
            UserError: it is none, or its files can't be read.
        """
        if not (folder / EXPERIMENT).is_file():
            raise UserError(f"{folder} is not a run (it has no {EXPERIMENT}); give a folder that training made")
        experiment = from_json((folder / EXPERIMENT).read_text(), str(folder / EXPERIMENT))
        start = folder / INIT_FROM
        init_from = Path(json.loads(start.read_text())["run"]) if start.is_file() else None
        return cls(folder, experiment, Vocabulary.load(folder / VOCABULARY), init_from)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder holds a run that training can go on with."""
        return (folder / EXPERIMENT).is_file() and (folder / VOCABULARY).is_file()

    def save(self) -> None:
        """Makes the folder; the experiment comes last, so that a folder with one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(self.folder / VOCABULARY)
        (self.folder / INIT_FROM).unlink(missing_ok=True)
        if self.init_from is not None:
            write_text(self.folder / INIT_FROM, json.dumps({"run": str(self.init_from.absolute())}) + "\n")
        write_text(self.folder / EXPERIMENT, to_json(self.experiment))

    def check_same(self, experiment: Experiment, init_from: Path | None) -> None:
        """Raises UserError, naming the first field, unless the folder's experiment is this one, started as here.

        The other run need not be named again: its weights are in the checkpoints.
        """
        if init_from is not None and (self.init_from is None or self.init_from.resolve() != init_from.resolve()):
            raise UserError(
                f"{self.folder} started from {self.init_from or 'fresh weights'}, not from {init_from}; "
                f"choose another --run, or leave out --init-from to go on with it"
            )
        changed = differences(self.experiment, experiment)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{self.folder} holds another experiment ({changed[0]}{more}); choose another --run, "
                f"or delete the folder to start over"
            )

    def model(self, *, with_encoder: bool) -> CaptionModel:
        """A freshly initialised model; without the encoder where regions come from a feature store.

        Raises:
            UserError: the encoder is wanted, but the run was trained on ready-made regions.
        """
        experiment = self.experiment
        settings = experiment.encoder
        rngs = nnx.Rngs(experiment.training.seed)
        dtype = jnp.dtype(experiment.training.dtype)
        encoder = None
        if with_encoder:
            if isinstance(settings, RegionFiles):
                raise UserError(f"{self.folder} was trained on ready-made regions: it has no encoder to look at photos")
            encoder = settings.build(experiment.data.image_size, dtype=dtype, rngs=rngs)
        decoder = experiment.decoder.build(settings.region_size, len(self.vocabulary), dtype=dtype, rngs=rngs)
        return CaptionModel(encoder, decoder)
