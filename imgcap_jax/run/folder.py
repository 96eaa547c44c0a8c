"""A run's folder: the experiment, the vocabulary, and the code of users that the experiment needs."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, classes, differences, from_json, to_json
from imgcap_jax.files import (
    DIGESTS,
    OWNER,
    file_digest,
    read_digests,
    read_json,
    reading,
    replacing,
    write_digests,
    write_text,
)
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.encoders.contract import build_encoder, weights_digest, with_weights
from imgcap_jax.models.model import CaptionModel, parameter_count, split_trained, without_values
from imgcap_jax.models.neighbours import NEIGHBOURS, Neighbours
from imgcap_jax.models.retrieval import Retriever
from imgcap_jax.precision import compute_dtype
from imgcap_jax.remote import place, removal, shown, url_of
from imgcap_jax.run.extraction import encoder_dtype, uses_store
from imgcap_jax.run.finder import EXPERIMENT, is_run
from imgcap_jax.run.hub import run_place
from imgcap_jax.run.mirror import pull
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step
from imgcap_jax.training.log import LOG_ID, SAMPLES, TENSORBOARD
from imgcap_jax.training.metrics_file import METRICS
from imgcap_jax.training.parameter_file import PARAMETERS
from imgcap_jax.training.self_critical import FREQUENCIES
from imgcap_jax.user_code import source_files

RUNS = Path("runs")  # the default folder of all runs
_SHIPPED = Path(__file__).parent.parent / "shipped_model"
VOCABULARY = "vocabulary.json"
INIT_FROM = "init_from.json"
WEIGHTS = "weights.json"
_RETRIEVER = 0x52455452  # folded into the seed for the retriever's parameters
CODE = "code"  # copies of users' files, and their digests
SMOKE = ".smoke"  # marks the folder of a smoke run, which the next one empties
OF_DATA = (FREQUENCIES, NEIGHBOURS)  # computed from the training data
_WRITTEN = (METRICS, SAMPLES, TENSORBOARD, LOG_ID, CHECKPOINTS, VOCABULARY, INIT_FROM, WEIGHTS, CODE)


@dataclass(frozen=True)
class Run:
    """A folder with its experiment and vocabulary. Its other files belong to the functions that write them.

    init_from: the run whose best parameters were the start; None: training started from scratch.
    weights: the digest of the encoder's weights file (see ``weights_digest``); None if it has none or is not known.
    """

    folder: Path
    experiment: Experiment
    vocabulary: Vocabulary
    init_from: Path | None = None
    weights: str | None = None

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads a run's folder, which can be in a bucket. No code in it is executed.

        Raises:
            UserError: the folder is not a run, its files cannot be read, or it needs code that is not imported.
        """
        folder = run_place(str(folder))
        pull(folder)
        if not is_run(folder):
            near = RUNS / folder.name.removesuffix(".py")
            advice = f"did you mean {near}?" if is_run(near) else "give a folder that training wrote"
            problem = f"is not a run (it has no {EXPERIMENT})" if folder.exists() else "does not exist"
            raise UserError(f"{shown(folder)} {problem}; {advice}")
        experiment = _read_experiment(folder)
        vocabulary = Vocabulary.load(folder / VOCABULARY, experiment.data.tokenizer)
        return cls(
            folder,
            experiment,
            vocabulary,
            _read_init_from(folder / INIT_FROM),
            _read_weights(folder / WEIGHTS),
        )

    @property
    def resumable(self) -> bool:
        """Whether the folder has a checkpoint to resume from."""
        return latest_step(self.folder / CHECKPOINTS / "newest") is not None

    def with_free_fields(self, experiment: Experiment, *, save: bool) -> "Run":
        """The run with the values of ``experiment`` in those fields that do not change what is computed.

        Args:
            experiment: the run's experiment, except for such fields (see ``check_same``).
            save: whether to write it.
        """
        text = to_json(experiment)
        if save and text != to_json(self.experiment):
            write_text(self.folder / EXPERIMENT, text)
        return replace(self, experiment=experiment)

    def save(self) -> None:
        """Writes the folder. The experiment comes first, so that ``find_run`` knows the other files as those of a run.

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
        write_text(self.folder / EXPERIMENT, text)
        self.vocabulary.save(self.folder / VOCABULARY)
        (self.folder / INIT_FROM).unlink(missing_ok=True)
        if self.init_from is not None:
            write_text(self.folder / INIT_FROM, json.dumps({"run": shown(self.init_from.absolute())}) + "\n")
        (self.folder / WEIGHTS).unlink(missing_ok=True)
        if self.weights is not None:
            write_text(self.folder / WEIGHTS, json.dumps({"encoder": self.weights}) + "\n")
        self._save_code()

    def _save_code(self) -> None:
        sources = source_files(classes(self.experiment))
        if not sources:
            return
        (self.folder / CODE).mkdir(exist_ok=True)
        for name, path in sources.items():
            with replacing(self.folder / CODE / name) as temporary:
                temporary.write_bytes(path.read_bytes())
        write_digests(self.folder / CODE, list(sources))

    def code_changes(self) -> list[str]:
        """One line per file of a user that has changed since the run was started."""
        before = read_digests(self.folder / CODE)
        if before is None:
            return []
        return [
            f"{path} has changed since {shown(self.folder)} was started, which used {shown(self.folder / CODE / name)}"
            for name, path in source_files(classes(self.experiment)).items()
            if before.get(name, "") != file_digest(path)
        ]

    def check_same(self, experiment: Experiment, init_from: Path | None) -> None:
        """Raises UserError, naming the first difference, unless the folder's experiment and start are these.

        ``init_from`` can be None for a run that has one: its parameters are in the checkpoints.
        """
        if init_from is not None and (self.init_from is None or self.init_from.resolve() != init_from.resolve()):
            start = "fresh weights" if self.init_from is None else shown(self.init_from)
            raise UserError(
                f"{shown(self.folder)} started from {start}, not from {shown(init_from)}; "
                f"choose another --run, or leave out --init-from to resume it"
            )
        before = self.experiment
        if self.weights is not None and self.weights == weights_digest(experiment.encoder):
            before, experiment = (
                replace(one, encoder=without_weights_path(one.encoder)) for one in (before, experiment)
            )
        changed = differences(before, experiment)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{shown(self.folder)} contains another experiment ({changed[0]}{more}); choose another --run, or "
                f"{removal(self.folder)} to start over; to continue from it: --run NEW --init-from {shown(self.folder)}"
            )

    def check_weights(self) -> None:
        """Raises UserError unless the encoder's weights file is there and is the one that the run was trained with."""
        if self.weights is not None and self.weights != weights_digest(self.experiment.encoder):
            raise UserError(
                f"the weights file of the encoder has changed since {shown(self.folder)} was trained, which changes "
                f"its captions; give the original file with --weights"
            )

    def model(self, *, with_encoder: bool, restored: bool = False, platform: str | None = None) -> CaptionModel:
        """The model, freshly initialised.

        Args:
            with_encoder: False if regions come from a feature store.
            restored: whether a checkpoint replaces all trained parameters. They then have shapes, and values only if
                they cost little or cannot be left out (see ``without_values``). Frozen variables always have values,
                and so have encoders and decoders with code of users.
            platform: where the model will run, which determines what training.dtype "auto" is; None: JAX's default.

        Raises:
            UserError: the encoder is wanted, but the run was trained on ready-made regions.
        """
        experiment = self.experiment
        settings: Any = experiment.encoder
        if with_encoder and has_ready_regions(settings):
            raise UserError(f"{shown(self.folder)} was trained on ready-made regions, so it has no encoder for photos")
        dtype = compute_dtype(experiment.training.dtype, platform)

        def build_own_encoder(rngs: nnx.Rngs) -> nnx.Module:
            own = jnp.dtype(encoder_dtype(experiment, platform))
            encoder: nnx.Module = build_encoder(settings, experiment.data.image_size, dtype=own, rngs=rngs)
            return encoder

        def build_decoder(rngs: nnx.Rngs) -> Decoder:
            return experiment.decoder.build(
                settings.region_size, len(self.vocabulary), dtype=jnp.dtype(dtype), rngs=rngs
            )

        seed = experiment.training.seed
        decoder = encoder = None
        if restored and _can_be_traced(experiment.decoder):
            decoder = without_values(lambda: build_decoder(nnx.Rngs(seed)))
        # Weights that are read from a file cost little.
        costly = with_encoder and not settings.frozen and weights_digest(settings) is None
        if decoder is not None and costly and _can_be_traced(settings):
            encoder = without_values(lambda: build_own_encoder(nnx.Rngs(seed)))
        if decoder is None or (with_encoder and encoder is None):
            rngs = nnx.Rngs(seed)  # the encoder draws first, then the decoder
            encoder = build_own_encoder(rngs) if with_encoder else None
            decoder = build_decoder(rngs) if decoder is None else decoder
        # Of a new photo, the decoder sees the numbers that the store would hold.
        rounded = experiment.data.feature_dtype if with_encoder and uses_store(experiment) else None
        return CaptionModel(
            encoder,
            decoder,
            dtype=dtype,
            encoder_dtype=encoder_dtype(experiment, platform),
            rounded=rounded,
            retriever=self._retriever(jnp.dtype(dtype)),
        )

    def _retriever(self, dtype: DTypeLike) -> Retriever | None:
        """The part that retrieves words of similar training photos. Raises UserError if the index is not there."""
        settings, encoder = self.experiment.retrieval, self.experiment.encoder
        if settings is None:
            return None
        path = self.folder / NEIGHBOURS
        found = Neighbours.load(path) if path.is_file() else None
        if found is None:
            raise UserError(f"{shown(path)}, the index of the training photos, is missing; train again")
        seed = jax.random.fold_in(jax.random.key(self.experiment.training.seed), _RETRIEVER)
        rngs = nnx.Rngs(seed)  # of its own, so that the decoder starts as without retrieval
        return settings.build(found, encoder.region_size, len(self.vocabulary), dtype=dtype, rngs=rngs)

    def parameter_count(self) -> int:
        """The number of trained parameters, from the shapes of the model."""
        model = self.model(with_encoder=not uses_store(self.experiment), restored=True)
        return parameter_count(split_trained(model)[1])


