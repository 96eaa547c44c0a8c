"""Experiment: a whole run as one typed, frozen value, and its JSON form.

The parts of an experiment are settings: frozen dataclasses that hold numbers, strings, paths, tuples and other
settings. Each part is typed by what it must offer, so that a class of your own fits as well as those of ``imgcap_jax``:

========== =========================================== ================================================
part       contract                                    defined in
========== =========================================== ================================================
encoder    ``EncoderSettings`` or ``RegionSettings``   ``models/encoders/contract.py``, ``data/regions.py``
decoder    ``DecoderSettings``                         ``models/decoders/contract.py``
optimizer  ``OptimizerSettings``                       ``training/optimizer.py``
objective  ``Objective``                               ``training/objective.py``
metrics    ``CustomMetric``                            ``metrics/scoring.py``
tokenizer  ``Tokenizer``, a field of ``data``          ``tokenizers.py``
========== =========================================== ================================================
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionSettings, has_ready_regions
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.files import json_digest, reason
from imgcap_jax.metrics.scoring import CustomMetric
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.contract import DecoderSettings
from imgcap_jax.models.encoders.contract import EncoderSettings
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.retrieval import Retrieval
from imgcap_jax.precision import Dtype, compute_dtype, frozen_dtype
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.objective import Objective
from imgcap_jax.training.optimizer import Optimizer, OptimizerSettings
from imgcap_jax.training.parallel import Mode
from imgcap_jax.user_code import NAME, UnknownClassError, check_name, class_name, find_class

SEED = "training.seed"
"""The field that differs between repetitions of an experiment."""


@dataclass(frozen=True)
class Training:
    """How long a run trains, and how often it is validated and saved."""

    epochs: float = 10.0
    """Passes over the images of the training split. Each image brings captions_per_image captions per pass."""
    seed: int = 0
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the parameters, which is then evaluated and kept; 0: no
    average. A run that starts from random parameters uses min(ema_decay, (1 + t) / (10 + t)) at step t (from 0 on),
    which reaches 0.99 at step 890 and 0.999 at step 8990. With --init-from it is used as given."""
    dtype: Dtype = "auto"
    """Type of matrix products and convolutions; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters, losses and
    sums are always float32. float32 is full precision on every device. Stored features of frozen encoders are float32,
    unless this is bfloat16."""
    parallel: Mode = "auto"
    """How a step runs on several devices; the results are the same. auto: pmap with one process, shard_map with several
    (pmap then takes 4 ms more per step)."""
    evaluate_epochs: float = 1.0
    """Epochs between two validations."""
    validation_images: int | None = None
    """Number of validation images; None: the whole split."""
    validation_beam: int = 1
    """Beam size of validations (1: greedy)."""
    patience: int = 0
    """Stop after this many validations without a higher CIDEr-D; 0: never."""
    checkpoint_minutes: float = 5.0
    """Minutes from the end of a save to the beginning of the next one. The state is also saved at each validation."""
    log_steps: int = 20
    """Steps between two lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("validation_beam", "log_steps", "validation_images"):
            if getattr(self, name) is not None:
                check_range(f"training.{name}", getattr(self, name), at_least=1)
        for name in ("patience", "checkpoint_minutes"):
            check_range(f"training.{name}", getattr(self, name), at_least=0)
        for name in ("epochs", "evaluate_epochs"):
            check_range(f"training.{name}", getattr(self, name), above=0)
        check_range("training.seed", self.seed, at_least=0, at_most=2**32 - 1)
        check_range("training.ema_decay", self.ema_decay, at_least=0, below=1)


@dataclass(frozen=True)
class Experiment:
    """Everything that determines what a run computes.

    Raises:
        UserError: a part does not offer what its contract asks for, or parts do not go together.
    """

    data: CaptionData = field(default_factory=CaptionData)
    encoder: EncoderSettings | RegionSettings = field(default_factory=SmallCNN)
    decoder: DecoderSettings = field(default_factory=ShowAttendTell)
    optimizer: OptimizerSettings = field(default_factory=Optimizer)
    objective: Objective = field(default_factory=CrossEntropy)
    training: Training = field(default_factory=Training)
    decoding: Decoding = field(default_factory=Decoding)
    retrieval: Retrieval | None = None
    """Words of similar training photos as further regions; None: the decoder sees the photo only."""
    metrics: tuple[CustomMetric, ...] = ()
    """Your own metrics, reported next to BLEU, METEOR, ROUGE-L and CIDEr-D."""

    @property
    def compares_photos(self) -> bool:
        """Whether training reads the captions of similar training photos, from the index in the run's folder."""
        return self.retrieval is not None or getattr(self.objective, "neighbours", 0) > 0

    def __post_init__(self) -> None:
        for name, kind in (("data", CaptionData), ("training", Training), ("decoding", Decoding)):
            if not isinstance(getattr(self, name), kind):
                raise UserError(f"{name} is of type {type(getattr(self, name)).__name__}; it must be a {kind.__name__}")
        regions = ("read_regions",) if has_ready_regions(self.encoder) else ("build",)
        _check_offers("encoder", self.encoder, ("region_size", "frozen", *regions))
        _check_offers("decoder", self.decoder, ("build",))
        _check_offers("optimizer", self.optimizer, ("build", "accumulate"))
        of_objective = ("title", "progress", "references", "check", "constants", "make_step")
        _check_offers("objective", self.objective, of_objective)
        if self.retrieval is not None:
            data = self.data
            if has_ready_regions(self.encoder) or not self.encoder.frozen:
                raise UserError(
                    "retrieval compares the features of a frozen encoder; freeze the encoder, or leave it out"
                )
            if data.views == 1 and data.augmentation.changes_images:
                raise UserError("retrieval compares stored features; set data.views above 1, or turn augmentation off")
        for metric in self.metrics:
            _check_offers("metrics", metric, ("label", "__call__"))
        if has_ready_regions(self.encoder) and self.data.views > 1:
            raise UserError("data.views must be 1 with ready-made regions, which have one view per image")


