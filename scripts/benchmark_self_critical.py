"""Speed of self-critical training: the whole step, the share of the reward, and the reward computed on the host."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_decoders import DECODERS, regions_of
from flax import nnx
from measuring import Thing, decoder_sizes, matmul, medians

from imgcap_jax.metrics.cider_device import document_frequencies, prepare_references
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.special_tokens import EOS, PAD
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.self_critical import Constants, Reward, SelfCritical, self_critical_step
from imgcap_jax.training.step import first_state

WORDS, REFERENCES = 20, 5  # maximum words per sample; references per image
CORPUS = 20_000  # images for the document frequencies


def _corpus(images: int, vocabulary: int, seed: int) -> list[list[list[int]]]:
    """Random captions with eos, with the lengths of COCO captions and Zipf's word frequencies."""
    rng = np.random.default_rng(seed)
    rank = np.arange(1, vocabulary - 3)
    odds = 1 / rank / (1 / rank).sum()
    lengths = np.clip(rng.normal(10.5, 2.4, (images, REFERENCES)).round(), 6, 20).astype(int)
    words = iter((4 + rng.choice(len(rank), lengths.sum(), p=odds)).tolist())
    return [[[*(next(words) for _ in range(length)), EOS] for length in row] for row in lengths]


def _padded(images: list[list[list[int]]]) -> np.ndarray:
    longest = max(len(caption) for captions in images for caption in captions)
    return np.array([[caption + [PAD] * (longest - len(caption)) for caption in of] for of in images], np.int32)


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
                scorer += (" ".join(str(word) for word in sample if word != PAD), of_image)
        if frequencies:
            scorer.document_frequency = frequencies[0]
        else:  # counted once, because training code reads them from a file; each sample counts as one image
            scorer.compute_doc_freq()
            frequencies.append(scorer.document_frequency)
        return np.array(scorer.compute_cider(), np.float32).reshape(tokens.shape[:2])

    frequencies: list[Any] = []
    return score


def self_critical_benchmark(options: argparse.Namespace) -> None:
    """Times the step with its own reward, without a reward, and with the official tools on the host, interleaved."""
    s = decoder_sizes(options, batch=50)
    config = DECODERS[options.decoder]
    decoder = config.build(s["D"], s["V"], dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))
    graph, params, frozen = split_trained(CaptionModel(None, decoder))
    optimizer = Optimizer("adam", 1e-6).build(100, 1000)
    objective = SelfCritical(samples=s["M"])
    images = _corpus(s["B"], s["V"], seed=1)
    parallel = DataParallel()
    batch = parallel.put(
        {
            "regions": regions_of(s),
            "references": _padded(images),
            "reference_count": np.full(s["B"], REFERENCES, np.float32),
            "weight": np.ones(s["B"], np.float32),
            "row": np.arange(s["B"], dtype=np.int32),
        }
    )
    frequencies = parallel.replicate(document_frequencies([*images, *_corpus(CORPUS, s["V"], seed=2)], s["V"]))

    def step_with(reward: Reward | None) -> Thing:
        """A step with this reward.

        Captions of random weights have a reward of 0, and a batch without advantages has no gradient. Therefore a
        different number is added to the reward of each caption, in all steps.
        """

        def rewards(tokens: jax.Array, *rest: Any) -> jax.Array:
            unequal = tokens.sum(-1).astype(jnp.float32)
            return unequal if reward is None else unequal + reward(tokens, *rest)

        step = parallel.compile(
            self_critical_step(
                graph,
                objective,
                optimizer,
                key=jax.random.key(0),
                max_words=WORDS,
                bad_endings=range(4, 44),
                function_words=FunctionWords(tuple(range(4, 144)), (4, 5, 6)),
                rewards=rewards,
            )
        )
        held = [parallel.replicate(first_state(jax.tree.map(jnp.copy, params), optimizer, ema=False))]

        def once() -> None:
            held[0], _ = step(held[0], Constants(frozen, frequencies, None), batch)
            jax.block_until_ready(held[0])

        return once

    tokens = jnp.asarray(np.random.default_rng(0).integers(4, s["V"], (s["B"], s["M"], WORDS)), jnp.int32)
    reward = jax.jit(
        lambda tokens, given, count, frequencies: objective.rewards(
            tokens, prepare_references(given, count, frequencies), frequencies
        )
    )
    given = jnp.asarray(_padded(images)), jnp.full(s["B"], REFERENCES, jnp.float32)
    product, flops = matmul(options.dtype)
    things: dict[str, Thing] = {
        "step": step_with(objective.rewards),
        "step without a reward": step_with(None),
        "reward alone": lambda: jax.block_until_ready(reward(tokens, *given, frequencies)),
        "matmul": product,
    }
    if importlib.util.find_spec("pycocoevalcap") is None:
        print("pycocoevalcap is not installed; the comparison is skipped")
    else:
        host = _on_host(images)
        own = reward(jnp.asarray(_padded(images)), *given, document_frequencies(images, s["V"]))
        print(f"largest difference between device and host rewards: {np.abs(host(_padded(images)) - own).max():.1e}")

        def by_host(tokens: jax.Array, *_: Any) -> jax.Array:
            shape = jax.ShapeDtypeStruct(tokens.shape[:2], jnp.float32)
            return jax.pure_callback(lambda tokens: host(np.asarray(tokens)), shape, tokens)

        things["step with the reward of pycocoevalcap on the host"] = step_with(by_host)
        things["reward of pycocoevalcap alone"] = lambda: host(np.asarray(tokens))
    seconds = medians(things, options.rounds)
    plain = flops / seconds.pop("matmul")
    print(
        f"{options.decoder}, {s['B']} images x {s['M']} samples of {WORDS} words, N={s['N']}, V={s['V']}, document "
        f"frequencies of {CORPUS + s['B']} images; plain matmul rate {plain / 1e9:.0f} GFLOP/s"
    )
    for name, value in seconds.items():
        print(f"{name}: {1e3 * value:.1f} ms, {value / seconds['step']:.3f} of the step")
    print(f"{s['B'] * s['M'] / seconds['step']:.1f} captions/s")
