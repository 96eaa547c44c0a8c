"""timm's names for our tensors, compared with timm 1.0.31 itself."""

import hashlib

import pytest

from imgcap_jax.models.encoders.efficientnet_lite import tensor_shapes
from imgcap_jax.models.encoders.pretrained.naming import FileTensor, names_in_file, own_names, timm_names

NORM = ("weight", "bias", "running_mean", "running_var")


def vgg_shapes(plan: str, normalised: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of torchvision's VGG, from its list of channels with M for max pools."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels, layer = 3, 0
    for item in plan.split():
        if item == "M":
            layer += 1
            continue
        shapes[f"features.{layer}.weight"], shapes[f"features.{layer}.bias"] = (int(item), channels, 3, 3), (int(item),)
        if normalised:
            shapes |= {f"features.{layer + 1}.{part}": (int(item),) for part in NORM}
        channels, layer = int(item), layer + 2 + normalised
    for name, outputs, inputs in (("0", 4096, 25088), ("3", 4096, 4096), ("6", 1000, 4096)):
        shapes |= {f"classifier.{name}.weight": (outputs, inputs), f"classifier.{name}.bias": (outputs,)}
    return shapes


def digest(tensors: dict[str, FileTensor]) -> str:
    lines = sorted(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors.values())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# Computed as in `digest`, from the state dicts of timm.create_model in timm 1.0.31 without num_batches_tracked.
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (0, "50a8af1596b033c3"),
        (1, "c1c21417d4654fb2"),
        (2, "59a3ef377b9b7d53"),
        (3, "8415d5421d9c1a54"),
        (4, "139d4630ac1285e9"),
    ],
)
def test_lite_has_the_names_and_shapes_of_timm(variant: int, expected: str) -> None:
    assert digest(timm_names("efficientnet_lite", tensor_shapes(variant))) == expected


@pytest.mark.parametrize(
    ("plan", "normalised", "expected"),
    [
        ("64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M", False, "442fc78813acceee"),
        ("64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M", True, "ff55aaf623f43b89"),
    ],
    ids=["vgg16", "vgg19_bn"],
)
def test_vgg_has_the_names_and_shapes_of_timm(plan: str, normalised: bool, expected: str) -> None:
    assert digest(timm_names("vgg", vgg_shapes(plan, normalised))) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_mean", "bn1.running_mean"),
        ("_conv_head.weight", "conv_head.weight"),
        ("_bn1.bias", "bn2.bias"),
        ("_fc.bias", "classifier.bias"),
        # The first block does not expand.
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
        ("_blocks.0._bn1.weight", "blocks.0.0.bn1.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.0._bn2.weight", "blocks.0.0.bn2.weight"),
        ("_blocks.2._expand_conv.weight", "blocks.1.1.conv_pw.weight"),
        ("_blocks.2._bn0.weight", "blocks.1.1.bn1.weight"),
        ("_blocks.2._depthwise_conv.weight", "blocks.1.1.conv_dw.weight"),
        ("_blocks.2._bn1.weight", "blocks.1.1.bn2.weight"),
        ("_blocks.2._project_conv.weight", "blocks.1.1.conv_pwl.weight"),
        ("_blocks.2._bn2.weight", "blocks.1.1.bn3.weight"),
        ("_blocks.15._bn2.weight", "blocks.6.0.bn3.weight"),
    ],
)
def test_lite_name(ours: str, theirs: str) -> None:
    assert timm_names("efficientnet_lite", tensor_shapes(0))[ours].name == theirs


def test_resnet_has_the_same_names() -> None:
    shapes = {"conv1.weight": (64, 3, 7, 7), "layer1.0.downsample.0.weight": (256, 64, 1, 1), "fc.bias": (1000,)}
    assert timm_names("resnet", shapes) == own_names(shapes)
    assert names_in_file("resnet", shapes, list(shapes)) == (own_names(shapes), False)


def test_naming_is_determined_by_the_majority_of_names() -> None:
    shapes = tensor_shapes(1)
    own, timm = own_names(shapes), timm_names("efficientnet_lite", shapes)
    for names, theirs in ((own, False), (timm, True)):
        held = [tensor.name for tensor in names.values()]
        assert names_in_file("efficientnet_lite", shapes, held) == (names, theirs)
        assert names_in_file("efficientnet_lite", shapes, held[5:]) == (names, theirs)
    assert names_in_file("efficientnet_lite", shapes, ["something"]) == (own, False)