def _check_offers(part: str, value: Any, names: tuple[str, ...]) -> None:
    if isinstance(value, type):
        raise UserError(f"{part} is the class {value.__name__}; give an instance, {value.__name__}()")
    for name in names:
        if not hasattr(value, name):
            raise UserError(
                f"{part}: {type(value).__name__} has no {name!r}; docs/adding_parts.md lists what it must offer"
            )


# The kinds that experiments written without module names refer to.
_UNQUALIFIED = {
    "Experiment": "imgcap_jax.experiment",
    "CaptionData": "imgcap_jax.data.pipeline",
    "Augmentation": "imgcap_jax.data.images",
    "EfficientNetLite": "imgcap_jax.models.encoders.efficientnet_lite",
    "ResNet": "imgcap_jax.models.encoders.resnet",
    "VGG": "imgcap_jax.models.encoders.vgg",
    "SmallCNN": "imgcap_jax.models.encoders.small_cnn",
    "RegionFiles": "imgcap_jax.data.regions",
    "ShowAttendTell": "imgcap_jax.models.decoders.attend",
    "ShowTell": "imgcap_jax.models.decoders.show_tell",
    "Att2in": "imgcap_jax.models.decoders.att2in",
    "Adaptive": "imgcap_jax.models.decoders.adaptive",
    "UpDown": "imgcap_jax.models.decoders.up_down",
    "AttentionOnAttention": "imgcap_jax.models.decoders.aoa",
    "Transformer": "imgcap_jax.models.decoders.transformer",
    "Optimizer": "imgcap_jax.training.optimizer",
    "CrossEntropy": "imgcap_jax.training.cross_entropy",
    "SelfCritical": "imgcap_jax.training.self_critical",
    "Training": "imgcap_jax.experiment",
    "Decoding": "imgcap_jax.decoding.settings",
}


def to_json(experiment: Experiment) -> str:
    """The experiment as JSON. Every dataclass states its class as "type": "module:Class".

    Raises:
        UserError: a field holds a value that JSON cannot restore, such as a function.
    """
    return json.dumps(_encode(experiment, ""), indent=2)


def from_json(text: str | bytes, where: str, hint: str = "") -> Experiment:
    """Reads what ``to_json`` wrote. No code is imported except that of ``imgcap_jax`` (see ``user_code``).

    Args:
        text: the JSON.
        where: the file's name, for errors.
        hint: added to the error if a class is missing, to say where its code can be found.

    Raises:
        UserError: the text is not JSON, does not describe an experiment of this version, or needs classes of which the
            modules are not imported.
    """
    try:
        value = json.loads(text)
        missing = _missing(value)
        experiment = None if missing else _decode(value, Experiment)
        if not missing and not isinstance(experiment, Experiment):
            raise ValueError("it contains no experiment")
    except (ValueError, TypeError, KeyError, AttributeError, NameError, RecursionError, UserError) as error:
        raise UserError(
            f"{where} is not an experiment that this version of imgcap_jax can read ({reason(error)}); "
            f"train again, or use the version that wrote it"
        ) from error
    if experiment is None:
        needed = ", ".join(f"{file} (which defines {', '.join(names)})" for file, names in missing.items())
        options = " ".join(f"--code {file}" for file in missing)
        raise UserError(
            f"{where} needs {needed}, not part of imgcap_jax: add {options} (in Python: code={[*missing]}){hint}"
        )
    return experiment


def _missing(value: Any) -> dict[str, list[str]]:
    """The files of classes that are not imported, and the classes that each defines."""
    missing: dict[str, list[str]] = {}
    if isinstance(value, dict):
        name = value.get("type")
        if isinstance(name, str) and NAME.fullmatch(name):
            try:
                find_class(name)
            except UnknownClassError as error:
                missing.setdefault(f"{error.module.rpartition('.')[2]}.py", []).append(error.name)
            except ValueError:
                pass  # reported when it is read
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        for file, names in _missing(item).items():
            missing[file] = list(dict.fromkeys([*missing.get(file, []), *names]))
    return missing


