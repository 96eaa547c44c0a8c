"""Speed of decoders: training steps and decoding compared with PyTorch, and all decoders (see benchmark.py).

Functions import imgcap_jax themselves, because ``--before`` builds the same candidates with another checkout of it.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checkouts import of_each_checkout
from flax import nnx
from jax import Array
from measuring import (
    EOS,
    WORDS,
    Row,
    Thing,
    at_precision,
    caption_lengths,
    chosen_lengths,
    decoder_sizes,
    lengths_text,
    medians,
    print_ratios,
    random_captions,
    regions_of,
    times_and_rate,
    word_counts,
)

DECODERS = ("up_down", "attend", "show_tell")
BEAMS = {"greedy": 1, "beam 5": 5}


def built_decoder(options: argparse.Namespace, s: Mapping[str, int]) -> Any:
    """The decoder of the options with random weights. All its sizes are H, that of projected regions included."""
    from imgcap_jax.models.decoders.attend import ShowAttendTell
    from imgcap_jax.models.decoders.show_tell import ShowTell
    from imgcap_jax.models.decoders.up_down import UpDown

    size = s["H"]
    config: Any = {
        "up_down": UpDown(hidden_size=size, embedding_size=size, attention_size=size, region_size=size),
        "attend": ShowAttendTell(hidden_size=size, embedding_size=size, attention_size=size, region_size=size),
        "show_tell": ShowTell(hidden_size=size, embedding_size=size),
    }[options.decoder]
    return config.build(s["D"], s["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))


def torch_module(options: argparse.Namespace) -> Any:
    """The module of the decoders in PyTorch, on JAX's device; or None, and a line that says why it is not compared."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed; the comparison is skipped")
        return None
    import torch
    import torch_decoders

    backend = jax.default_backend()
    if (backend == "cpu" and options.dtype != "float32") or (backend == "gpu" and not torch.cuda.is_available()):
        print("PyTorch is compared in float32 on the CPU, and on a GPU that it finds; the comparison is skipped")
        return None
    if backend not in ("cpu", "gpu"):
        print(f"PyTorch is not compared on {backend}")
        return None
    torch_decoders.use("cuda" if backend == "gpu" else "cpu", options.threads)
    return torch_decoders


def torch_decoder(module: Any, options: argparse.Namespace, s: Mapping[str, int]) -> Any:
    """The decoder of the options in PyTorch."""
    kind = {
        "up_down": module.UpDown,
        "attend": module.Attend,
        "show_tell": module.ShowTell,
    }[options.decoder]
    return kind(s["D"], s["H"], s["V"])


class Products(NamedTuple):
    """Multiplications of a decoder's matrix products."""

    image: int
    """Per image, without a gradient of their input."""
    once: int
    """Per image: products that are moved out of the loop over T."""
    word: int
    """Per word, eos included."""

    def search(self, images: int, words: int) -> float:
        """FLOPs of decoding this number of words, over all beams."""
        return 2.0 * (images * (self.image + self.once) + words * self.word)

    def training(self, images: int, words: int) -> float:
        """FLOPs of a training step: each product has two gradients, except that of the regions, which has one."""
        return 2.0 * (2 * images * self.image + 3 * (images * self.once + words * self.word))


def products(name: str, s: Mapping[str, int]) -> Products:
    """The multiplications of a decoder of these sizes."""
    H = E = A = R = s["H"]
    image = s["D"] * R * (1 if name == "show_tell" else s["N"])
    if name == "show_tell":
        once = (E + H) * 4 * H
        word = (E + H) * 4 * H + H * s["V"]
    elif name == "attend":
        once = s["N"] * R * A + R * 2 * H
        step = H * A + s["N"] * (A + R) + H + (E + R + H) * 4 * H
        word = step + (H + R) * E + E * s["V"]
    else:
        once = s["N"] * R * A + R * 4 * H
        step = (H + E + H) * 4 * H + H * A + s["N"] * (A + R) + (R + H + H) * 4 * H
        word = step + H * s["V"]
    return Products(image, once, word)


