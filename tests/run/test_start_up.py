"""A model that a checkpoint fills is built without random initial values, unless it needs them."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.captioner import Captioner
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.encoders.contract import build_encoder
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.run.evaluation import evaluate
from imgcap_jax.run.folder import Run
from imgcap_jax.run.transfer import transfer
from imgcap_jax.train import train
from imgcap_jax.training.checkpoints import Checkpoints, restore_best
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.parallel import DataParallel

VOCABULARY = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "dog", "cat"), (0, 0, 0, 0, 2, 1))
DECODER = ShowTell(hidden_size=4, embedding_size=4)
ENCODER = SmallCNN(widths=(8,), blocks=(0,))


class Fixed(nnx.Variable):
    """A variable that no checkpoint contains."""


@dataclass(frozen=True)
class Wrapped:
    """Settings of another part."""

    part: Any
    frozen: bool = False

    @property
    def region_size(self) -> int:
        return int(self.part.region_size)


@dataclass(frozen=True)
class WithFixed(Wrapped):
    """Settings of another part, to which they add random values that are not trained."""

    def build(self, *arguments: Any, rngs: nnx.Rngs, **options: Any) -> Any:
        part = self.part.build(*arguments, rngs=rngs, **options)
        part.fixed = Fixed(jax.random.normal(rngs.params(), (3,)))
        part.noise = nnx.Dropout(0.5, rngs=rngs)  # has variables with the keys and the counters of a random stream
        return part


@dataclass(frozen=True)
class ReadsValues(Wrapped):
    """Settings of another part, whose parameters they read."""

    def build(self, *arguments: Any, **options: Any) -> Any:
        part = self.part.build(*arguments, **options)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))
        return part


def run_of(encoder: Any = ENCODER, decoder: Any = DECODER) -> Run:
    experiment = Experiment(encoder=encoder, decoder=decoder)
    data = dataclasses.replace(experiment.data, image_size=8)
    return Run(Path("nowhere"), dataclasses.replace(experiment, data=data), VOCABULARY)


def leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def lacks_values(model: CaptionModel) -> list[bool]:
    return [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves(nnx.state(model)).values()]


def assert_same(some: Any, others: Any) -> None:
    def numbers(leaf: Any) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert list(leaves(some)) == list(leaves(others))
    for name, leaf in leaves(some).items():
        np.testing.assert_array_equal(numbers(leaf), numbers(leaves(others)[name]), name)


def test_initial_values_are_those_of_the_encoder_then_the_decoder_from_one_stream() -> None:
    model = run_of().model(with_encoder=True)
    rngs = nnx.Rngs(0)
    encoder = build_encoder(ENCODER, 8, dtype=jnp.float32, rngs=rngs)
    decoder = DECODER.build(8, len(VOCABULARY), dtype=jnp.float32, rngs=rngs)
    assert_same(nnx.state(model), nnx.state(CaptionModel(encoder, decoder)))


@pytest.mark.parametrize("with_encoder", [True, False])
def test_a_model_to_restore_has_shapes_only(with_encoder: bool) -> None:
    run = run_of()
    whole, bare = (run.model(with_encoder=with_encoder, restored=restored) for restored in (False, True))
    assert all(lacks_values(bare))
    (graph, params, _), (other_graph, other_params, _) = split_trained(whole), split_trained(bare)
    assert graph == other_graph  # otherwise other programs would be compiled
    shapes = [{name: (leaf.shape, leaf.dtype) for name, leaf in leaves(one).items()} for one in (params, other_params)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (WithFixed(ENCODER), DECODER),
        (ENCODER, WithFixed(DECODER)),
        (WithFixed(ENCODER), WithFixed(DECODER)),
        (EfficientNetLite(variant=0, weights="random"), DECODER),
    ],
)
def test_values_that_no_checkpoint_contains_are_those_of_training(encoder: Any, decoder: Any) -> None:
    run = run_of(encoder, decoder)
    frozen, restored_frozen = (
        split_trained(run.model(with_encoder=True, restored=restored))[2] for restored in (False, True)
    )
    assert leaves(frozen)
    assert_same(frozen, restored_frozen)


def test_a_part_that_reads_its_initial_values_gets_them() -> None:
    run = run_of(ReadsValues(ENCODER), ReadsValues(DECODER))
    model = run.model(with_encoder=True, restored=True)
    assert_same(nnx.state(model), nnx.state(run.model(with_encoder=True)))


def test_a_mistake_in_the_settings_is_reported_as_such() -> None:
    @dataclass(frozen=True)
    class Refusing(WithFixed):
        def build(self, *_: Any, **options: Any) -> Any:
            raise UserError("decoder.size is 0")

    with pytest.raises(UserError, match=r"decoder\.size is 0"):
        run_of(decoder=Refusing(DECODER)).model(with_encoder=True, restored=True)


def test_a_template_without_values_is_filled_and_checked(tmp_path: Path) -> None:
    """The shapes decide. A value that the checkpoint lacks is an error."""
    values = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(4)}
    checkpoints = Checkpoints(tmp_path, writing=True)
    checkpoints.save_best(1, values)
    checkpoints.close()
    bare = jax.eval_shape(lambda: values)
    assert_same(restore_best(tmp_path, bare)[0], values)
    with jax.default_device(jax.devices()[2]):
        assert restore_best(tmp_path, bare)[0]["w"].devices() == {jax.devices()[2]}
    placed = restore_best(tmp_path, DataParallel(devices=jax.devices()[:2]).replicate(bare))[0]
    assert_same(placed, values)
    assert all(len(leaf.sharding.device_set) == 2 and leaf.is_fully_replicated for leaf in placed.values())
    with pytest.raises(UserError, match=r"\['more'\] is \[5\] here and missing in the checkpoint"):
        restore_best(tmp_path, {**bare, "more": jax.ShapeDtypeStruct((5,), jnp.float32)})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each model that is built has trained parameters with initial values."""
    found: list[bool] = []
    build = Run.model

    def recorded(run: Run, **options: Any) -> CaptionModel:
        model = build(run, **options)
        found.append(not all(lacks_values(model)))
        return model

    monkeypatch.setattr(Run, "model", recorded)
    return found


