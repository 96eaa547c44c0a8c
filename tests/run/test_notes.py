"""What is said or refused before training: options without effect, cut captions, captions in other languages."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgcap_jax.cli.experiments import find
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.data.sources import CaptionSource, open_source
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.run.notes import check_together, starting_notes, without_effect
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

PLAIN, FLIP = Augmentation(), Augmentation(flip=True)
BFLOAT: Any = {"feature_dtype": "bfloat16"}
GERMAN = ["ein mann in einem roten hemd steht auf einer leiter", "zwei hunde rennen nach links"]
ENGLISH = ["a man in a red shirt stands on a ladder", "the two dogs run to the left"]


def data(augmentation: Augmentation = PLAIN, views: int = 1) -> CaptionData:
    return CaptionData(augmentation=augmentation, views=views)


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (Experiment(), []),
        (Experiment(data=data(FLIP, views=4)), ["data.views has no effect with an encoder that is trained"]),
        (Experiment(data=data(replace(FLIP, crop_scale_min=0.6), views=4), encoder=EfficientNetLite()), []),
        (
            Experiment(data=data(FLIP), encoder=RegionFiles("x")),
            ["data.augmentation has no effect with ready-made regions"],
        ),
        (
            Experiment(data=replace(data(), image_size=32, resize="crop", **BFLOAT), encoder=RegionFiles("x")),
            [
                f"data.{name} has no effect with ready-made regions"
                for name in ("image_size", "resize", "feature_dtype")
            ],
        ),
        (
            Experiment(data=replace(data(), **BFLOAT)),
            ["data.feature_dtype has no effect with an encoder that is trained"],
        ),
        (
            Experiment(data=replace(data(FLIP), **BFLOAT), encoder=EfficientNetLite()),
            ["data.feature_dtype has no effect with views 1 and augmentation, for which no features are stored"],
        ),
        (Experiment(data=replace(data(), **BFLOAT), encoder=EfficientNetLite()), []),
        (
            Experiment(data=replace(data(), captions_per_image=3), objective=SelfCritical()),
            [
                "data.captions_per_image has no effect with self-critical training, except on the teacher-forced loss "
                "of validations"
            ],
        ),
        (
            Experiment(data=data(Augmentation(side_words=("links",)))),
            ["data.augmentation.side_words has no effect with flip false"],
        ),
        (
            Experiment(encoder=EfficientNetLite(), optimizer=Optimizer(encoder_factor=0.1)),
            ["optimizer.encoder_factor has no effect with an encoder that is frozen"],
        ),
        (
            Experiment(optimizer=Optimizer(decay_factor=0.5, decay_every_epochs=1.0)),
            [
                "optimizer.decay_every_epochs has no effect with schedule cosine",
                "optimizer.decay_factor has no effect with schedule cosine",
            ],
        ),
        (
            Experiment(optimizer=Optimizer("sgd", schedule="step", final_fraction=0.1, weight_decay=0.1, b1=0.5)),
            [
                "optimizer.final_fraction has no effect with schedule step",
                "optimizer.weight_decay has no effect with algorithm sgd",
                "optimizer.b1 has no effect with algorithm sgd",
            ],
        ),
        (Experiment(optimizer=Optimizer("adam", weight_decay=0.0)), []),
        (
            Experiment(decoder=ShowAttendTell(dropout=0.0, variational_dropout=True)),
            ["decoder.variational_dropout has no effect with dropout 0"],
        ),
    ],
)
def test_options_without_effect(experiment: Experiment, expected: list[str]) -> None:
    assert without_effect(experiment) == expected


@pytest.mark.parametrize("name", ["scenes_demo", "flickr8k", "flickr8k_finetune", "flickr8k_scst", "coco"])
def test_experiments_of_the_package_have_no_option_without_effect(name: str) -> None:
    assert without_effect(find(name)) == []


def test_attention_penalty_needs_attention() -> None:
    penalty = CrossEntropy(attention_penalty=1.0)
    with pytest.raises(UserError, match="attention_penalty has no effect on ShowTell, which has no attention"):
        check_together(Experiment(decoder=ShowTell(), objective=penalty))
    check_together(Experiment(decoder=ShowTell()))
    check_together(Experiment(decoder=ShowAttendTell(), objective=penalty))


def test_attention_penalty_without_attention_is_refused_by_train(
    tiny_file: Path, tiny_data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    text = re.sub(r"ShowAttendTell\(.*?\)", "ShowTell()", tiny_file.read_text(), flags=re.DOTALL)
    (tmp_path / "plain.py").write_text(text.replace("attend import ShowAttendTell", "show_tell import ShowTell"))
    command = ["train", str(tmp_path / "plain.py"), "--run", str(tmp_path / "run"), "--data.data-dir", str(tiny_data)]
    line = refused([*command, "--objective.attention-penalty", "1"])
    assert "objective.attention_penalty has no effect on ShowTell" in line
    assert not (tmp_path / "run" / "experiment.json").exists()


def source(folder: Path, name: str, captions: list[str]) -> CaptionSource:
    photos = folder / name
    photos.mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(photos / f"{number}.png")
    lines = [{"image": f"{number}.png", "captions": captions, "split": "train"} for number in range(10)]
    (photos / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(photos, name=name, data_dir=folder / "data", progress=False)
    return open_source(name, "train", folder / "data")


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> CaptionSource:
    return source(tmp_path_factory.mktemp("german"), "german", GERMAN)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> CaptionSource:
    return source(tmp_path_factory.mktemp("english"), "english", ENGLISH)


def notes(experiment: Experiment, captions: CaptionSource) -> list[str]:
    return starting_notes(experiment, [captions], captions, Vocabulary.build(GERMAN + ENGLISH, 1))


def test_mirrored_images_of_captions_in_another_language(german: CaptionSource, english: CaptionSource) -> None:
    (note,) = notes(Experiment(data=data(FLIP)), german)
    assert "do not seem to be English; set --data.augmentation.side-words" in note
    assert notes(Experiment(data=data(FLIP)), english) == []
    assert notes(Experiment(data=data()), german) == []
    assert notes(Experiment(data=data(replace(FLIP, side_words=("links", "rechts")))), german) == []


def test_cut_captions(german: CaptionSource) -> None:
    short = replace(data(), max_words=8)
    (note,) = notes(Experiment(data=short), german)
    assert note.startswith("50.0 % of the training captions have more than 8 words and are cut there")
    assert notes(Experiment(data=replace(short, max_words=10)), german) == []
    assert notes(Experiment(data=short, objective=SelfCritical()), german) == []  # samples its own captions


def test_low_coverage(german: CaptionSource, english: CaptionSource) -> None:
    (note,) = starting_notes(Experiment(), [german], english, Vocabulary.build(GERMAN, 1))
    assert "of the validation words; the others become <unk>" in note
