"""Speed of self-critical training: the whole step, the share of the reward, the reward on the host, and PyTorch.

Functions import imgcap_jax themselves, because ``--before`` builds the same candidates with another checkout of it.
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_decoders import built_decoder, products, rows_of, torch_decoder, torch_module
from checkouts import of_each_checkout
from jax import Array
from measuring import (
    EOS,
    FIRST_WORD,
    PACKAGE,
    PAD,
    WORDS,
    Row,
    Thing,
    at_precision,
    caption_lengths,
    chosen_lengths,
    decoder_sizes,
    lengths_text,
    print_ratios,
    regions_of,
    times_and_rate,
    word_counts,
)

REFERENCES = 5  # per image
CORPUS = 20_000  # images for the document frequencies
WHOLE, FREE = "step", "step without a reward"

RewardOf = Callable[[Any], Callable[..., Any] | None]
"""The settings of self-critical training -> the reward that is added, if there is one."""


def random_references(images: int, vocabulary: int, seed: int) -> list[list[list[int]]]:
    """Random captions with eos, with the lengths of real captions and Zipf's word frequencies."""
    rng = np.random.default_rng(seed)
    rank = np.arange(1, vocabulary - FIRST_WORD + 1)
    odds = 1 / rank / (1 / rank).sum()
    lengths = word_counts((images, REFERENCES), "captions", seed=seed)
    words = iter((FIRST_WORD + rng.choice(len(rank), lengths.sum(), p=odds)).tolist())
    return [[[*(next(words) for _ in range(length)), EOS] for length in row] for row in lengths]


def padded_references(images: list[list[list[int]]]) -> np.ndarray:
    """The captions of each image, int32 [B,R,S], padded with pad."""
    longest = max(len(caption) for captions in images for caption in captions)
    return np.array(
        [[caption + [PAD] * (longest - len(caption)) for caption in of] for of in images],
        np.int32,
    )


def _on_host(references: list[list[list[int]]]) -> Callable[[np.ndarray], np.ndarray]:
    """A function that computes the CIDEr-D of tokens [B,M,T] with pycocoevalcap, from strings.

    Its document frequencies are counted at the first call and kept.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    texts = [[" ".join(map(str, caption)) for caption in captions] for captions in references]

    def score(tokens: np.ndarray) -> np.ndarray:
        scorer = CiderScorer(n=4, sigma=6.0)
        for samples, of_image in zip(tokens.tolist(), texts, strict=True):
            for sample in samples:
                scorer += (
                    " ".join(str(word) for word in sample if word != PAD),
                    of_image,
                )
        if frequencies:
            scorer.document_frequency = frequencies[0]
        else:  # counted once, because training code reads them from a file; each sample counts as one image
            scorer.compute_doc_freq()
            frequencies.append(scorer.document_frequency)
        return np.array(scorer.compute_cider(), np.float32).reshape(tokens.shape[:2])

    frequencies: list[Any] = []
    return score


def _ending(decoder: Any) -> Any:
    """A decoder that ends each caption after a given number of words.

    The numbers are read from the first features of the image's first region: regions[:, 0, :M].
    """
    from imgcap_jax.models.decoders.contract import Decoder

    class Ending(Decoder):
        """The carry also contains the number of words before eos. The hidden vector also contains the bias of eos."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.rate, self.variational = (
                inner,
                inner.rate,
                inner.variational,
            )

        def start(self, regions: Array, M: int, **options: Any) -> Any:
            memory, carry = self.inner.start(regions, M, **options)
            return memory, (carry, regions[:, 0, :M].astype(jnp.int32))

        def step(self, carry: Any, token: Array, memory: Any, **options: Any) -> Any:
            inner, left = carry
            inner, output = self.inner.step(inner, token, memory, **options)
            bias = jnp.where(left == 0, 1e4, -1e4)[..., None].astype(output.hidden.dtype)
            return (inner, left - 1), output._replace(hidden=jnp.concatenate([output.hidden, bias], axis=-1))

        def logits(self, output: Any) -> Array:
            logits = self.inner.logits(output._replace(hidden=output.hidden[..., :-1]))
            bias = jax.lax.stop_gradient(output.hidden[..., -1:])
            return logits + jnp.where(jnp.arange(logits.shape[-1]) == EOS, bias, 0)

    return Ending(decoder)