def shipped_model() -> Path:
    """The folder of the model that comes with the package. Raises UserError if this installation has none."""
    if not is_run(_SHIPPED):
        raise UserError("this installation of imgcap_jax has no model; train one, and give its folder with --run")
    return _SHIPPED


def _can_be_traced(settings: Any) -> bool:
    """Whether a part with these settings can be built without values: all of its code is the package's own.

    The code of users can keep arrays in attributes, in closures or in caches, where tracers would fail later.
    """
    return all(kind.__module__.startswith("imgcap_jax.") for kind in classes(settings))


def _read_experiment(folder: Path) -> Experiment:
    """The experiment of a run. Raises UserError if it cannot be read or needs code that is not imported."""
    kept = folder / CODE
    hint = f". The run keeps a copy in {kept}; read it before you use it" if kept.is_dir() else ""
    with reading(folder / EXPERIMENT, "restore it from a backup, or train again"):
        text = (folder / EXPERIMENT).read_text(encoding="utf-8")
    return from_json(text, str(folder / EXPERIMENT), hint)


def _read_init_from(path: Path) -> Path | None:
    """The run that a run started from. Raises UserError if the file is damaged."""
    advice = "it must name the run that this one started from; restore it from a backup"
    found = _read_text(path, "run", r"[^\0]*", advice)
    return None if found is None else place(found)