def test_captioning_and_evaluating_compute_no_initial_values(trained: Path, tmp_path: Path, built: list[bool]) -> None:
    run = Run.load(shutil.copytree(trained, tmp_path / "run"))
    Captioner(run)
    evaluate(run, "val", cache=tmp_path / "cache")
    assert built == [False, False]


def test_resuming_computes_no_initial_values_and_makes_the_step_with_those_of_the_checkpoint(
    trained: Path, tmp_path: Path, built: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    made: list[Any] = []
    restored: list[Any] = []
    make_step, restore = CrossEntropy.make_step, Checkpoints.restore

    def recorded_step(objective: CrossEntropy, setup: StepSetup) -> Any:
        made.append(setup.params)
        return make_step(objective, setup)

    def recorded_restore(checkpoints: Checkpoints, template: Any) -> Any:
        restored.append(restore(checkpoints, template))
        return restored[-1]

    monkeypatch.setattr(CrossEntropy, "make_step", recorded_step)
    monkeypatch.setattr(Checkpoints, "restore", recorded_restore)
    train(Run.load(folder).experiment, folder, cache=tmp_path / "cache", show=lambda line: None)
    assert built == [False]
    [(state, _)] = restored
    assert_same(made[0], state.params)


def test_starting_from_a_run_computes_initial_values_only_for_new_words(trained: Path, built: list[bool]) -> None:
    old = Run.load(trained)
    best, _ = restore_best(trained, split_trained(old.model(with_encoder=True, restored=True))[1])
    built.clear()
    model, _ = transfer(trained, dataclasses.replace(old, init_from=trained), with_encoder=True)
    assert built == [False, False]
    assert_same(nnx.state(model, nnx.Param), best)
    built.clear()
    vocabulary = old.vocabulary
    more = Vocabulary((*vocabulary.words, "unheard"), (0,) * (len(vocabulary) + 1), vocabulary.tokenizer)
    transfer(trained, dataclasses.replace(old, vocabulary=more), with_encoder=True)
    assert built == [False, True]
