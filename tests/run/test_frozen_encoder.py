"""A frozen pretrained encoder: training reads a feature store, captioning reads images."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.captioner import Captioner
from imgcap_jax.data.images import Augmentation, decode
from imgcap_jax.data.pipeline import CaptionData, eval_batches
from imgcap_jax.data.sources import open_source
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.model import split_trained
from imgcap_jax.models.neighbours import Neighbours
from imgcap_jax.models.retrieval import Retrieval
from imgcap_jax.run.evaluation import evaluate, sweep
from imgcap_jax.run.extraction import Extraction
from imgcap_jax.run.folder import Run
from imgcap_jax.text import tokenize
from imgcap_jax.train import train
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.self_critical import SelfCritical


class LargeRegions(nnx.Module):
    """Each row of pixels is a region, times 1000."""

    def __init__(self, region_count: int, region_size: int) -> None:
        self.region_count, self.region_size = region_count, region_size

    def __call__(self, images: Any) -> Any:
        return images.reshape(-1, self.region_count, self.region_size).astype("float32") * 1000


@dataclass(frozen=True)
class Large:
    """Settings of a frozen encoder with features beyond float16, for images of 32 pixels."""

    region_size: int = 96
    frozen: bool = True

    def build(self, image_size: int, **_: Any) -> LargeRegions:
        return LargeRegions(image_size, self.region_size)


def test_features_beyond_float16_need_the_option_that_the_error_names(tiny_data: Path, tmp_path: Path) -> None:
    source = open_source("scenes", "val", tiny_data)
    data = CaptionData("scenes", tiny_data, image_size=32)
    with pytest.raises(
        UserError, match=r"features of up to 2\.5e\+05 do not fit float16; set data\.feature_dtype to b"
    ):
        Extraction(Experiment(data=data, encoder=Large()), tmp_path, progress=False).regions(source, views=1)
    data = replace(data, feature_dtype="bfloat16")
    store = Extraction(Experiment(data=data, encoder=Large()), tmp_path, progress=False).regions(source, views=1)
    batches = list(eval_batches(data, source, batch_size=5, features=store))
    pixels = decode(source[7].image, 32).reshape(32, 96)
    np.testing.assert_allclose(batches[1]["regions"][2].astype(np.float32), pixels * 1000.0, rtol=2**-8)
    assert not batches[1]["regions"][3:].any()
    with pytest.raises(UserError, match=r"data\.feature_dtype is 'float8'; it must be float16 or bfloat16"):
        replace(data, feature_dtype="float8")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("frozen")
    experiment = Experiment(
        data=CaptionData(
            dataset="scenes",
            data_dir=tiny_data,
            image_size=32,
            batch_size=8,
            captions_per_image=2,
            min_count=1,
            views=2,
            augmentation=Augmentation(crop_scale_min=0.7, flip=True),
        ),
        encoder=EfficientNetLite(variant=0),
        decoder=ShowTell(hidden_size=16, embedding_size=16, dropout=0.0),
        training=Training(epochs=1, validation_images=8),
        decoding=Decoding(beam=2),
    )
    train(experiment, folder / "run", cache=folder / "cache", show=lambda line: None)
    return Run.load(folder / "run"), folder / "cache"


def test_captions_from_images_equal_those_from_the_store(trained: tuple[Run, Path]) -> None:
    run, cache = trained
    evaluation = evaluate(run, "test", cache=cache)
    photos = [example.image for example in evaluation.source]
    from_images = [caption.text for caption in Captioner(run)(photos)]
    assert from_images == list(evaluation.captioned.captions.values())


@pytest.mark.slow
def test_feature_store_contains_the_regions_of_each_image(trained: tuple[Run, Path]) -> None:
    run, cache = trained
    source = open_source("scenes", "train", run.experiment.data.data_dir)
    store = Extraction(run.experiment, cache, progress=False).regions(source, views=2)
    captioner = Captioner(run)
    encoder = run.model(with_encoder=True).encoder
    images = np.stack([captioner.pixels(source[i].image)[0] for i in (0, 17, 39)])
    stored = np.stack([store.read(i, 0)[0] for i in (0, 17, 39)])
    np.testing.assert_allclose(stored, encoder(images), atol=0.01)
    assert not np.allclose(store.read(0, 1)[0], store.read(0, 0)[0], atol=0.01)


def test_checkpoint_contains_the_decoder_only(trained: tuple[Run, Path]) -> None:
    run, _ = trained
    size = sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*") if path.is_file())
    assert size < 3e6  # the encoder has 3.4 million parameters


def test_training_from_the_memory_of_the_devices_is_the_same(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, cache = trained
    experiment = replace(run.experiment, data=replace(run.experiment.data, feed="device"))
    train(experiment, tmp_path / "run", cache=cache, show=lambda line: None)
    assert Run.load(tmp_path / "run").experiment.data.feed == "device"
    times = ("seconds", "captions_per_second", "images_per_second")

    def lines(folder: Path) -> list[dict[str, float]]:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in times} for line in found]

    assert lines(tmp_path / "run") == lines(run.folder)
    for ours, theirs in zip(parameters(tmp_path / "run"), parameters(run.folder), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def parameters(folder: Path) -> list[np.ndarray]:
    run = Run.load(folder)
    params, _ = restore_best(folder, split_trained(run.model(with_encoder=False))[1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def retrieving(trained: tuple[Run, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with retrieved words that starts from ``trained``."""
    run, cache = trained
    folder = tmp_path_factory.mktemp("retrieving") / "run"
    experiment = replace(run.experiment, retrieval=Retrieval(neighbours=2, words=4, embedding_size=8))
    train(experiment, folder, cache=cache, init_from=run.folder, show=lambda line: None)
    return Run.load(folder)


