"""Vision transformers compared with the same networks in PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import vit
from imgcap_jax.models.encoders.pretrained.weights import fingerprint
from imgcap_jax.models.encoders.staged import StagedEncoder
from imgcap_jax.models.encoders.vit import ViT, ViTArchitecture, bicubic

# Family, width, depth, heads, hidden size, patch, side of the position embedding, registers.
NETWORKS: dict[str, tuple[Any, ...]] = {
    "vit_base_patch16_clip_224": ("clip", 24, 2, 2, 40, 8, 3, 0),
    "vit_base_patch16_siglip_224": ("siglip", 24, 2, 3, 40, 8, 3, 0),
    "vit_small_patch14_dinov2": ("dinov2", 24, 2, 2, 40, 8, 5, 0),
    "vit_small_patch14_reg4_dinov2": ("dinov2", 24, 2, 2, 40, 8, 5, 3),
    "vit_small_patch16_dinov3": ("dinov3", 24, 2, 2, 40, 8, 0, 3),
}
every_network = pytest.mark.parametrize("model", NETWORKS)
Build = Callable[..., StagedEncoder]


@pytest.fixture(scope="module")
def networks(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small networks of every family, with the paths of their weights."""
    made = {}
    for model, sizes in NETWORKS.items():
        network = oracle.drawn(oracle.networks.ViT(*sizes))
        made[model] = network, oracle.saved(network, tmp_path_factory.mktemp(model))
    return made


@pytest.fixture
def small(networks: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Any, Build]]:
    """(model) -> the network, and a function that builds encoders with its weights."""
    for model, sizes in NETWORKS.items():
        family, width, depth, heads, hidden, patch, side, registers = sizes
        architecture = ViTArchitecture(model, family, width, depth, heads, hidden, patch, side, registers)
        monkeypatch.setitem(vit.ARCHITECTURES, model, architecture)

    def of(model: str) -> tuple[Any, Build]:
        network, weights = networks[model]

        def build(size: int, *, dtype: Any = jnp.float32, **fields: Any) -> StagedEncoder:
            return ViT(model=model, weights=weights, **fields).build(size, dtype=dtype, rngs=nnx.Rngs(0))

        return network, build

    return of


def check_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], names: dict[str, str]) -> None:
    """Compares the gradients of all of `names`: our path -> the name in the state dict."""
    assert set(found) == set(names)
    for path, name in names.items():
        theirs = expected[name].T if expected[name].ndim == 2 else expected[name]
        assert found[path].shape == theirs.shape
        assert np.linalg.norm(found[path] - theirs) < 1e-3 * np.linalg.norm(theirs), path