def _regions(s: Mapping[str, int], words: np.ndarray) -> np.ndarray:
    """Random regions that contain the numbers of words [B,M] where ``_ending`` reads them."""
    regions = regions_of(s)
    regions[:, 0, : s["M"]] = words
    return regions


def _steps(
    options: argparse.Namespace,
    s: Mapping[str, int],
    images: list[list[list[int]]],
    others: list[list[list[int]]],
    words: Mapping[str, np.ndarray],
    rewards: Mapping[str, RewardOf],
) -> dict[str, Thing]:
    """Steps of imgcap_jax with each reward, for each kind of lengths. Those of one reward share a compiled step.

    Captions of random weights have a reward of 0, and a batch without advantages has no gradient. Therefore the sum of
    the token ids is added to the reward of each caption, on all sides.
    """
    from imgcap_jax.metrics.cider_device import document_frequencies
    from imgcap_jax.metrics.degeneration_device import FunctionWords
    from imgcap_jax.models.model import CaptionModel, split_trained
    from imgcap_jax.training.optimizer import Optimizer
    from imgcap_jax.training.parallel import DataParallel
    from imgcap_jax.training.self_critical import (
        Constants,
        SelfCritical,
        self_critical_step,
    )
    from imgcap_jax.training.step import first_state

    graph, params, frozen = split_trained(CaptionModel(None, _ending(built_decoder(options, s))))
    optimizer = Optimizer("adam", 1e-6).build(100, 1000)
    objective = SelfCritical(samples=s["M"])
    parallel = DataParallel()
    frequencies = parallel.replicate(document_frequencies([*images, *others], s["V"]))
    given = {
        "references": padded_references(images),
        "reference_count": np.full(s["B"], REFERENCES, np.float32),
    }
    things: dict[str, Thing] = {}
    for name, reward_of in rewards.items():
        reward = reward_of(objective)

        def with_ids(tokens: Array, *rest: Any, reward: Any = reward) -> Array:
            ids = tokens.sum(-1).astype(jnp.float32)
            return ids if reward is None else ids + reward(tokens, *rest)

        step = parallel.compile(
            at_precision(
                self_critical_step(
                    graph,
                    objective,
                    optimizer,
                    key=jax.random.key(0),
                    max_words=WORDS,
                    bad_endings=range(4, 44),
                    function_words=FunctionWords(tuple(range(4, 144)), (4, 5, 6)),
                    rewards=with_ids,
                ),
                options.dtype,
            )
        )
        held = [parallel.replicate(first_state(jax.tree.map(jnp.copy, params), optimizer, ema=False))]

        def once(batch: Any, length: float, held: list[Any] = held, step: Any = step) -> None:
            held[0], metrics = step(held[0], Constants(frozen, frequencies, None), batch)
            assert abs(float(metrics["length"]) - length) < 1e-3, "captions have other lengths than drawn"
            jax.block_until_ready(held[0])

        for lengths, counts in words.items():
            batch = parallel.put(rows_of(s) | given | {"regions": _regions(s, counts)})
            things[f"{name}, {lengths}"] = partial(once, batch, counts.mean())
    return things


def _reward_alone(images: list[list[list[int]]], others: list[list[list[int]]], s: Mapping[str, int]) -> Any:
    """The jitted reward of tokens [B,M,T], with document frequencies of all images."""
    from imgcap_jax.metrics.cider_device import document_frequencies, prepare_references
    from imgcap_jax.training.self_critical import SelfCritical

    objective = SelfCritical(samples=s["M"])
    given, count = jnp.asarray(padded_references(images)), jnp.full(s["B"], REFERENCES, jnp.float32)
    reward = jax.jit(
        lambda tokens, frequencies: objective.rewards(
            tokens, prepare_references(given, count, frequencies), frequencies
        )
    )
    frequencies = document_frequencies([*images, *others], s["V"])
    return lambda tokens: jax.block_until_ready(reward(tokens, frequencies))