def test_retrieved_words_change_captions_from_the_store_and_from_images_alike(
    trained: tuple[Run, Path], retrieving: Run
) -> None:
    run, cache = trained
    assert (retrieving.folder / "neighbours.npz").is_file()
    evaluation = evaluate(retrieving, "test", cache=cache)
    photos = [example.image for example in evaluation.source]
    captions = list(evaluation.captioned.captions.values())
    assert [caption.text for caption in Captioner(retrieving)(photos)] == captions
    assert captions != list(evaluate(run, "test", cache=cache).captioned.captions.values())


def test_captions_can_be_chosen_by_those_of_similar_training_photos(trained: tuple[Run, Path]) -> None:
    run, cache = trained
    chosen = Decoding(samples=8, rerank="mbr", mbr_neighbours=3, mbr_neighbours_weight=0.9)
    shown = evaluate(run, "test", cache=cache, decoding=chosen, write=False)
    photos = [example.image for example in shown.source]
    captions = list(shown.captioned.captions.values())
    assert [caption.text for caption in Captioner(run, chosen)(photos)] == captions
    alone = replace(chosen, mbr_neighbours=0, mbr_neighbours_weight=0.5)
    found = evaluate(run, "test", cache=cache, decoding=alone, write=False)
    assert captions != list(found.captioned.captions.values())
    consensus = replace(run.experiment.decoding, rerank="consensus", mbr_neighbours=3)
    found = evaluate(run, "test", cache=cache, decoding=consensus, write=False)
    source = open_source("scenes", "train", run.experiment.data.data_dir)
    written = {" ".join(tokenize(text)) for i in range(len(source)) for text in source.captions(i)}
    assert set(found.captioned.captions.values()) <= written
    assert found.captioned.unfinished == 0
    with pytest.raises(UserError, match="mbr_neighbours is 41; it must be at most 40, the training photos"):
        evaluate(run, "test", cache=cache, decoding=replace(consensus, mbr_neighbours=41), write=False)


def test_pooled_models_each_write_captions(trained: tuple[Run, Path], retrieving: Run) -> None:
    """With one beam per model, the choice is between the greedy captions of both."""
    run, cache = trained
    greedy = replace(run.experiment.decoding, beam=1)
    each = [evaluate(one, "test", cache=cache, decoding=greedy, write=False) for one in (run, retrieving)]
    own, other = (list(found.captioned.captions.values()) for found in each)
    pool = replace(greedy, rerank="mbr", pool=True, mbr_neighbours=3)
    both = next(sweep([run, retrieving], "test", cache=cache, decodings=[pool], write=False))
    found = list(both.captioned.captions.values())
    assert own != other
    assert all(caption in pair for caption, *pair in zip(found, own, other, strict=True))
    # A caption that both models write counts twice, but two different ones count alike: neighbours decide.
    assert found != own


