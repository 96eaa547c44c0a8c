"""Speed, as ratios within one run: against plain matrix products, and side by side with PyTorch.

    python scripts/benchmark.py encoder          extraction, beside the same network in PyTorch
    python scripts/benchmark.py finetune         a step that trains encoder and decoder: time, memory, checkpointing
    python scripts/benchmark.py train            a training step, as a share of the plain matmul rate, beside PyTorch
    python scripts/benchmark.py decode           greedy and beam search, captions/s, beside PyTorch

`encoder` and `finetune` take --network: resnet50, resnet101, resnet152, vgg16, vgg16_bn, vgg19, vgg19_bn or
efficientnet_lite0 to 4, with random weights.

Rounds of the things compared are interleaved and medians given, for machines are noisy. Only JAX, flax and optax
are needed (PyTorch for the comparisons), so that it also runs where there is no TFDS.
"""

import argparse
import importlib.util
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding_settings import Decoding
from imgcap_jax.generation import caption_function
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.encoders import efficientnet_lite, resnet, vgg
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.vgg import VGG
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step, first_state
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel

Thing = Callable[[], Any]


def medians(things: Mapping[str, Thing], rounds: int) -> dict[str, float]:
    """Median seconds of each, over interleaved rounds; the first, which compiles, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, thing in things.items():
            start = time.perf_counter()
            thing()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul(dtype: str, size: int = 2048, count: int = 20) -> tuple[Thing, float]:
    """Plain square products, enough of them to last as long as a step, and their FLOPs."""
    a = jnp.asarray(np.random.default_rng(0).random((size, size)), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)

    def run() -> None:
        for _ in range(count):
            result = product(a)
        jax.block_until_ready(result)

    return run, 2.0 * count * size**3


def settings(name: str, **fields: Any) -> Any:
    """The encoder that torchvision calls `name`."""
    if name.startswith("resnet"):
        return ResNet(depth=int(name.removeprefix("resnet")), **fields)
    if name.startswith("vgg"):
        depth, _, norm = name.removeprefix("vgg").partition("_")
        return VGG(depth=int(depth), batch_norm=norm == "bn", **fields)
    return EfficientNetLite(variant=int(name.removeprefix("efficientnet_lite")), **fields)


def encoder_flops(encoder: Any, size: int) -> float:
    """Multiplications and additions of all convolutions for one image, by hand."""
    products = 0
    match encoder:
        case ResNet():
            side = -(-size // 2)
            products += side**2 * 64 * 3 * 7**2
            side = -(-side // 2)  # by the max pool
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
    return 2.0 * products


def torch_features(name: str, images: np.ndarray, threads: int, folder: Path) -> tuple[Callable[[], np.ndarray], str]:
    """PyTorch's regions [B,N,D] of images, as a user would compute them, and the file of the network's weights."""
    import torch
    import torch_networks as networks

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    match settings(name):
        case ResNet(depth=depth):
            network = networks.ResNet(networks.RESNET_BLOCKS[depth])
        case VGG(depth=depth, batch_norm=batch_norm):
            network = networks.VGG(networks.VGG_CONVOLUTIONS[depth], batch_norm)
        case EfficientNetLite(variant=variant):
            network = networks.EfficientNetLite(networks.LITE_BLOCKS[variant], networks.LITE_CHANNELS[variant])
    torch.save(network.state_dict(), folder / "network.pth")
    network = networks.fused(network.eval()).to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(images)

    def run() -> np.ndarray:
        with torch.inference_mode():
            last = network.features(networks.normalised(pixels, network.mean, network.std))
        return last.permute(0, 2, 3, 1).flatten(1, 2).numpy()

    return run, str(folder / "network.pth")


def encoder(options: argparse.Namespace) -> None:
    """Images/s of extraction, and PyTorch's (batch norm fused, inference mode, channels_last), from the same images."""
    batch, size, name = options.batch or 32, options.size, options.network
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    things: dict[str, Thing] = {}
    weights = "random"
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("torch") is None:
            print("PyTorch is not installed: no comparison")
        elif jax.default_backend() != "cpu" or options.dtype != "float32":
            print("PyTorch computes in float32 on the CPU here: no comparison")
        else:
            things["PyTorch"], weights = torch_features(name, images, options.threads, Path(folder))
        config = settings(name, weights=weights)
        graph, state = nnx.split(config.build(size, dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0)))
    extract = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    things["imgcap_jax"] = lambda: jax.block_until_ready(extract(state, images))
    if "PyTorch" in things:
        theirs, ours = things["PyTorch"](), np.asarray(things["imgcap_jax"]())
        print(f"relative difference of the features: {np.linalg.norm(ours - theirs) / np.linalg.norm(theirs):.1e}")
    things["matmul"], flops = matmul(options.dtype)
    seconds = medians(things, options.rounds)
    plain = flops / seconds.pop("matmul")
    for side, value in seconds.items():
        rate = batch * encoder_flops(config, size) / value
        print(
            f"{name} {size} px, batch {batch}: {side} {batch / value:.1f} images/s, {rate / 1e9:.1f} GFLOP/s, "
            f"{rate / plain:.2f} of the plain matmul rate ({plain / 1e9:.1f})"
        )
    if "PyTorch" in seconds:
        print(f"ratio to PyTorch: {seconds['PyTorch'] / seconds['imgcap_jax']:.2f}")