def _read_weights(path: Path) -> str | None:
    """The digest of the encoder's weights file. Raises UserError if the file is damaged."""
    advice = "restore it from a backup; it has the digest of the encoder's weights file"
    return _read_text(path, "encoder", "[0-9a-f]{64}", advice)


def _read_text(path: Path, key: str, pattern: str, advice: str) -> str | None:
    """The text under a key of a JSON file; None if there is no file. Raises UserError if it has another form."""
    if not path.is_file():
        return None
    value = read_json(path, advice)
    with reading(path, advice):
        text: str = value[key]
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{key!r} is {text!r:.80}")
        return text


def without_weights_path(settings: Any) -> Any:
    """An encoder's settings with a fixed path of the weights file, to compare settings of which the files are equal."""
    try:
        return with_weights(settings, Path("weights"))
    except UserError:  # it reads no file
        return settings


def use_data_dir(run: Run, data_dir: Path | None) -> tuple[Run, str]:
    """The run with its datasets in another folder, and a note for the user if it was not chosen by the user.

    Args:
        run: a run, perhaps from another machine.
        data_dir: the folder; None: that of the run if it exists here, or else the default one.
    """
    recorded, note = run.experiment.data.data_dir, ""
    if data_dir is None:
        # isdir is False also for a folder that may not be seen.
        if recorded is None or url_of(place(str(recorded))) or os.path.isdir(recorded):
            return run, ""
        note = f"{recorded}, where the run read its datasets, does not exist; the default folder is used"
    data = replace(run.experiment.data, data_dir=data_dir)
    return replace(run, experiment=replace(run.experiment, data=data)), note


