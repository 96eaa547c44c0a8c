"""ResNet compared with the same network in PyTorch."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import resnet
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.staged import StagedEncoder

PARAMETERS: dict[Any, int] = {50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
SHALLOW = (2, 1, 1, 1)


@pytest.fixture(scope="module")
def saved(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A network of five blocks, and the path of its weights."""
    network = oracle.randomised(oracle.networks.ResNet(SHALLOW))
    return network, oracle.saved(network, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def shallow(saved: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The network, and a function that builds encoders with its weights."""
    monkeypatch.setitem(resnet._BLOCKS, 50, SHALLOW)
    network, weights = saved

    def build(size: int, *, classifier: bool = False, dtype: Any = jnp.float32, **fields: Any) -> StagedEncoder:
        config = ResNet(depth=50, weights=weights, **fields)
        return config.build(size, dtype=dtype, rngs=nnx.Rngs(0), classifier=classifier)

    return network, build


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_count_is_the_published_one(depth: Any, oracle: Any) -> None:
    with oracle.torch.device("meta"):
        network = oracle.networks.ResNet(oracle.networks.RESNET_BLOCKS[depth])
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[depth]
    # The scale and shift of a frozen batch norm replace its weight and bias.
    config = ResNet(depth=depth, weights="random", trainable_stages=4)
    state = nnx.state(nnx.eval_shape(lambda: config.build(224, rngs=nnx.Rngs(0), classifier=True)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == PARAMETERS[depth]
    frozen = dataclasses.replace(config, trainable_stages=0)
    held = nnx.state(nnx.eval_shape(lambda: frozen.build(224, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(held)) < PARAMETERS[depth] - 2048 * 1000


@pytest.mark.parametrize("depth", PARAMETERS)
def test_tensors_equal_those_of_the_state_dict(depth: Any, oracle: Any) -> None:
    with oracle.torch.device("meta"):
        state = oracle.networks.ResNet(oracle.networks.RESNET_BLOCKS[depth]).state_dict()
    assert resnet.tensor_shapes(depth) == {
        name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }


# At 75 (then 38, 19, 10, 5, 3), strides leave rows over. Five images are one more than a chunk.
@pytest.mark.parametrize(("size", "batch", "trained"), [(64, 5, 0), (75, 2, 4), (75, 2, 2)])
def test_regions_and_logits_equal_pytorch(size: int, batch: int, trained: int, shallow: Any, oracle: Any) -> None:
    network, build = shallow
    encoder = build(size, classifier=True, trainable_stages=trained)
    assert encoder.region_count == math.ceil(size / 32) ** 2
    oracle.check(network, encoder, oracle.images(batch, size))


@pytest.mark.slow
@pytest.mark.parametrize("depth", PARAMETERS)
def test_every_depth_equals_pytorch(depth: Any, oracle: Any, tmp_path: Path) -> None:
    network = oracle.randomised(oracle.networks.ResNet(oracle.networks.RESNET_BLOCKS[depth]))
    config = ResNet(depth=depth, weights=oracle.saved(network, tmp_path))
    encoder = config.build(224, rngs=nnx.Rngs(0), classifier=True)
    assert encoder.region_count == 49
    oracle.check(network, encoder, oracle.images(2, 224))


def test_accelerator_path_equals_pytorch(shallow: Any, oracle: Any, as_on: Any) -> None:
    network, build = shallow
    encoder = build(64, trainable_stages=2, checkpoint_stages=True)
    as_on("gpu")
    oracle.check(network, encoder, oracle.images(2, 64))


@pytest.mark.parametrize("grid", [2, 3, 5])
def test_grid_equals_pytorch_adaptive_pool(grid: int, shallow: Any, oracle: Any) -> None:
    network, build = shallow
    oracle.check_grid(network, build(96, grid=grid), oracle.images(2, 96), grid)


@pytest.mark.parametrize(("checkpoint", "platform"), [(False, "cpu"), (True, "cpu"), (True, "gpu")])
def test_gradients_of_the_last_stages_equal_pytorch(
    checkpoint: bool, platform: str, shallow: Any, oracle: Any, gradients_of: Any, as_on: Any
) -> None:
    network, build = shallow
    as_on(platform)
    images = oracle.images(5, 75)
    direction = np.random.default_rng(0).normal(size=(5, 9, 2048)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    names = {"reduce": "conv1", "filter": "conv2", "expand": "conv3", "shortcut": "downsample.0"}
    found = gradients_of(build(75, trainable_stages=2, checkpoint_stages=checkpoint), images, direction)
    assert set(found) == {f"stages/{stage}/blocks/0/{part}/kernel" for stage in (2, 3) for part in names}
    for path, gradient in found.items():
        _, stage, _, block, part, _ = path.split("/")
        theirs = expected[f"layer{int(stage) + 1}.{block}.{names[part]}.weight"].transpose(2, 3, 1, 0)
        oracle.close_gradient(gradient, theirs.reshape(gradient.shape))


def test_all_stages_can_be_trained(shallow: Any, oracle: Any, gradients_of: Any) -> None:
    network, build = shallow
    images = oracle.images(2, 64)
    direction = np.random.default_rng(0).normal(size=(2, 4, 2048)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)["conv1.weight"].transpose(2, 3, 1, 0)
    found = gradients_of(build(64, trainable_stages=4), images, direction)
    assert len(found) == 1 + 3 * 5 + 4
    oracle.close_gradient(found["stages/0/stem/kernel"], expected)


def test_checkpointed_stages_need_less_memory(shallow: Any) -> None:
    _, build = shallow

    def memory(checkpoint: bool) -> int:
        encoder = build(96, trainable_stages=4, checkpoint_stages=checkpoint)
        graph, params, frozen = nnx.split(encoder, nnx.Param, ...)

        def loss(params: Any, images: jax.Array) -> jax.Array:
            return (nnx.merge(graph, params, frozen)(images) ** 2).mean()

        images = jax.ShapeDtypeStruct((16, 96, 96, 3), jnp.uint8)
        compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(True) < 0.75 * memory(False)


def test_bfloat16_is_close_to_float32(shallow: Any, oracle: Any, as_on: Any) -> None:
    _, build = shallow
    as_on("tpu")
    images = oracle.images(2, 64)
    expected, regions = (oracle.run(build(64, dtype=dtype), images)[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert regions.dtype == np.float32
    assert 1e-4 < np.linalg.norm(regions - expected) / np.linalg.norm(expected) < 0.1


def test_classify_needs_the_classifier(shallow: Any, oracle: Any) -> None:
    _, build = shallow
    with pytest.raises(ValueError, match="without its classifier"):
        build(64).classify(oracle.images(1, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 18}, "ResNet-18 is not supported"),
        ({"trainable_stages": 5}, "at least 0 and at most 4"),
        ({"trainable_stages": -1}, "at least 0 and at most 4"),
        ({"grid": 0}, "grid is 0"),
    ],
)
def test_invalid_settings_are_user_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResNet(**fields)