def _train_steps(
    options: argparse.Namespace, s: Mapping[str, int], tokens: Mapping[str, np.ndarray]
) -> dict[str, Thing]:
    """A training step of imgcap_jax for each kind of lengths. All share one compiled step and one state."""
    from imgcap_jax.models.model import CaptionModel, split_trained
    from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
    from imgcap_jax.training.optimizer import Optimizer
    from imgcap_jax.training.parallel import DataParallel
    from imgcap_jax.training.step import first_state

    graph, params, frozen = split_trained(CaptionModel(None, built_decoder(options, s)))
    optimizer = Optimizer().build(100, 1000)
    parallel = DataParallel()
    step = cross_entropy_step(graph, CrossEntropy(), optimizer, key=jax.random.key(0), ema_decay=options.ema)
    step = parallel.compile(at_precision(step, options.dtype))
    held = [parallel.replicate(first_state(params, optimizer, ema=options.ema > 0))]

    def once(batch: Mapping[str, Array]) -> None:
        held[0], _ = step(held[0], frozen, batch)
        jax.block_until_ready(held[0])

    return {
        lengths: partial(
            once,
            parallel.put(rows_of(s) | {"regions": regions_of(s), "tokens": captions}),
        )
        for lengths, captions in tokens.items()
    }


def rows_of(s: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The weight and the number of each image of a batch, as a training step reads them."""
    return {
        "weight": np.ones(s["B"], np.float32),
        "row": np.arange(s["B"], dtype=np.int32),
    }


def train(options: argparse.Namespace) -> list[Row]:
    """Prints captions/s of a training step, its share of the plain matmul rate, and the same for PyTorch."""
    s = decoder_sizes(options, batch=64)
    tokens = {lengths: random_captions(s, lengths) for lengths in chosen_lengths(options)}
    things, first = of_each_checkout(options, lambda: _train_steps(options, s, tokens))
    if (module := torch_module(options)) is not None:
        import torch

        sides = {"PyTorch": torch_decoder(module, options, s)}
        if options.decoder == "show_tell":
            sides["PyTorch with packed nn.LSTM"] = module.PackedShowTell(s["D"], s["H"], s["V"])
        regions = module.tensor(regions_of(s)).float()
        for side, decoder in sides.items():
            adam = torch.optim.AdamW(decoder.parameters(), lr=1e-4)
            for lengths, captions in tokens.items():
                theirs = module.tensor(captions).long()
                step = partial(module.train_step, decoder, adam, regions, theirs)
                things[side, lengths] = module.timed(step, options.dtype)
    found, plain = times_and_rate(things, options)
    rows = []
    print(
        f"{options.decoder}, batch {s['B']} x {s['M']} captions, N={s['N']}, V={s['V']}; "
        f"plain matmul rate between the steps: {plain / 1e9:.1f} GFLOP/s ({options.dtype})"
    )
    for lengths, captions in tokens.items():
        words = (captions[..., 1:] > 0).sum(-1)  # with eos
        print(lengths_text(lengths, words - 1))
        for (side, row), time in found.items():
            if row == lengths:
                flops = products(options.decoder, s).training(s["B"], int(words.sum()))
                rate = flops / time.wall
                rows.append(
                    Row(
                        "train",
                        f"step, {caption_lengths(lengths)}, {side}",
                        options.dtype,
                        1e3 * time.wall,
                        s["B"] * s["M"] / time.wall,
                        flops / 1e9,
                        rate / plain,
                        first.get((side, row)),
                    )
                )
                print(
                    f"  {side}: {1e3 * time.wall:.1f} ms per step, {s['B'] * s['M'] / time.wall:.1f} captions/s, "
                    f"{rate / 1e9:.1f} GFLOP/s, {rate / plain:.2f} of the plain matmul rate"
                )
        print_ratios(found, lengths)
    return rows


@dataclass(frozen=True)
class _EndAfter:
    """The logit rule by which the captions of each image end after a number of words."""

    words: tuple[int, ...]

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        from imgcap_jax.decoding.rules import FORBIDDEN

        ends = (jnp.array(self.words) == t)[:, None, None]
        return jnp.where(ends == (jnp.arange(logits.shape[-1]) == EOS), logits, FORBIDDEN)


def _searches(
    options: argparse.Namespace,
    s: Mapping[str, int],
    regions: Array,
    words: Mapping[str, np.ndarray],
) -> dict[str, Thing]:
    """Searches of imgcap_jax, greedy and with beam 5, for each kind of lengths."""
    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.decoding.settings import Decoding
    from imgcap_jax.models.model import CaptionModel, split_trained
    from imgcap_jax.run.generation import caption_function

    graph, params, frozen = split_trained(CaptionModel(None, built_decoder(options, s)))
    vocabulary = Vocabulary.build(map(str, range(s["V"] - 4)), min_count=1)
    things: dict[str, Thing] = {}
    for lengths, counts in words.items():
        for name, beam in BEAMS.items():
            rules = (_EndAfter(tuple(counts.tolist())),)
            search = caption_function([graph], Decoding(beam=beam, max_words=WORDS, rules=rules), vocabulary)

            def once(search: Any = search, counts: np.ndarray = counts) -> None:
                tokens = np.asarray(search([params], [frozen], [{"regions": regions}]).tokens[:, 0])
                assert ((tokens > EOS).sum(-1) == counts).all(), "captions have other lengths than drawn"

            things[f"{name}, {lengths}"] = once
    return things


def decode(options: argparse.Namespace) -> list[Row]:
    """Prints captions/s of greedy decoding and beam 5 from region features, and the same for PyTorch.

    The weights are random. Both sides are made to end each caption after a given number of words: all 20 that are
    allowed, or a drawn number per image. A batch ends with its longest caption.
    """
    s = decoder_sizes(options, batch=64)
    regions = jax.device_put(regions_of(s).astype(np.float32))
    words = {lengths: word_counts((s["B"],), lengths) for lengths in chosen_lengths(options)}
    things, first = of_each_checkout(options, lambda: _searches(options, s, regions, words))
    if (module := torch_module(options)) is not None:
        decoder = torch_decoder(module, options, s).eval()
        pixels = module.tensor(np.array(regions))
        for lengths, counts in words.items():
            for name, beam in BEAMS.items():
                search = partial(module.decode, decoder, pixels, beam, WORDS, module.tensor(counts))
                things["PyTorch", f"{name}, {lengths}"] = module.timed(search, options.dtype, fetched=True)
    found, plain = times_and_rate(things, options)
    rows = []
    print(f"{options.decoder}, batch {s['B']}, N={s['N']}, V={s['V']}, at most {WORDS} words")
    for lengths, counts in words.items():
        print(f"{lengths_text(lengths, counts)}, the longest {counts.max()}")
        for name, beam in BEAMS.items():
            row = f"{name}, {lengths}"
            flops = products(options.decoder, s).search(s["B"], beam * int((counts + 1).clip(max=WORDS).sum()))
            for (side, of), time in found.items():
                if of == row:
                    print(f"  {name}, {side}: {s['B'] / time.wall:.1f} captions/s")
                    rows.append(
                        Row(
                            "decode",
                            f"{name}, {caption_lengths(lengths)}, {side}",
                            options.dtype,
                            1e3 * time.wall,
                            s["B"] / time.wall,
                            flops / 1e9,
                            flops / time.wall / plain,
                            first.get((side, of)),
                        )
                    )
            print_ratios(found, row, f"{name}, ")
    return rows


def decoders(options: argparse.Namespace) -> list[Row]:
    """Prints training captions/s and parameter counts of all decoders in experiments/flickr8k_*.py."""
    from imgcap_jax.cli.experiments import find  # needs TFDS
    from imgcap_jax.models.model import CaptionModel, parameter_count, split_trained
    from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
    from imgcap_jax.training.parallel import DataParallel
    from imgcap_jax.training.step import first_state

    s = {"B": 16, "M": 5, "T": 18, "N": 64, "D": 1280, "V": 2543}
    parallel = DataParallel()
    tokens = random_captions(s, "captions")
    batch = parallel.put(rows_of(s) | {"regions": regions_of(s), "tokens": tokens})
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
        step = cross_entropy_step(graph, experiment.objective, optimizer, key=jax.random.key(0), ema_decay=0.999)
        step = parallel.compile(at_precision(step, options.dtype))
        held = [parallel.replicate(first_state(params, optimizer, ema=True))]

        def once(held: list[Any] = held, step: Any = step, frozen: Any = frozen) -> None:
            held[0], _ = step(held[0], frozen, batch)
            jax.block_until_ready(held[0])

        things[name] = once
    print(lengths_text("captions", (tokens[..., 1:] > EOS).sum(-1)))
    rows = []
    for name, value in medians(things, options.rounds).items():
        rate = s["B"] * s["M"] / value
        rows.append(Row("decoders", f"step of {name}", options.dtype, 1e3 * value, rate))
        print(f"{name}: {parameters[name]:,} parameters, {1e3 * value:.0f} ms per step, {rate:.0f} captions/s")
    return rows
