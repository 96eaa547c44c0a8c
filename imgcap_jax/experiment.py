"""Experiment: a whole run as one typed, frozen value, and its JSON form."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.adaptive import Adaptive
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.models.decoders.att2in import Att2in
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.encoders.vgg import VGG
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

AnyDecoder = ShowAttendTell | ShowTell | Att2in | Adaptive | UpDown | AttentionOnAttention | Transformer


@dataclass(frozen=True)
class Training:
    """How long, how often, on what."""

    epochs: float = 10.0
    """Epochs over the training split's images; each image brings captions_per_image captions."""
    seed: int = 0
    ema_decay: float = 0.0
    """Decay a step of the averaged parameters that are evaluated and kept; 0: no average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What products are computed in; parameters and sums stay float32. Of float32, JAX's default on TPU takes
    bfloat16 passes and on newer GPUs TF32; JAX_DEFAULT_MATMUL_PRECISION=highest forbids it."""
    parallel: Literal["pmap", "shard_map"] = "pmap"
    evaluate_epochs: float = 1.0
    """How often the validation split is decoded and scored."""
    validation_images: int | None = None
    """At most so many validation images; None: all."""
    validation_beam: int = 1
    """Beams while validating (1: greedy)."""
    patience: int = 0
    """Stop after so many validations without a better CIDEr-D; 0: never."""
    checkpoint_minutes: float = 5.0
    """A checkpoint at least this often (and at each validation), so that little is lost."""
    log_steps: int = 20
    """A line of metrics every so many steps."""

    def __post_init__(self) -> None:
        for name, lowest in (("validation_beam", 1), ("log_steps", 1), ("validation_images", 1), ("patience", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"training.{name} is {value}; give {lowest} or more")
        if self.epochs <= 0 or self.evaluate_epochs <= 0 or not 0 <= self.ema_decay < 1:
            raise UserError("training: epochs and evaluate_epochs are above 0, ema_decay is at least 0 and below 1")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides what a run computes."""

    data: CaptionData = field(default_factory=CaptionData)
    encoder: EfficientNetLite | ResNet | VGG | SmallCNN | RegionFiles = field(default_factory=SmallCNN)
    decoder: ShowAttendTell | ShowTell | Att2in | Adaptive | UpDown | AttentionOnAttention | Transformer = field(
        default_factory=ShowAttendTell
    )
    optimizer: Optimizer = field(default_factory=Optimizer)
    objective: CrossEntropy | SelfCritical = field(default_factory=CrossEntropy)
    training: Training = field(default_factory=Training)
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if isinstance(self.encoder, RegionFiles) and self.data.views > 1:
            raise UserError("data.views is for encoders; ready-made regions have one view an image: set it to 1")


_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Experiment,
        CaptionData,
        Augmentation,
        EfficientNetLite,
        ResNet,
        VGG,
        SmallCNN,
        RegionFiles,
        *typing.get_args(AnyDecoder),
        Optimizer,
        CrossEntropy,
        SelfCritical,
        Training,
        Decoding,
    )
}


def to_json(experiment: Experiment) -> str:
    """The experiment as JSON; every dataclass says its "type"."""
    return json.dumps(_encode(experiment), indent=2)


def from_json(text: str, where: str) -> Experiment:
    """Reads what ``to_json`` wrote.

    Args:
        text: the JSON.
        where: what to call it in an error.

    Raises:
        UserError: not JSON, or not an experiment of this version.
    """
    try:
        experiment = _decode(json.loads(text), Experiment)
        if not isinstance(experiment, Experiment):
            raise ValueError("no experiment in it")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where} is not an experiment that this version of imgcap_jax reads ({error}); "
            f"train again, or use the version that wrote it"
        ) from error
    return experiment


# What a run may be resumed with another value of: where things are and how often one hears, not what is computed.
_FREE = {
    "data.data_dir",
    "encoder.folder",
    "encoder.checkpoint_stages",
    "data.threads",
    "data.workers",
    "training.checkpoint_minutes",
    "training.log_steps",
}


def differences(old: Experiment, new: Experiment) -> list[str]:
    """The fields in which two experiments compute different things, as "data.batch_size: 64 -> 32"."""
    before, after = _flatten(_encode(old)), _flatten(_encode(new))
    names = [*before, *(name for name in after if name not in before)]
    changed = [name for name in names if before.get(name) != after.get(name) and name not in _FREE]
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in changed]


# What may differ from host to host.
_LOCAL = {"data.data_dir", "data.threads", "data.workers", "encoder.folder"}


def signature(experiment: Experiment) -> str:
    """The same on all hosts that train one experiment together."""
    fields = _flatten(_encode(experiment))
    return json.dumps({name: value for name, value in fields.items() if name not in _LOCAL})


_SMOKE_BATCH = 16  # divides into as many devices


def for_smoke(experiment: Experiment) -> Experiment:
    """The same experiment cut down to a check that takes seconds: two short epochs of few images."""
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
        optimizer=dataclasses.replace(experiment.optimizer, accumulate=1),
    )


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: _encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
        kind = _KINDS[value["type"]]
        hints = typing.get_type_hints(kind)
        return kind(**{name: _decode(item, hints[name]) for name, item in value.items() if name != "type"})
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list):
        return tuple(_decode(item, None) for item in value)
    if isinstance(value, str) and Path in options:
        return Path(value)
    return value


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flatten(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}