def use_weights(runs: Sequence[Run], files: Sequence[Path]) -> list[Run]:
    """The runs with the weights of their encoders in these files. Each run gets the file with its digest.

    Raises:
        UserError: a file is not the weights file of any of the runs, or no encoder reads one.
    """
    found = list(runs)
    for file in files:
        trained = shown(runs[0].folder)
        used, error = False, f"{file} is not the weights file that {trained} was trained with; give that one"
        for number, run in enumerate(found):
            try:
                encoder = with_weights(run.experiment.encoder, file)
            except UserError as none:  # this encoder reads no file
                error = str(none) if len(runs) == 1 else error
                continue
            if run.weights in (None, weights_digest(encoder)):
                found[number] = replace(run, experiment=replace(run.experiment, encoder=encoder))
                used = True
        if not used:
            raise UserError(error)
    return found


def check_ensemble(runs: Sequence[Run]) -> None:
    """Raises UserError unless all runs have the same vocabulary and tokeniser."""
    for run in runs[1:]:
        if run.vocabulary.tokenizer != runs[0].vocabulary.tokenizer:
            raise UserError(
                f"{shown(run.folder)} and {shown(runs[0].folder)} have different tokenizers "
                f"({run.vocabulary.tokenizer.label}, {runs[0].vocabulary.tokenizer.label}); train the runs of an "
                f"ensemble with the same data.tokenizer"
            )
        if run.vocabulary.words != runs[0].vocabulary.words:
            raise UserError(
                f"{shown(run.folder)} and {shown(runs[0].folder)} have different vocabularies, so their probabilities "
                f"cannot be averaged; train the runs of an ensemble on the same captions with the same min_count"
            )