def test_a_training_that_is_refused_leaves_no_index(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, cache = trained
    experiment = replace(run.experiment, objective=SelfCritical(neighbours=40))
    with pytest.raises(UserError, match=r"objective\.neighbours is 40; it must be below the number of training photos"):
        train(experiment, tmp_path / "run", cache=cache, init_from=run.folder, show=lambda line: None)
    assert not list((tmp_path / "run").glob("*"))
    experiment = replace(run.experiment, retrieval=Retrieval(neighbours=40))
    with pytest.raises(UserError, match=r"retrieval\.neighbours is 40; it must be below the number"):
        train(experiment, tmp_path / "run", cache=cache, show=lambda line: None)


def test_an_index_that_training_has_used_is_not_replaced(retrieving: Run, trained: tuple[Run, Path]) -> None:
    _, cache = trained
    path = retrieving.folder / "neighbours.npz"
    before = path.read_bytes()
    found = Neighbours.load(path)
    assert found is not None
    found.save(path, "other photos")
    decoding = replace(retrieving.experiment.decoding, beam=4, rerank="mbr", mbr_neighbours=3)
    evaluate(retrieving, "test", cache=cache, decoding=decoding, write=False)
    assert Neighbours.load(path, "other photos") is not None
    path.write_bytes(before)


def test_a_trained_encoder_finds_neighbours_by_its_pretrained_features(
    trained: tuple[Run, Path], tmp_path: Path
) -> None:
    run, cache = trained
    tuned = replace(run.experiment.encoder, trainable_stages=1)  # type: ignore[type-var]
    objective = SelfCritical(neighbours=3)
    training = replace(run.experiment.training, epochs=0.2)
    experiment = replace(run.experiment, encoder=tuned, objective=objective, training=training)
    train(experiment, tmp_path / "tuned", cache=cache, init_from=run.folder, show=lambda line: None)
    frozen = replace(experiment, encoder=run.experiment.encoder)
    train(frozen, tmp_path / "frozen", cache=cache, init_from=run.folder, show=lambda line: None)
    ours, theirs = (Neighbours.load(tmp_path / name / "neighbours.npz") for name in ("tuned", "frozen"))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-3)
    # Its new features cannot be compared with those of the index.
    chosen = Decoding(beam=2, rerank="mbr", mbr_neighbours=3)
    with pytest.raises(UserError, match=r"tuned stores none; leave it out"):
        evaluate(Run.load(tmp_path / "tuned"), "test", cache=cache, decoding=chosen, write=False)


def test_the_decoder_sees_the_mirror_image_as_well(trained: tuple[Run, Path]) -> None:
    run, cache = trained
    decoding = replace(run.experiment.decoding, mirror=True)
    evaluation = evaluate(run, "test", cache=cache, decoding=decoding, write=False)
    photos = [decode(example.image, 32) for example in evaluation.source]
    captions = list(evaluation.captioned.captions.values())
    assert [caption.text for caption in Captioner(run, decoding)(photos)] == captions
    # The decoder reads the mean of all regions, which is the same for a photo and its mirror image.
    mirrored = [np.ascontiguousarray(photo[:, ::-1]) for photo in photos]
    assert [caption.text for caption in Captioner(run, decoding)(mirrored)] == captions
    assert [caption.text for caption in Captioner(run)(mirrored)] != [
        caption.text for caption in Captioner(run)(photos)
    ]


def test_a_student_that_equals_its_teachers_has_nothing_to_learn(
    trained: tuple[Run, Path], retrieving: Run, tmp_path: Path
) -> None:
    alone = first_step(trained, CrossEntropy(), tmp_path / "alone")["gradient_norm"]
    own, other = str(trained[0].folder), str(retrieving.folder)

    def norm(*teachers: str) -> float:
        objective = CrossEntropy(teachers=teachers, distillation=1.0)
        return first_step(trained, objective, tmp_path / "taught")["gradient_norm"]

    assert norm(own, own) < 1e-3 * alone
    both = norm(own, other)
    assert both == pytest.approx(norm(other, own), rel=1e-4)  # their mean, in any order
    assert 1e-3 * alone < both < norm(other, other)


def test_r_drop_without_dropout_changes_nothing_and_word_dropout_hides_words(
    trained: tuple[Run, Path], tmp_path: Path
) -> None:
    plain, twice, hidden = (
        first_step(trained, objective, tmp_path / "run")
        for objective in (CrossEntropy(), CrossEntropy(r_drop=3.0), CrossEntropy(word_dropout=0.5))
    )
    for name in ("loss", "gradient_norm"):
        assert twice[name] == pytest.approx(plain[name], rel=1e-4)
    assert abs(hidden["loss"] - plain["loss"]) > 1e-3 * plain["loss"]


def first_step(trained: tuple[Run, Path], objective: CrossEntropy, folder: Path) -> dict[str, float]:
    """The metrics of the first step of a training that starts from a run."""
    run, cache = trained
    training = replace(run.experiment.training, epochs=0.2, log_steps=1)
    shutil.rmtree(folder, ignore_errors=True)
    experiment = replace(run.experiment, objective=objective, training=training)
    train(experiment, folder, cache=cache, init_from=run.folder, show=lambda line: None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = next(line for line in lines if "gradient_norm" in line)
    return found


def test_teachers_that_do_not_fit_are_refused(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, cache = trained
    objective = CrossEntropy(teachers=(str(run.folder),))
    data = replace(run.experiment.data, min_count=30)
    for experiment, message in (
        (replace(run.experiment, objective=objective, data=data), "its vocabulary differs"),
        (replace(run.experiment, objective=replace(objective, teachers=("nowhere",))), "nowhere does not exist"),
        (
            replace(run.experiment, objective=objective, encoder=EfficientNetLite(variant=1)),
            "objective.teachers .* has another encoder",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(experiment, tmp_path / "run", cache=cache, show=lambda line: None)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