def self_critical_benchmark(options: argparse.Namespace) -> list[Row]:
    """Times the step with its own reward, without a reward, with the official tools on the host, and in PyTorch."""
    s = decoder_sizes(options, batch=50)
    images, others = random_references(s["B"], s["V"], seed=1), random_references(CORPUS, s["V"], seed=2)
    words = {lengths: word_counts((s["B"], s["M"]), lengths) for lengths in chosen_lengths(options)}
    build = partial(_steps, options, s, images, others, words)
    rewards: dict[str, RewardOf] = {WHOLE: lambda objective: objective.rewards, FREE: lambda objective: None}
    things, first = of_each_checkout(options, lambda: build(rewards))
    if (module := torch_module(options)) is not None:
        import torch

        decoder = torch_decoder(module, options, s)
        adam = torch.optim.Adam(decoder.parameters(), lr=1e-6)
        for lengths, counts in words.items():
            theirs = module.tensor(_regions(s, counts)).float(), module.tensor(counts).long(), WORDS
            step = partial(module.self_critical_step, decoder, adam, *theirs)
            things["PyTorch", f"{FREE}, {lengths}"] = module.timed(step, options.dtype)
    tokens = np.random.default_rng(0).integers(FIRST_WORD, s["V"], (s["B"], s["M"], WORDS)).astype(np.int32)
    alone = _reward_alone(images, others, s)
    things["reward alone", ""] = partial(alone, jnp.asarray(tokens))
    if importlib.util.find_spec("pycocoevalcap") is None:
        print("pycocoevalcap is not installed; the comparison is skipped")
    elif len(jax.devices()) > 1:
        print("the reward on the host is compared on one device only; the comparison is skipped")
    else:
        host = _on_host(images)
        own = _reward_alone(images, [], s)(padded_references(images))
        largest = np.abs(host(padded_references(images)) - own).max()
        print(f"largest difference between device and host rewards: {largest:.1e}")

        def by_host(tokens: Array, *_: Any) -> Array:
            shape = jax.ShapeDtypeStruct(tokens.shape[:2], jnp.float32)
            return jax.pure_callback(lambda tokens: host(np.asarray(tokens)), shape, tokens)

        for row, thing in build({WHOLE: lambda objective: by_host}).items():
            things["imgcap_jax with the reward of pycocoevalcap on the host", row] = thing
        things["reward of pycocoevalcap alone", ""] = partial(host, tokens)
    found, plain = times_and_rate(things, options)
    print(
        f"{options.decoder}, {s['B']} images x {s['M']} samples, N={s['N']}, V={s['V']}, document frequencies of "
        f"{CORPUS + s['B']} images; plain matmul rate between the steps: {plain / 1e9:.1f} GFLOP/s ({options.dtype})"
    )
    rows = []
    for lengths, counts in words.items():
        print(lengths_text(lengths, counts))
        of_decoder = products(options.decoder, s)
        read = int((counts + 1).clip(max=WORDS).sum())
        flops = of_decoder.training(s["B"], read)  # the samples are drawn by the same products
        whole = found[PACKAGE, f"{WHOLE}, {lengths}"].wall
        for name in (WHOLE, FREE):
            row = f"{name}, {lengths}"
            for (side, of), time in found.items():
                if of == row:
                    rate, share = s["B"] * s["M"] / time.wall, time.wall / whole
                    rows.append(
                        Row(
                            "scst",
                            f"{name}, {caption_lengths(lengths)}, {side}",
                            options.dtype,
                            1e3 * time.wall,
                            rate,
                            flops / 1e9,
                            flops / time.wall / plain,
                            first.get((side, of)),
                        )
                    )
                    print(f"  {name}, {side}: {1e3 * time.wall:.1f} ms, {share:.3f} of the step, {rate:.1f} captions/s")
            print_ratios(found, row, f"{name}, ")
    for (side, row), time in found.items():
        if not row:
            print(f"{side}, captions of {WORDS} words: {1e3 * time.wall:.1f} ms")
            rows.append(Row("scst", f"{side}, full length", options.dtype, 1e3 * time.wall))
    return rows
