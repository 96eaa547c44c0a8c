"""Speed of encoders: extraction against PyTorch, and fine-tuning with and without checkpointing (see benchmark.py)."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_decoders import torch_module
from flax import nnx
from measuring import Row, Thing, at_precision, decoder_sizes, first_call, medians, times_and_rate

from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders import efficientnet_lite, resnet, vgg
from imgcap_jax.models.encoders.convnext import ConvNeXt
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.vgg import VGG
from imgcap_jax.models.encoders.vit import ViT
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.step import first_state


def settings(name: str, **fields: Any) -> Any:
    """The settings of an encoder by the name of its network."""
    if name.startswith("vit"):
        return ViT(model=name, **fields)
    if name.startswith("convnext"):
        return ConvNeXt(model=name, **fields)
    if name.startswith("resnet"):
        return ResNet(depth=int(name.removeprefix("resnet")), **fields)
    if name.startswith("vgg"):
        depth, _, norm = name.removeprefix("vgg").partition("_")
        return VGG(depth=int(depth), batch_norm=norm == "bn", **fields)
    return EfficientNetLite(variant=int(name.removeprefix("efficientnet_lite")), **fields)


def encoder_flops(encoder: Any, size: int) -> float:
    """The number of multiplications and additions in all convolutions and matrix products for one image."""
    products = 0
    match encoder:
        case ResNet():
            side = -(-size // 2)
            products += side**2 * 64 * 3 * 7**2
            side = -(-side // 2)  # the max pool
            for b in (block for stage in resnet.blocks(encoder.depth) for block in stage):
                inner = -(-side // b.stride)
                products += side**2 * b.inputs * b.width + inner**2 * b.width * (9 * b.width + b.outputs)
                products += inner**2 * b.inputs * b.outputs if b.projects else 0
                side = inner
        case VGG():
            for convolution in vgg.network(encoder.depth, encoder.batch_norm).convolutions:
                products += (size // 2 ** (convolution.stage - 1)) ** 2 * math.prod(convolution.shape)
        case EfficientNetLite():
            side = -(-size // 2)
            products += side**2 * 32 * 3 * 3**2
            for b in (block for stage in efficientnet_lite.blocks(encoder.variant) for block in stage):
                inner = -(-side // b.stride)
                products += side**2 * b.inputs * b.expanded if b.expanded != b.inputs else 0
                products += inner**2 * b.expanded * (b.kernel**2 + b.outputs)
                side = inner
            products += side**2 * b.outputs * encoder.region_size
        case ViT():
            vit = encoder.architecture()
            patches = (size // vit.patch) ** 2
            tokens = patches + vit.class_tokens + vit.registers
            products += patches * vit.width * 3 * vit.patch**2
            products += vit.depth * tokens * (4 * vit.width**2 + 2 * vit.width * vit.mlp + 2 * tokens * vit.width)
        case ConvNeXt():
            sizes, before = encoder.architecture(), 3
            for stage, (depth, width) in enumerate(zip(sizes.depths, sizes.widths, strict=True)):
                cells, kernel = (size // 2 ** (stage + 2)) ** 2, 2 if stage else 4
                products += cells * (before * width * kernel**2 + depth * width * (49 + 8 * width))
                before = width
    return 2.0 * products


def torch_features(name: str, pixels: Any, folder: Path) -> tuple[Callable[[], Any], str]:
    """A function that computes regions [B,N,D] of pixels uint8 [B,S,S,3] in PyTorch, and the path of the weights."""
    import torch
    import torch_networks as networks

    match settings(name):
        case ResNet(depth=depth):
            network = networks.ResNet(networks.RESNET_BLOCKS[depth])
        case VGG(depth=depth, batch_norm=batch_norm):
            network = networks.VGG(networks.VGG_CONVOLUTIONS[depth], batch_norm)
        case EfficientNetLite(variant=variant):
            network = networks.EfficientNetLite(networks.LITE_BLOCKS[variant], networks.LITE_CHANNELS[variant])
        case ViT() as config:
            a = config.architecture()
            network = networks.ViT(a.family, a.width, a.depth, a.heads, a.mlp, a.patch, a.side, a.registers)
        case ConvNeXt() as config:
            sizes = config.architecture()
            network = networks.ConvNeXt(sizes.depths, sizes.widths, sizes.response_norm)
    torch.save({name: value.cpu() for name, value in network.state_dict().items()}, folder / "network.pth")
    network = networks.fused(network.eval()).to(memory_format=torch.channels_last)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            last = network.features(networks.normalised(pixels, network.mean, network.std))
        return last.permute(0, 2, 3, 1).flatten(1, 2)

    return run, str(folder / "network.pth")


def encoder(options: argparse.Namespace) -> list[Row]:
    """Images/s of extraction, also in PyTorch (batch norm fused, inference mode, channels_last), on the same images."""
    batch, size, name = options.batch or 32, options.size, options.network
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    things: dict[str, Thing] = {}
    weights, features = "random", None
    with tempfile.TemporaryDirectory() as folder:
        if (module := torch_module(options)) is not None:
            features, weights = torch_features(name, module.tensor(images), Path(folder))
        config = settings(name, weights=weights)
        graph, state = nnx.split(config.build(size, dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0)))
    extract = jax.jit(at_precision(lambda state, images: nnx.merge(graph, state)(images), options.dtype))
    held = jax.device_put(images)
    things["imgcap_jax"] = lambda: jax.block_until_ready(extract(state, held))
    first = {"imgcap_jax": first_call(things["imgcap_jax"], "imgcap_jax")}
    if module is not None and features is not None:
        things["PyTorch"] = module.timed(features, options.dtype)
        theirs, ours = features().float().cpu().numpy(), np.asarray(things["imgcap_jax"](), np.float32)
        print(f"relative difference of the features: {np.linalg.norm(ours - theirs) / np.linalg.norm(theirs):.1e}")
    found, plain = times_and_rate(things, options)
    seconds = {side: of.wall for side, of in found.items()}
    rows, flops = [], batch * encoder_flops(config, size)
    for side, value in seconds.items():
        rate = flops / value
        case = f"{name} {size} px, {batch} images, {side}"
        milliseconds, share = 1e3 * value, rate / plain
        rows.append(Row("encoder", case, options.dtype, milliseconds, None, flops / 1e9, share, first.get(side)))
        print(
            f"{name} {size} px, batch {batch}: {side} {batch / value:.1f} images/s, {rate / 1e9:.1f} GFLOP/s, "
            f"{rate / plain:.2f} of the plain matmul rate ({plain / 1e9:.1f})"
        )
    if "PyTorch" in seconds:
        print(f"ratio to PyTorch: {seconds['PyTorch'] / seconds['imgcap_jax']:.2f}")
    return rows


def finetune(options: argparse.Namespace) -> list[Row]:
    """A training step of the encoder's last stages and soft attention, with and without stage checkpointing."""
    s = decoder_sizes(options, batch=32)
    rng = np.random.default_rng(0)
    # The step of shard_map can be lowered, which reports its memory. It computes the same as the step of pmap.
    parallel = DataParallel("shard_map")
    batch = parallel.put(
        {
            "image": rng.integers(0, 256, (s["B"], options.size, options.size, 3), dtype=np.uint8),
            "tokens": rng.integers(4, s["V"], (s["B"], s["M"], s["T"])).astype(np.int32),
            "weight": np.ones(s["B"], np.float32),
            "row": np.arange(s["B"], dtype=np.int32),
        }
    )
    things: dict[str, Thing] = {}
    memory: dict[str, float] = {}
    for checkpoint in (False, True):
        config = settings(
            options.network,
            weights="random",
            trainable_stages=options.trainable_stages,
            checkpoint_stages=checkpoint,
        )
        dtype = jnp.dtype(options.dtype)
        network = config.build(options.size, dtype=dtype, rngs=nnx.Rngs(0))
        decoder = ShowAttendTell().build(network.region_size, s["V"], dtype=dtype, rngs=nnx.Rngs(0))
        graph, params, frozen = split_trained(CaptionModel(network, decoder))
        optimizer = Optimizer().build(100, 1000)
        step = cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0))
        step = parallel.compile(at_precision(step, options.dtype))
        held = [parallel.replicate(first_state(params, optimizer, ema=False))]
        frozen = parallel.replicate(frozen)
        compiled = step.lower(held[0], frozen, batch).compile()
        name = "with checkpoints" if checkpoint else "without"
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20

        def once(held: list[Any] = held, compiled: Any = compiled, frozen: Any = frozen) -> None:
            held[0], _ = compiled(held[0], frozen, batch)
            jax.block_until_ready(held[0])

        things[name] = once
    seconds = medians(things, options.rounds)
    for name, value in seconds.items():
        print(
            f"{options.network} {options.size} px, last {options.trainable_stages} stages trained, batch {s['B']} x "
            f"{s['M']} captions, {name}: {value:.2f} s per step, {memory[name]:.0f} MiB of temporaries per device"
        )
    print(
        f"checkpointing: {memory['with checkpoints'] / memory['without']:.2f} times the memory, "
        f"{seconds['with checkpoints'] / seconds['without']:.2f} times the time"
    )
    rate = s["B"] * s["M"]
    return [
        Row("finetune", f"{options.network}, checkpoints of stages: {name}", options.dtype, 1e3 * value, rate / value)
        for name, value in seconds.items()
    ]