def finetune(options: argparse.Namespace) -> None:
    """A step that trains the encoder's last stages and soft attention, with and without stage checkpointing."""
    s = _sizes(options, batch=32)
    rng = np.random.default_rng(0)
    # Shard_map's step can be lowered, and so asked for its memory; it computes the same as pmap's.
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
        step = parallel.compile(cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0)))
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
            f"{s['M']} captions, {name}: {value:.2f} s a step, {memory[name]:.0f} MiB of temporaries a device"
        )
    print(
        f"checkpoints: {memory['with checkpoints'] / memory['without']:.2f} of the memory, "
        f"{seconds['with checkpoints'] / seconds['without']:.2f} of the time"
    )


def _sizes(options: argparse.Namespace, *, batch: int) -> dict[str, int]:
    sizes = {"T": 22, "D": 1280, "H": 512, "V": options.vocabulary, "N": options.regions}
    return sizes | {"B": options.batch or batch, "M": options.captions}


# All sizes 512, the regions projected to it.
DECODERS: dict[str, Any] = {
    "up_down": UpDown(hidden_size=512, embedding_size=512, attention_size=512, region_size=512),
    "attend": ShowAttendTell(),
}


def _decoder(options: argparse.Namespace) -> tuple[CaptionModel, dict[str, int]]:
    sizes = _sizes(options, batch=64)
    config = DECODERS[options.decoder]
    decoder = config.build(sizes["D"], sizes["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))
    return CaptionModel(None, decoder), sizes


def _decoder_flops(name: str, s: Mapping[str, int], words: int) -> float:
    """Matrix products of one forward pass, by hand: what is hoisted counts once, the vocabulary layer ``words``."""
    H = E = A = R = s["H"]
    once = s["N"] * (s["D"] * R + R * A)
    if name == "attend":
        once += R * 2 * H
        step = H * A + s["N"] * (A + R) + H + (E + R + H) * 4 * H
        word = (H + R) * E + E * s["V"]
    else:
        once += R * 4 * H
        step = (H + E + H) * 4 * H + H * A + s["N"] * (A + R) + (R + H + H) * 4 * H
        word = H * s["V"]
    return 2.0 * (s["B"] * (once + s["M"] * (s["T"] - 1) * step) + words * word)


def _captions(s: Mapping[str, int], lengths: str) -> np.ndarray:
    """Random captions int32 [B,M,T]: as long as there is room, or of lengths as in COCO (10.5 words on average)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, s["V"], (s["B"], s["M"], s["T"])).astype(np.int32)
    tokens[..., 0] = 1
    if lengths == "captions":
        words = np.clip(rng.normal(10.5, 2.4, (s["B"], s["M"])).round(), 6, s["T"] - 2).astype(int)
        place = np.arange(s["T"])
        tokens[place == words[..., None] + 1] = 2
        tokens[place > words[..., None] + 1] = 0
    return tokens


def _torch_decoder(options: argparse.Namespace, s: Mapping[str, int]) -> Any:
    """PyTorch's decoder and its module, or None where there is no fair comparison."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: no comparison")
        return None
    if jax.default_backend() != "cpu" or options.dtype != "float32":
        print("PyTorch computes in float32 on the CPU here: no comparison")
        return None
    import torch
    import torch_decoders

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = {"up_down": torch_decoders.UpDown, "attend": torch_decoders.Attend}[options.decoder]
    return kind(s["D"], s["H"], s["V"]), torch_decoders


def train(options: argparse.Namespace) -> None:
    """A training step: captions/s, its products' share of the plain matmul rate, and PyTorch beside it."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    optimizer = Optimizer().build(100, 1000)
    parallel = DataParallel()
    step = parallel.compile(
        cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0), ema_decay=options.ema)
    )
    tokens = _captions(s, options.lengths)
    words = int((tokens[..., 1:] != 0).sum())
    regions = np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float16)
    batch = parallel.put(
        {
            "regions": regions,
            "tokens": tokens,
            "weight": np.ones(s["B"], np.float32),
            "row": np.arange(s["B"], dtype=np.int32),
        }
    )
    held = [parallel.replicate(first_state(params, optimizer, ema=options.ema > 0))]

    def once() -> None:
        held[0], _ = step(held[0], frozen, batch)
        jax.block_until_ready(held[0])

    product, flops = matmul(options.dtype)
    things: dict[str, Thing] = {"imgcap_jax": once, "matmul": product}
    if (rival := _torch_decoder(options, s)) is not None:
        import torch

        decoder, module = rival
        adam = torch.optim.AdamW(decoder.parameters(), lr=1e-4)
        theirs = torch.from_numpy(regions).float(), torch.from_numpy(tokens).long()
        things["PyTorch"] = lambda: module.train_step(decoder, adam, *theirs)
    seconds = medians(things, options.rounds)
    plain = flops / seconds.pop("matmul")
    for side, value in seconds.items():
        # Each product has two gradients, but the first, of the regions, is not differentiated by its input.
        products = 3 * _decoder_flops(options.decoder, s, words) - 2.0 * s["B"] * s["N"] * s["D"] * s["H"]
        rate = products / value
        print(
            f"{options.decoder}, batch {s['B']} x {s['M']} captions of {words / s['B'] / s['M']:.1f} words with eos, "
            f"N={s['N']}, V={s['V']}: {side} {value:.3f} s a step, {s['B'] * s['M'] / value:.1f} captions/s, "
            f"{rate / 1e9:.1f} GFLOP/s, {rate / plain:.2f} of the plain matmul rate ({plain / 1e9:.1f})"
        )
    if "PyTorch" in seconds:
        print(f"ratio to PyTorch: {seconds['PyTorch'] / seconds['imgcap_jax']:.2f}")


def decode(options: argparse.Namespace) -> None:
    """Captions/s of greedy and beam-5 decoding from ready regions, 20 steps each, and PyTorch beside it."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    regions = np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float32)
    vocabulary = Vocabulary.build(map(str, range(s["V"] - 4)), min_count=1)
    rival = _torch_decoder(options, s)
    things: dict[str, Thing] = {}
    for name, beam in (("greedy", 1), ("beam 5", 5)):
        # Nobody says eos: the weights are random, and all captions shall take all steps on both sides.
        search = caption_function([graph], Decoding(beam=beam, max_words=20, min_words=20), vocabulary)
        things[f"imgcap_jax, {name}"] = lambda search=search: jax.block_until_ready(
            search([params], [frozen], [{"regions": regions}])
        )
        if rival is not None:
            import torch

            decoder, module = rival
            decoder.eval()
            with torch.no_grad():
                decoder.words.bias[2] = -1e9
            pixels = torch.from_numpy(regions)
            things[f"PyTorch, {name}"] = partial(module.decode, decoder, pixels, beam, 20)
    seconds = medians(things, options.rounds)
    for name, value in seconds.items():
        print(f"{options.decoder}, {name}, batch {s['B']}, N={s['N']}, V={s['V']}: {s['B'] / value:.1f} captions/s")
    for name in ("greedy", "beam 5") if rival is not None else ():
        ratio = seconds[f"PyTorch, {name}"] / seconds[f"imgcap_jax, {name}"]
        print(f"ratio to PyTorch, {name}: {ratio:.2f}")


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoder", "finetune", "train", "decode"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", default="resnet50", help="encoder, finetune: see above")
    parser.add_argument("--size", type=int, default=224, help="encoder, finetune: side of the images")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="PyTorch's threads; JAX takes all cores",
    )
    parser.add_argument("--trainable-stages", type=int, default=2, help="finetune: how many of the last stages")
    parser.add_argument("--batch", type=int, help="images (encoder and finetune 32, train and decode 64)")
    parser.add_argument("--captions", type=int, default=5, help="finetune, train: captions an image (M)")
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--decoder", choices=tuple(DECODERS), default="up_down", help="train, decode")
    parser.add_argument(
        "--lengths",
        choices=("full", "captions"),
        default="full",
        help="train: captions that fill all T = 22 places, or of lengths as in COCO",
    )
    parser.add_argument("--ema", type=float, default=0.0, help="train: decay of averaged parameters; 0: none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind} ({device.platform}), {options.dtype}")
    {"encoder": encoder, "finetune": finetune, "train": train, "decode": decode}[options.what](options)


if __name__ == "__main__":
    main()
