"""A run's folder: the experiment, the vocabulary, and the code of users that the experiment needs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, classes, differences, from_json, to_json
from imgcap_jax.files import replacing, write_text
from imgcap_jax.models.encoders.contract import build_encoder
from imgcap_jax.models.model import CaptionModel
from imgcap_jax.user_code import file_digest, source_files

EXPERIMENT = "experiment.json"
VOCABULARY = "vocabulary.json"
INIT_FROM = "init_from.json"
CODE = "code"  # copies of users' files, and their digests as sha256sum writes them
DIGESTS = "SHA256SUMS"


@dataclass(frozen=True)
class Run:
    """A folder with its experiment and vocabulary. Its other files belong to the functions that write them.

    init_from: the run whose best parameters were the start; None: training started from scratch.
    """

    folder: Path
    experiment: Experiment
    vocabulary: Vocabulary
    init_from: Path | None = None

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads a run's folder. No code in it is executed.

        Raises:
            UserError: the folder is not a run, its files cannot be read, or it needs code that is not imported.
        """
        if not (folder / EXPERIMENT).is_file():
            raise UserError(f"{folder} is not a run (it has no {EXPERIMENT}); give a folder that training wrote")
        kept = folder / CODE
        hint = f". The run keeps a copy in {kept}; read it before you use it" if kept.is_dir() else ""
        experiment = from_json((folder / EXPERIMENT).read_bytes(), str(folder), hint)
        return cls(folder, experiment, Vocabulary.load(folder / VOCABULARY), _read_init_from(folder / INIT_FROM))

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder contains a run that training can resume."""
        return (folder / EXPERIMENT).is_file() and (folder / VOCABULARY).is_file()

    def save(self) -> None:
        """Writes the folder. The experiment comes last, so that a folder with an experiment is complete.

        Raises:
            UserError: the experiment cannot be restored from JSON.
        """
        text = to_json(self.experiment)
        if from_json(text, str(self.folder)) != self.experiment:
            raise UserError(
                "the experiment cannot be stored: read back, it differs. Settings must be frozen dataclasses with "
                "numbers, strings, paths, tuples and other settings in their fields"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(self.folder / VOCABULARY)
        (self.folder / INIT_FROM).unlink(missing_ok=True)
        if self.init_from is not None:
            write_text(self.folder / INIT_FROM, json.dumps({"run": str(self.init_from.absolute())}) + "\n")
        self._save_code()
        write_text(self.folder / EXPERIMENT, text)

    def _save_code(self) -> None:
        sources = source_files(classes(self.experiment))
        if not sources:
            return
        (self.folder / CODE).mkdir(exist_ok=True)
        for name, path in sources.items():
            with replacing(self.folder / CODE / name) as temporary:
                temporary.write_bytes(path.read_bytes())
        lines = [f"{file_digest(self.folder / CODE / name)}  {name}\n" for name in sources]
        write_text(self.folder / CODE / DIGESTS, "".join(lines))

    def code_changes(self) -> list[str]:
        """One line per file of a user that has changed since the run was started."""
        digests = self.folder / CODE / DIGESTS
        if not digests.is_file():
            return []
        found = re.findall(r"^([0-9a-f]{64}) [ *](.+)$", digests.read_text(errors="replace"), flags=re.MULTILINE)
        before = {name: digest for digest, name in found}
        return [
            f"{path} has changed since {self.folder} was started, which used {self.folder / CODE / name}"
            for name, path in source_files(classes(self.experiment)).items()
            if before.get(name, "") != file_digest(path)
        ]

    def check_same(self, experiment: Experiment, init_from: Path | None) -> None:
        """Raises UserError, naming the first difference, unless the folder's experiment and start are these.

        ``init_from`` can be None for a run that has one: its parameters are in the checkpoints.
        """
        if init_from is not None and (self.init_from is None or self.init_from.resolve() != init_from.resolve()):
            raise UserError(
                f"{self.folder} started from {self.init_from or 'fresh weights'}, not from {init_from}; "
                f"choose another --run, or leave out --init-from to resume it"
            )
        changed = differences(self.experiment, experiment)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{self.folder} contains another experiment ({changed[0]}{more}); choose another --run, "
                f"or delete the folder to start over"
            )

    def model(self, *, with_encoder: bool) -> CaptionModel:
        """A freshly initialised model.

        Args:
            with_encoder: False if regions come from a feature store.

        Raises:
            UserError: the encoder is wanted, but the run was trained on ready-made regions.
        """
        experiment = self.experiment
        settings = experiment.encoder
        rngs = nnx.Rngs(experiment.training.seed)
        dtype = jnp.dtype(experiment.training.dtype)
        encoder = None
        if with_encoder:
            if has_ready_regions(settings):
                raise UserError(f"{self.folder} was trained on ready-made regions, so it has no encoder for photos")
            encoder = build_encoder(settings, experiment.data.image_size, dtype=dtype, rngs=rngs)
        decoder = experiment.decoder.build(settings.region_size, len(self.vocabulary), dtype=dtype, rngs=rngs)
        return CaptionModel(encoder, decoder)


def _read_init_from(path: Path) -> Path | None:
    """The run that a run started from. Raises UserError if the file is damaged."""
    if not path.is_file():
        return None
    try:
        return Path(json.loads(path.read_bytes())["run"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged; it must name the run that this one started from") from error
