"""ConvNeXt compared with the same network in PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import convnext
from imgcap_jax.models.encoders.convnext import ConvNeXt, ConvNeXtArchitecture
from imgcap_jax.models.encoders.staged import StagedEncoder

DEPTHS, WIDTHS = (1, 1, 2, 1), (8, 12, 16, 24)
versions = pytest.mark.parametrize("model", ["convnext_tiny", "convnextv2_tiny"])
Build = Callable[..., StagedEncoder]


@pytest.fixture(scope="module")
def networks(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small network of each version, with the path of its weights."""
    made = {}
    for model in ("convnext_tiny", "convnextv2_tiny"):
        network = oracle.drawn(oracle.networks.ConvNeXt(DEPTHS, WIDTHS, model.startswith("convnextv2")))
        made[model] = network, oracle.saved(network, tmp_path_factory.mktemp(model))
    return made


@pytest.fixture
def small(networks: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Any, Build]]:
    """(model) -> the network, and a function that builds encoders with its weights."""

    def of(model: str) -> tuple[Any, Build]:
        monkeypatch.setitem(convnext.ARCHITECTURES, model, ConvNeXtArchitecture(model, DEPTHS, WIDTHS))
        network, weights = networks[model]

        def build(size: int, *, dtype: Any = jnp.float32, **fields: Any) -> StagedEncoder:
            return ConvNeXt(model=model, weights=weights, **fields).build(size, dtype=dtype, rngs=nnx.Rngs(0))

        return network, build

    return of


# 107 leaves rows over at every stride: 26, 13, 6, 3. Five images are one more than a chunk.
@versions
@pytest.mark.parametrize(("size", "batch", "trained"), [(64, 5, 0), (107, 2, 2)])
def test_regions_equal_pytorch(model: str, size: int, batch: int, trained: int, small: Any, oracle: Any) -> None:
    network, build = small(model)
    encoder = build(size, trainable_stages=trained)
    assert encoder.region_count == (size // 32) ** 2
    oracle.check_regions(network, encoder, oracle.images(batch, size))


@versions
@pytest.mark.parametrize(("platform", "checkpoint"), [("cpu", False), ("cpu", True), ("gpu", True)])
def test_gradients_equal_pytorch(
    model: str, platform: str, checkpoint: bool, small: Any, oracle: Any, gradients_of: Any, as_on: Any
) -> None:
    network, build = small(model)
    as_on(platform)
    images = oracle.images(5, 64)
    direction = np.random.default_rng(0).normal(size=(5, 4, WIDTHS[-1])).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    found = gradients_of(build(64, trainable_stages=4, checkpoint_stages=checkpoint), images, direction)
    assert len(found) == len(expected)
    names = {
        "stages/0/project/kernel": "stem.0.weight",
        "stages/0/norm_after/scale": "stem.1.weight",
        "stages/2/norm_before/bias": "stages.2.downsample.0.bias",
        "stages/2/project/kernel": "stages.2.downsample.1.weight",
        "stages/2/blocks/1/kernel": "stages.2.blocks.1.conv_dw.weight",
        "stages/2/blocks/1/bias": "stages.2.blocks.1.conv_dw.bias",
        "stages/2/blocks/1/norm/scale": "stages.2.blocks.1.norm.weight",
        "stages/2/blocks/1/fc1/kernel": "stages.2.blocks.1.mlp.fc1.weight",
        "stages/2/blocks/1/fc2/bias": "stages.2.blocks.1.mlp.fc2.bias",
        "stages/3/last_norm/scale": "head.norm.weight",
    }
    if model == "convnext_tiny":
        names["stages/1/blocks/0/scale"] = "stages.1.blocks.0.gamma"
    else:
        names["stages/1/blocks/0/response_weight"] = "stages.1.blocks.0.mlp.grn.weight"
        names["stages/1/blocks/0/response_bias"] = "stages.1.blocks.0.mlp.grn.bias"
    for path, name in names.items():
        theirs = expected[name]
        if theirs.ndim > 1:
            theirs = theirs.T if theirs.ndim == 2 else theirs.transpose(2, 3, 1, 0)
        assert np.linalg.norm(found[path] - theirs.reshape(found[path].shape)) < 1e-3 * np.linalg.norm(theirs), path


def test_gradient_is_finite_where_a_channel_is_zero() -> None:
    maps = jnp.zeros((1, 2, 2, 3)).at[..., 0].set(1.0)
    gradient = jax.grad(lambda x: (convnext._response(x) ** 2).sum())(maps)
    assert np.isfinite(gradient).all()


def test_grid_equals_pytorch_adaptive_pool(small: Any, oracle: Any) -> None:
    network, build = small("convnext_tiny")
    oracle.check_grid(network, build(96, grid=2), oracle.images(2, 96), 2)


@versions
def test_bfloat16_is_close_to_float32(model: str, small: Any, oracle: Any, as_on: Any) -> None:
    _, build = small(model)
    as_on("tpu")
    images = oracle.images(2, 64)
    expected, regions = (oracle.run(build(64, dtype=dtype), images)[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert regions.dtype == np.float32
    assert 1e-4 < np.linalg.norm(regions - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("model", convnext.ARCHITECTURES)
def test_random_weights_fit_every_architecture(model: str) -> None:
    settings = ConvNeXt(model=model, weights="random", trainable_stages=1)
    encoder = nnx.eval_shape(lambda: settings.build(64, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    regions = nnx.eval_shape(lambda encoder, images: encoder(images), encoder, images)
    assert regions.shape == (2, 4, settings.region_size)


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.model is 'resnet50'; it must be one of convnext_tiny"):
        ConvNeXt(model="resnet50")
    with pytest.raises(UserError, match="image_size is 31; convnext_tiny needs at least 32"):
        ConvNeXt(weights="random").build(31, rngs=nnx.Rngs(0))
