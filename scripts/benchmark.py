"""Speed, as ratios within one run: against plain matrix products, and side by side with PyTorch.

    python scripts/benchmark.py encoder          EfficientNet-Lite extraction beside the same network in PyTorch
    python scripts/benchmark.py train            a training step, as a share of the plain matmul rate
    python scripts/benchmark.py decode           greedy and beam search, captions/s

Rounds of the things compared are interleaved and medians given, for machines are noisy. Only JAX, flax and optax
are needed (PyTorch for `encoder`), so that it also runs where there is no TFDS.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.generation import Decoding, caption_function
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
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


def matmul(size: int = 2048, count: int = 20) -> tuple[Thing, float]:
    """Plain square products, enough of them to last as long as a step, and their FLOPs."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)

    def run() -> None:
        for _ in range(count):
            result = product(a)
        jax.block_until_ready(result)

    return run, 2.0 * count * size**3


def encoder(options: argparse.Namespace) -> None:
    """Images/s of feature extraction, ours and PyTorch's (eval mode, no gradients, channels_last)."""
    batch, size = 32, 224
    network = EfficientNetLite(options.variant).build(size, rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)
    extract = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    things: dict[str, Thing] = {"imgcap_jax": lambda: jax.block_until_ready(extract(state, images))}
    try:
        import torch
        from efficientnet_lite_pytorch.model import EfficientNet
    except ImportError:
        print("PyTorch and efficientnet_lite_pytorch are not both installed: no comparison")
    else:
        torch.set_num_threads(options.threads)
        reference = EfficientNet.from_name(f"efficientnet-lite{options.variant}", image_size=size).eval()
        reference = reference.to(memory_format=torch.channels_last)
        pixels = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

        def with_torch() -> None:
            with torch.no_grad():
                reference.extract_features(pixels)

        things["PyTorch"] = with_torch
    seconds = medians(things, options.rounds)
    for name, value in seconds.items():
        print(f"EfficientNet-Lite{options.variant} {size} px, batch {batch}: {name} {batch / value:.1f} images/s")
    if "PyTorch" in seconds:
        print(f"ratio to PyTorch: {seconds['PyTorch'] / seconds['imgcap_jax']:.2f}")


def _decoder(options: argparse.Namespace) -> tuple[CaptionModel, dict[str, int]]:
    sizes = {"T": 22, "D": 1280, "H": 512, "V": options.vocabulary, "N": options.regions}
    sizes |= {"B": options.batch, "M": options.captions}
    config = ShowAttendTell()
    decoder = config.build(sizes["D"], sizes["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))
    return CaptionModel(None, decoder), sizes


def _attend_flops(s: Mapping[str, int]) -> float:
    """Matrix products of one forward pass of soft attention at its default sizes (all 512), by hand."""
    H = E = A = R = s["H"]
    once = s["N"] * (s["D"] * R + R * A) + R * 2 * H
    step = H * A + s["N"] * (A + R) + H + (E + R + H) * 4 * H + (H + R) * E + E * s["V"]
    return 2.0 * s["B"] * (once + s["M"] * (s["T"] - 1) * step)


def train(options: argparse.Namespace) -> None:
    """A training step of soft attention: captions/s, and its products' share of the plain matmul rate."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    optimizer = Optimizer().build(100, 1000)
    parallel = DataParallel()
    step = parallel.compile(
        cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0), ema_decay=0.999)
    )
    rng = np.random.default_rng(0)
    batch = parallel.put(
        {
            "regions": rng.random((s["B"], s["N"], s["D"])).astype(np.float16),
            "tokens": rng.integers(4, s["V"], (s["B"], s["M"], s["T"])).astype(np.int32),
            "weight": np.ones(s["B"], np.float32),
            "row": np.arange(s["B"], dtype=np.int32),
        }
    )
    held = [parallel.replicate(first_state(params, optimizer, ema=True))]

    def once() -> None:
        held[0], _ = step(held[0], frozen, batch)
        jax.block_until_ready(held[0])

    product, flops = matmul()
    seconds = medians({"step": once, "matmul": product}, options.rounds)
    rate = 3 * _attend_flops(s) / seconds["step"]
    print(
        f"soft attention, batch {s['B']} x {s['M']} captions, N={s['N']}, V={s['V']}: "
        f"{s['B'] * s['M'] / seconds['step']:.1f} captions/s, {rate / 1e9:.1f} GFLOP/s, "
        f"{rate * seconds['matmul'] / flops:.2f} of the plain matmul rate ({flops / seconds['matmul'] / 1e9:.1f})"
    )


def decode(options: argparse.Namespace) -> None:
    """Captions/s of greedy and beam-5 decoding from ready regions, 20 words each at most."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    regions = np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float32)
    things: dict[str, Thing] = {}
    for name, beam in (("greedy", 1), ("beam 5", 5)):
        search = caption_function(graph, Decoding(beam=beam))
        things[name] = lambda search=search: jax.block_until_ready(search(params, frozen, {"regions": regions}))
    for name, value in medians(things, options.rounds).items():
        print(f"soft attention, {name}, batch {s['B']}, N={s['N']}, V={s['V']}: {s['B'] / value:.1f} captions/s")


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoder", "train", "decode"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variant", type=int, default=2, help="encoder: EfficientNet-Lite 0, 1 or 2")
    parser.add_argument("--threads", type=int, default=2, help="encoder: PyTorch's threads")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--captions", type=int, default=5, help="train: captions an image (M)")
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind} ({device.platform}), {options.dtype}")
    {"encoder": encoder, "train": train, "decode": decode}[options.what](options)


if __name__ == "__main__":
    main()