def classes(settings: Any) -> set[type]:
    """All settings classes that occur in an experiment, or in one of its parts."""
    return {type(value) for value in _settings(settings)}


def _settings(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        yield value
        for item in dataclasses.fields(value):
            yield from _settings(getattr(value, item.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _settings(item)


# A run can be resumed with other values of these fields: they do not change what is computed.
_FREE = {
    "metrics",
    "data.data_dir",
    "data.feed",
    "encoder.folder",
    "encoder.checkpoint_stages",
    "data.threads",
    "data.workers",
    "training.checkpoint_minutes",
    "training.log_steps",
    "training.parallel",
}


def value_of(settings: Any, field: str) -> Any:
    """The value of a field of settings, as "optimizer.learning_rate"; "rules.0.words" reads an item of a tuple."""
    for name in field.split("."):
        settings = settings[int(name)] if name.isdigit() else getattr(settings, name)
    return settings


def differences(old: Experiment, new: Experiment) -> list[str]:
    """The fields in which two experiments compute different things, as "data.batch_size: 64 -> 32"."""
    before, after = _flatten(_encode(old, "")), _flatten(_encode(new, ""))
    if _same_dtype(old.training.dtype, new.training.dtype):
        before["training.dtype"] = after["training.dtype"]
    names = [*before, *(name for name in after if name not in before)]
    changed = [name for name in names if before.get(name) != after.get(name) and name not in _FREE]
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in changed]


def digest(experiment: Experiment) -> str:
    """A digest of the fields that determine what an experiment computes."""
    fields = _flatten(_encode(experiment, ""))
    return json_digest({name: value for name, value in fields.items() if name not in _FREE})


def _same_dtype(old: Dtype, new: Dtype) -> bool:
    """Whether two settings stand for the same types on this platform."""
    return (compute_dtype(old), frozen_dtype(old)) == (compute_dtype(new), frozen_dtype(new))


# These fields can differ between hosts.
_LOCAL = {"data.data_dir", "data.threads", "data.workers", "encoder.folder"}


def signature(experiment: Experiment) -> str:
    """A text that is the same on all hosts that train one experiment together."""
    fields = _flatten(_encode(experiment, ""))
    return json.dumps({name: value for name, value in fields.items() if name not in _LOCAL})


_SMOKE_BATCH = 16  # divides into as many devices


def for_smoke(experiment: Experiment) -> Experiment:
    """The same experiment reduced to a check that takes a minute or two: two short epochs of few images."""
    optimizer: Any = experiment.optimizer
    return dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, batch_size=_SMOKE_BATCH, views=min(2, experiment.data.views)),
        training=dataclasses.replace(
            experiment.training,
            epochs=2.0,
            evaluate_epochs=1.0,
            validation_images=16,
            validation_beam=experiment.decoding.beam,
            log_steps=1,
        ),
        optimizer=dataclasses.replace(optimizer, accumulate=1) if optimizer.accumulate != 1 else optimizer,
    )


def _encode(value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        check_name(type(value))
        if any(item.name == "type" for item in dataclasses.fields(value)):
            raise UserError(f"{name}.type: a field of settings cannot be called type; rename it")
        fields = {
            item.name: _encode(getattr(value, item.name), f"{name}.{item.name}" if name else item.name)
            for item in dataclasses.fields(value)
        }
        return {"type": class_name(type(value)), **fields}
    if isinstance(value, tuple):
        return [_encode(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{name} is of type {type(value).__name__}, which a run cannot store; settings hold numbers, strings, paths, "
        f"tuples and other frozen dataclasses"
    )


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
        name = value["type"]
        kind = find_class(name if ":" in name else f"{_UNQUALIFIED[name]}:{name}")
        hints = _hints(kind)
        return kind(**{name: _decode(item, hints.get(name)) for name, item in value.items() if name != "type"})
    if hint in _SCALARS and (not isinstance(value, _SCALARS[hint]) or (isinstance(value, bool) and hint is not bool)):
        raise TypeError(f"{value!r} in place of a value of type {hint.__name__}")
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if isinstance(value, list):
        items: tuple[Any, ...] = next((typing.get_args(o) for o in options if typing.get_origin(o) is tuple), ())
        if len(items) != len(value):  # tuple[X, ...], or no hint
            items = (items[0] if items else None,) * len(value)
        return tuple(_decode(item, hint) for item, hint in zip(value, items, strict=True))
    if isinstance(value, str) and Path in options:
        return Path(value)
    return value


_SCALARS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # a name that is only imported under TYPE_CHECKING
        return {}


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """All settings by name, as {"decoder.hidden_size": 512}. "decoder.type" is the name of a class."""
    return _flatten(_encode(experiment, ""))


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flatten(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}