def find_run(folder: Path) -> "Run | None":
    """The run that training in ``folder`` resumes. None: nothing was trained there, so training starts.

    Nothing is deleted. A folder that lost a part of its run, and files of somebody else, are left as they are.

    Raises:
        UserError: parts of the run are missing, or the folder is not a run but contains files that training would
            replace.
    """
    checkpoints = folder / CHECKPOINTS
    for path in (checkpoints, *checkpoints.rglob("*"), folder / TENSORBOARD, folder / CODE):
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, and training writes to no other place than --run; to use another disk, "
                f"put --run there"
            )
    if (folder / PARAMETERS).is_file():
        raise UserError(
            f"{shown(folder)} is an exported run, which cannot be trained further in its folder; choose another --run "
            f"and --init-from {shown(folder)}"
        )
    newest, best = latest_step(checkpoints / "newest"), latest_step(checkpoints / "best")
    experiment, vocabulary = (folder / EXPERIMENT).is_file(), (folder / VOCABULARY).is_file()
    if newest is not None or best is not None:
        lost = [name for name, there in ((EXPERIMENT, experiment), (VOCABULARY, vocabulary)) if not there]
        if lost:
            raise UserError(
                f"{shown(folder)} has checkpoints but no {' and no '.join(lost)}; restore it from a backup or from a "
                f"run of the same experiment, or choose another --run"
            )
        if newest is None:
            raise UserError(
                f"{shown(folder)} has lost its newest checkpoint (checkpoints/newest), so it cannot be resumed; it "
                f"still has its best parameters: choose another --run and --init-from {shown(folder)}"
            )
        return Run.load(folder)
    # Training writes the experiment first, and a checkpoint before metrics. Without an experiment, files are those of
    # another program; with metrics, the checkpoints are lost.
    foreign = [name for name in _WRITTEN if os.path.lexists(folder / name)]
    if METRICS in foreign or (foreign and not experiment):
        raise UserError(
            f"{shown(folder)} contains {foreign[0]}, but no checkpoint to resume from; choose another --run, or "
            f"{removal(folder)}"
        )
    if vocabulary:
        return Run.load(folder)  # killed before its first checkpoint
    if experiment:
        _read_experiment(folder)  # killed before that, or the file of another program, which raises an error
    elif not (folder / SMOKE).exists():
        _refuse_foreign(folder)
    return None


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError if a folder has files other than hidden ones and logs, into which users redirect the output."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if not path.name.startswith(".") and path.suffix not in (".log", ".txt", ".out", ".err"):
            raise UserError(
                f"{shown(folder)} is not a run, but contains {path.name}; choose a new or empty folder as --run"
            )


def empty_smoke(folder: Path) -> None:
    """Deletes what the last smoke run wrote in its folder, so that the next one starts from scratch.

    Raises:
        UserError: the folder was not written by a smoke run.
    """
    if not (folder / SMOKE).is_file() and any(path.name != OWNER for path in folder.iterdir()):
        raise UserError(f"{folder} was not written by --smoke, which would empty it; move it away")
    _delete(folder, (EXPERIMENT, *OF_DATA, *_WRITTEN))
    write_text(folder / SMOKE, "")


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[None]:
    """If training is refused before its first checkpoint, deletes what it wrote and restores what it replaced.

    The files of an earlier smoke run are not restored.
    """
    names = (EXPERIMENT, *OF_DATA, SMOKE, *_WRITTEN)
    new = [name for name in names if not os.path.lexists(folder / name)]
    before = {} if (folder / SMOKE).exists() else {path: path.read_bytes() for path in _small_files(folder)}
    try:
        yield
    except UserError:
        if latest_step(folder / CHECKPOINTS / "newest") is None:
            _delete(folder, new)
            ours = [folder / CODE / name for name in (DIGESTS, *(read_digests(folder / CODE) or {}))]
            for path in [path for path in _small_files(folder) if path in ours and path not in before]:
                path.unlink()
            for path, content in before.items():
                if not path.exists() or path.read_bytes() != content:
                    with replacing(path) as temporary:
                        temporary.write_bytes(content)
        raise


def _small_files(folder: Path) -> list[Path]:
    """The files that training replaces if it was killed before its first checkpoint."""
    paths = [folder / name for name in (EXPERIMENT, *OF_DATA, VOCABULARY, INIT_FROM, WEIGHTS)]
    code = folder / CODE
    paths += sorted(code.iterdir()) if code.is_dir() and not code.is_symlink() else []
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _delete(folder: Path, names: Iterable[str]) -> None:
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
