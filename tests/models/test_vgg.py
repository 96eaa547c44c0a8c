"""VGG compared with the same network in PyTorch."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import vgg
from imgcap_jax.models.encoders.staged import StagedEncoder
from imgcap_jax.models.encoders.vgg import VGG

PARAMETERS: dict[Any, int] = {16: 138_357_544, 19: 143_667_240}
CLASSIFIER = 123_642_856  # parameters in the classifier
SHALLOW = (1, 2, 1, 1, 2)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batch_norm"])
def saved(
    request: pytest.FixtureRequest, oracle: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, bool, str]:
    """A network of seven convolutions with a narrow classifier, whether it has batch norm, and its weights' path."""
    network = oracle.randomised(oracle.networks.VGG(SHALLOW, request.param, hidden=64))
    return network, request.param, oracle.saved(network, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def shallow(saved: tuple[Any, bool, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The network, and a function that builds encoders with its weights."""
    monkeypatch.setitem(vgg._CONVOLUTIONS, 16, SHALLOW)
    monkeypatch.setattr(vgg, "_HIDDEN", 64)
    network, batch_norm, weights = saved

    def build(size: int, *, classifier: bool = False, **fields: Any) -> StagedEncoder:
        config = VGG(depth=16, batch_norm=batch_norm, weights=weights, **fields)
        return config.build(size, rngs=nnx.Rngs(0), classifier=classifier)

    return network, build


@pytest.mark.parametrize("depth", PARAMETERS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_parameter_count_is_the_published_one(depth: Any, batch_norm: bool, oracle: Any) -> None:
    with oracle.torch.device("meta"):
        network = oracle.networks.VGG(oracle.networks.VGG_CONVOLUTIONS[depth], batch_norm)
    state = network.state_dict()
    assert vgg.tensor_shapes(depth, batch_norm) == {
        name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    # torchvision's counts with batch norm are 138,365,992 and 143,678,248: two more per channel.
    norms = 2 * sum(c * n for c, n in zip((64, 128, 256, 512, 512), vgg._CONVOLUTIONS[depth], strict=True))
    published = PARAMETERS[depth] + (norms if batch_norm else 0)
    assert not batch_norm or published == {16: 138_365_992, 19: 143_678_248}[depth]
    config = VGG(depth=depth, batch_norm=batch_norm, weights="random", trainable_stages=5)
    held = nnx.state(nnx.eval_shape(lambda: config.build(224, rngs=nnx.Rngs(0), classifier=True)))
    assert sum(leaf.size for leaf in jax.tree.leaves(held)) == published
    # With folded batch norm and no classifier, only kernels and biases remain.
    frozen = dataclasses.replace(config, trainable_stages=0)
    held = nnx.state(nnx.eval_shape(lambda: frozen.build(224, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(held)) == PARAMETERS[depth] - CLASSIFIER


# At 75 (then 37, 18, 9, 4, 2), pools leave rows over. Three images are one more than a chunk.
@pytest.mark.parametrize(("size", "batch", "trained"), [(64, 3, 0), (75, 2, 5), (75, 2, 2)])
def test_regions_and_logits_equal_pytorch(size: int, batch: int, trained: int, shallow: Any, oracle: Any) -> None:
    network, build = shallow
    encoder = build(size, classifier=True, trainable_stages=trained)
    assert encoder.region_count == (size // 32) ** 2
    oracle.check(network, encoder, oracle.images(batch, size))


def test_regions_before_the_last_pool_equal_pytorch(shallow: Any, oracle: Any) -> None:
    network, build = shallow
    encoder, images = build(75, last_pool=False, classifier=True), oracle.images(2, 75)
    assert encoder.region_count == 16
    with oracle.torch.no_grad():
        before = network.features[:-1](oracle.pixels(network, images)).flatten(2).transpose(1, 2)
        logits = network(oracle.pixels(network, images))
    own_regions, own_logits = oracle.run(encoder, images)
    oracle.close(own_regions, before)
    oracle.close(own_logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("depth", PARAMETERS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_depth_equals_pytorch(depth: Any, batch_norm: bool, oracle: Any, tmp_path: Path) -> None:
    network = oracle.randomised(oracle.networks.VGG(oracle.networks.VGG_CONVOLUTIONS[depth], batch_norm))
    config = VGG(depth=depth, batch_norm=batch_norm, weights=oracle.saved(network, tmp_path))
    encoder = config.build(224, rngs=nnx.Rngs(0), classifier=True)
    assert encoder.region_count == 49
    oracle.check(network, encoder, oracle.images(2, 224))


def test_gradients_of_the_last_stages_equal_pytorch(shallow: Any, oracle: Any, gradients_of: Any) -> None:
    network, build = shallow
    images = oracle.images(3, 75)
    direction = np.random.default_rng(0).normal(size=(3, 4, 512)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    places = [name for name, module in network.features.named_children() if isinstance(module, oracle.torch.nn.Conv2d)]
    names = {"stages/3/convolutions/0": places[4]}
    names |= {f"stages/4/convolutions/{number}": place for number, place in enumerate(places[5:])}
    for checkpoint in (False, True):
        found = gradients_of(build(75, trainable_stages=2, checkpoint_stages=checkpoint), images, direction)
        assert set(found) == {f"{path}/{part}" for path in names for part in ("kernel", "bias")}
        for path, place in names.items():
            kernel = expected[f"features.{place}.weight"].transpose(2, 3, 1, 0)
            bias = expected[f"features.{place}.bias"]
            for got, theirs in ((found[f"{path}/kernel"], kernel), (found[f"{path}/bias"], bias)):
                oracle.close_gradient(got, theirs)


def test_accelerator_path_equals_pytorch(shallow: Any, oracle: Any, as_on: Any) -> None:
    network, build = shallow
    encoder = build(64)
    as_on("gpu")
    oracle.check(network, encoder, oracle.images(2, 64))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"depth": 11}, 64, "VGG-11 is not supported"),
        ({"trainable_stages": 6}, 64, "at least 0 and at most 5"),
        ({"grid": -1}, 64, "grid is -1"),
        ({"weights": "random"}, 31, "image size is 31"),
    ],
)
def test_invalid_settings_are_user_errors(fields: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VGG(**fields).build(size, rngs=nnx.Rngs(0))
