"""Speed of decoders: training steps and decoding compared with PyTorch, and all decoders (see benchmark.py)."""

import argparse
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Thing, decoder_sizes, matmul, medians

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.model import CaptionModel, parameter_count, split_trained
from imgcap_jax.run.generation import caption_function
from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.step import first_state

# All sizes are 512. The regions are projected to this size.
DECODERS: dict[str, Any] = {
    "up_down": UpDown(hidden_size=512, embedding_size=512, attention_size=512, region_size=512),
    "attend": ShowAttendTell(),
}


def _decoder(options: argparse.Namespace) -> tuple[CaptionModel, dict[str, int]]:
    sizes = decoder_sizes(options, batch=64)
    config = DECODERS[options.decoder]
    decoder = config.build(sizes["D"], sizes["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))
    return CaptionModel(None, decoder), sizes


def _decoder_flops(name: str, s: Mapping[str, int], words: int) -> float:
    """FLOPs of the matrix products of one forward pass.

    Products that are moved out of the loop over T count once per image. The vocabulary layer counts ``words`` times.
    """
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
    """Random captions int32 [B,M,T] that fill all positions, or with lengths as in COCO (10.5 words on average)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, s["V"], (s["B"], s["M"], s["T"])).astype(np.int32)
    tokens[..., 0] = 1
    if lengths == "captions":
        words = np.clip(rng.normal(10.5, 2.4, (s["B"], s["M"])).round(), 6, s["T"] - 2).astype(int)
        place = np.arange(s["T"])
        tokens[place == words[..., None] + 1] = 2
        tokens[place > words[..., None] + 1] = 0
    return tokens


def regions_of(s: Mapping[str, int]) -> np.ndarray:
    """Random regions float16 [B,N,D]."""
    return np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float16)


def _torch_decoder(options: argparse.Namespace, s: Mapping[str, int]) -> Any:
    """The decoder in PyTorch and its module, or None if a fair comparison is not possible."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed; the comparison is skipped")
        return None
    if jax.default_backend() != "cpu" or options.dtype != "float32":
        print("the PyTorch decoders run in float32 on the CPU only; the comparison is skipped")
        return None
    import torch
    import torch_decoders

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = {"up_down": torch_decoders.UpDown, "attend": torch_decoders.Attend}[options.decoder]
    return kind(s["D"], s["H"], s["V"]), torch_decoders


def train(options: argparse.Namespace) -> None:
    """Prints captions/s of a training step, its share of the plain matmul rate, and the same for PyTorch."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    optimizer = Optimizer().build(100, 1000)
    parallel = DataParallel()
    step = parallel.compile(
        cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0), ema_decay=options.ema)
    )
    tokens = _captions(s, options.lengths)
    words = int((tokens[..., 1:] != 0).sum())
    regions = regions_of(s)
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
        # Each product has two gradients, except the projection of the regions, which needs no gradient of its input.
        products = 3 * _decoder_flops(options.decoder, s, words) - 2.0 * s["B"] * s["N"] * s["D"] * s["H"]
        rate = products / value
        print(
            f"{options.decoder}, batch {s['B']} x {s['M']} captions of {words / s['B'] / s['M']:.1f} words with eos, "
            f"N={s['N']}, V={s['V']}: {side} {value:.3f} s per step, {s['B'] * s['M'] / value:.1f} captions/s, "
            f"{rate / 1e9:.1f} GFLOP/s, {rate / plain:.2f} of the plain matmul rate ({plain / 1e9:.1f})"
        )
    if "PyTorch" in seconds:
        print(f"ratio to PyTorch: {seconds['PyTorch'] / seconds['imgcap_jax']:.2f}")


def decode(options: argparse.Namespace) -> None:
    """Prints captions/s of greedy decoding and beam 5 from region features in 20 steps, and the same for PyTorch."""
    model, s = _decoder(options)
    graph, params, frozen = split_trained(model)
    regions = np.random.default_rng(0).random((s["B"], s["N"], s["D"])).astype(np.float32)
    vocabulary = Vocabulary.build(map(str, range(s["V"] - 4)), min_count=1)
    rival = _torch_decoder(options, s)
    things: dict[str, Thing] = {}
    for name, beam in (("greedy", 1), ("beam 5", 5)):
        # The weights are random. eos is forbidden on both sides, so that all captions take all steps.
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


def decoders(options: argparse.Namespace) -> None:
    """Prints training captions/s and parameter counts of all decoders in experiments/flickr8k_*.py."""
    from imgcap_jax.cli.experiments import find  # needs TFDS

    s = {"B": 16, "M": 5, "T": 18, "N": 64, "D": 1280, "V": 2543}
    parallel = DataParallel()
    batch = parallel.put(
        {
            "regions": regions_of(s),
            "tokens": _captions(s, "captions"),
            "weight": np.ones(s["B"], np.float32),
            "row": np.arange(s["B"], dtype=np.int32),
        }
    )
    things: dict[str, Thing] = {}
    parameters: dict[str, int] = {}
    for path in sorted((Path(__file__).parent.parent / "experiments").glob("flickr8k_*.py")):
        experiment = find(str(path))
        if experiment.encoder != find("flickr8k").encoder or not isinstance(experiment.objective, CrossEntropy):
            continue  # an experiment with another encoder or objective
        decoder = experiment.decoder.build(s["D"], s["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))
        graph, params, frozen = split_trained(CaptionModel(None, decoder))
        name = path.stem.removeprefix("flickr8k_")
        parameters[name] = parameter_count(params)
        optimizer = experiment.optimizer.build(100, 1000)
        step = parallel.compile(
            cross_entropy_step(graph, experiment.objective, optimizer, key=jax.random.key(0), ema_decay=0.999)
        )
        held = [parallel.replicate(first_state(params, optimizer, ema=True))]

        def once(held: list[Any] = held, step: Any = step, frozen: Any = frozen) -> None:
            held[0], _ = step(held[0], frozen, batch)
            jax.block_until_ready(held[0])

        things[name] = once
    for name, value in medians(things, options.rounds).items():
        rate = s["B"] * s["M"] / value
        print(f"{name}: {parameters[name]:,} parameters, {1e3 * value:.0f} ms per step, {rate:.0f} captions/s")