# 24 pixels: as CLIP and SigLIP were stored; 40: as DINOv2; all others are interpolated. Five images are one more than a
# chunk.
@every_network
@pytest.mark.parametrize(("size", "batch"), [(24, 5), (40, 2), (56, 1)])
def test_regions_equal_pytorch(model: str, size: int, batch: int, small: Any, oracle: Any) -> None:
    network, build = small(model)
    encoder = build(size)
    assert encoder.region_count == (size // 8) ** 2
    oracle.check_regions(network, encoder, oracle.images(batch, size))


@every_network
@pytest.mark.parametrize(("platform", "checkpoint"), [("cpu", False), ("cpu", True), ("gpu", True)])
def test_gradients_of_the_last_block_equal_pytorch(
    model: str, platform: str, checkpoint: bool, small: Any, oracle: Any, gradients_of: Any, as_on: Any
) -> None:
    network, build = small(model)
    as_on(platform)
    images = oracle.images(5, 24)
    direction = np.random.default_rng(0).normal(size=(5, 9, 24)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    names = {"last_norm": "norm", "norm1": "blocks.1.norm1", "norm2": "blocks.1.norm2"}
    linear = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    paths = {f"{ours}/scale": f"{name}.weight" for ours, name in names.items()}
    paths |= {f"{ours}/bias": f"{name}.bias" for ours, name in names.items()}
    paths |= {f"{ours}/kernel": f"blocks.1.{name}.weight" for ours, name in linear.items()}
    paths |= {f"{ours}/bias": f"blocks.1.{name}.bias" for ours, name in linear.items()}
    found = gradients_of(build(24, trainable_stages=1, checkpoint_stages=checkpoint), images, direction)
    match NETWORKS[model][0]:
        case "dinov2":
            paths |= {f"scale{part}": f"blocks.1.ls{part}.gamma" for part in (1, 2)}
        case "dinov3":
            paths |= {f"scale{part}": f"blocks.1.gamma_{part}" for part in (1, 2)}
            of_queries, of_values = (expected[f"blocks.1.attn.{name}_bias"] for name in "qv")
            of_keys = found["stages/1/qkv/bias"][24:48]  # the network in PyTorch has none
            expected["blocks.1.attn.qkv.bias"] = np.concatenate([of_queries, of_keys, of_values])
    check_gradients(found, expected, {f"stages/1/{path}": name for path, name in paths.items()})


def test_all_blocks_can_be_trained(small: Any, oracle: Any, gradients_of: Any) -> None:
    network, build = small("vit_small_patch14_reg4_dinov2")
    images = oracle.images(5, 40)
    direction = np.random.default_rng(0).normal(size=(5, 25, 24)).astype(np.float32)
    expected = oracle.gradients(network, images, direction)
    found = gradients_of(build(40, trainable_stages=2, checkpoint_stages=True), images, direction)
    assert len(found) == 2 * (2 + 2 * (2 + 4)) + 2
    assert not any("embedding" in path for path in found)
    theirs = expected["blocks.0.mlp.fc1.weight"].T
    assert np.linalg.norm(found["stages/0/fc1/kernel"] - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_grid_equals_pytorch_adaptive_pool(small: Any, oracle: Any) -> None:
    network, build = small("vit_small_patch14_dinov2")
    oracle.check_grid(network, build(40, grid=2), oracle.images(2, 40), 2)


@every_network
def test_bfloat16_is_close_to_float32(model: str, small: Any, oracle: Any) -> None:
    _, build = small(model)
    images = oracle.images(2, 24)
    expected, regions = (oracle.run(build(24, dtype=dtype), images)[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert regions.dtype == np.float32
    assert 1e-4 < np.linalg.norm(regions - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "target"), [(5, 8), (37, 16), (7, 7), (14, 24)])
def test_bicubic_equals_pytorch(size: int, target: int, antialias: bool, oracle: Any) -> None:
    square = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    matrix = bicubic(size, target, antialias=antialias)
    expected = oracle.torch.nn.functional.interpolate(
        oracle.torch.from_numpy(square)[None, None], (target, target), mode="bicubic", antialias=antialias
    )
    assert np.abs(matrix @ square @ matrix.T - expected[0, 0].numpy()).max() < 1e-5


@pytest.mark.parametrize("model", sorted(vit.ARCHITECTURES))
def test_random_weights_fit_every_architecture(model: str) -> None:
    settings = ViT(model=model, weights="random", trainable_stages=1)
    size = 4 * settings.architecture().patch
    encoder = nnx.eval_shape(lambda: settings.build(size, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    regions = nnx.eval_shape(lambda encoder, images: encoder(images), encoder, images)
    assert regions.shape == (2, 16, settings.region_size)


def test_random_weights_depend_on_the_seed_alone() -> None:
    settings = ViT(model="vit_small_patch16_dinov3", weights="random")
    once, again, other = (settings.build(32, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert fingerprint(once) == fingerprint(again) != fingerprint(other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "vit_giant"}, "encoder.model is 'vit_giant'; it must be one of vit_base_patch14_dinov2"),
        ({"trainable_stages": 13}, "at least 0 and at most 12"),
        ({"grid": 0}, "encoder.grid is 0"),
    ],
)
def test_unusable_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(**fields)


def test_images_must_consist_of_whole_patches() -> None:
    with pytest.raises(UserError, match=r"image_size is 256; .* needs a multiple of 14, such as 252"):
        ViT(weights="random").build(256, rngs=nnx.Rngs(0))
