"""Self-critical training, compared with the exact gradient of the expected reward over all possible captions."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.cider_device import document_frequencies, prepare_references, reference_norms
from imgcap_jax.metrics.degeneration import repeated_words
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.models.neighbours import Neighbours
from imgcap_jax.special_tokens import BOS, EOS, PAD
from imgcap_jax.text import tokenize
from imgcap_jax.training.neighbour_captions import captions_of_neighbours
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.self_critical import Constants, SelfCritical, self_critical_step
from imgcap_jax.training.step import TrainState, first_state

# Adam and clipping would hide a wrong factor of the gradient.
SGD = Optimizer("sgd", 1.0, schedule="constant", warmup_epochs=0, clip_norm=None).build(1, 1)
V, N, D, T = 6, 3, 5, 3  # words: unk, 4 and 5
CORPUS = [[[4, 5, EOS], [5, 5, 4, EOS]], [[4, 4, EOS]], [[3, 7, EOS], [8, EOS]]]
FREQUENCIES = document_frequencies(CORPUS, words=9)
REFERENCES = np.array([[4, 5, EOS, 0], [5, 5, 4, EOS]], np.int32)  # of the first image, [R,S]


def reading(decoder: Any, *, sharper: float = 1.0) -> Any:
    """Graph, parameters and frozen part of a model that reads regions [B,N,D]."""
    model = CaptionModel(None, decoder.build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(1)))
    graph, params, frozen = split_trained(model)
    return graph, jax.tree.map(lambda leaf: leaf * sharper, params), frozen


def small(dropout: float = 0.0, **options: Any) -> ShowAttendTell:
    sizes = {"hidden_size": 6, "embedding_size": 4, "attention_size": 4, "region_size": None}
    return ShowAttendTell(**sizes, dropout=dropout, **options)


def batch_of(images: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch that repeats the same image. Each row has its own samples."""
    regions = np.random.default_rng(seed).normal(size=(1, N, D)).astype(np.float32)
    return {
        "regions": np.repeat(regions, images, 0),
        "references": np.repeat(REFERENCES[None], images, 0),
        "reference_count": np.full(images, 2, np.float32),
        "weight": np.ones(images, np.float32),
        "row": np.arange(images, dtype=np.int32),
    }


def compiled(graph: Any, objective: SelfCritical, mode: Any = "pmap", devices: int = 1, **options: Any) -> Any:
    parallel = DataParallel(mode, jax.devices()[:devices])
    settings = {
        "key": jax.random.key(3),
        "max_words": T,
        "bad_endings": [4],
        "function_words": FunctionWords((4,)),
        **options,
    }
    return parallel, parallel.compile(self_critical_step(graph, objective, SGD, **settings))


def every_caption() -> np.ndarray:
    """All token sequences that can be sampled, [C,T]."""
    found = set()
    for tokens in itertools.product(range(2, V), repeat=T):
        end = tokens.index(EOS) + 1 if EOS in tokens else T
        found.add((*tokens[:end], *[PAD] * (T - end)))
    return np.array(sorted(found), np.int32)


def log_probs(graph: Any, params: Any, frozen: Any, regions: np.ndarray, captions: np.ndarray, tau: float) -> Any:
    """log p of each caption, by a plain computation. pad and bos are never sampled."""
    model = nnx.merge(graph, params, frozen)
    before = np.concatenate([np.full((len(captions), 1), BOS), captions], axis=1)[None]
    logits = model.score_words(model.teacher_forced({"regions": regions[:1], "tokens": before}).hidden)[0] / tau
    words = jax.nn.log_softmax(logits[:, :, EOS:], axis=-1)  # [C,T,V-2]
    chosen = jnp.take_along_axis(words, jnp.maximum(captions - EOS, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(captions != PAD, chosen, 0.0).sum(-1)


@dataclass(frozen=True)
class ByNumber:
    """A custom reward: ``single`` for one caption per image (such as the greedy one), else ``several``."""

    single: float
    several: float

    def __call__(self, tokens: Any, references: Any, frequencies: Any, /) -> Any:
        return jnp.full(tokens.shape[:2], self.single if tokens.shape[1] == 1 else self.several)


def test_known_norms_of_the_references_give_the_same_step() -> None:
    graph, params, frozen = reading(small(dropout=0.3), sharper=3.0)
    parallel, step = compiled(graph, SelfCritical(samples=3))
    batch = batch_of(4)
    norms = reference_norms(REFERENCES, FREQUENCIES)
    found = []
    for more in ({}, {"reference_norms": np.repeat(norms[None], 4, 0)}, {"reference_norms": np.ones((4, 2, 4), "f")}):
        state = parallel.replicate(first_state(jax.tree.map(jnp.copy, params), SGD, ema=False))
        constants = parallel.replicate(Constants(frozen, FREQUENCIES, None))
        state, metrics = step(state, constants, parallel.put({**batch, **more}))
        found.append((jax.device_get(state.params), float(metrics["reward"])))
    for own, other in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-7)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert found[0][1] != pytest.approx(found[2][1], rel=1e-3)  # the norms are read


# Captions [I,R,T] of training photos; the third photo has one caption, the others two. 6 and 7 are unknown words.
CAPTIONS = np.array([[[4, 5, 0], [4, 0, 0]], [[5, 0, 0], [5, 4, 6]], [[5, 4, 4], [0, 0, 0]], [[4, 4, 0], [7, 5, 0]]])


def indexed() -> tuple[Neighbours, list[list[int]]]:
    """An index of training photos, and the other photos in the order of their cosine with each."""
    rng = np.random.default_rng(5)
    queries, vectors = (rng.normal(size=(len(CAPTIONS), 3)).astype(np.float32) for _ in range(2))
    queries, vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, vectors))
    cosines = queries @ vectors.T
    order = [[other for other in np.argsort(-cosines[own]).tolist() if other != own] for own in range(len(CAPTIONS))]
    given = (vectors, queries, np.zeros(D, "f"), np.zeros((D, 3), "f"), CAPTIONS.astype(np.int32))
    return Neighbours(*map(jnp.asarray, given)), order


def nearest_references(order: list[int], count: int, eos: bool) -> list[list[int]]:
    """The captions of the first photos, by a plain computation."""
    texts = [[int(word) for word in text if word] for photo in order[:count] for text in CAPTIONS[photo]]
    return [text + [EOS] * eos for text in texts if text]


@pytest.mark.parametrize("eos", [True, False])
def test_captions_of_neighbours_are_those_of_the_nearest_other_photos(eos: bool) -> None:
    neighbours, order = indexed()
    found = captions_of_neighbours(neighbours, 2, FREQUENCIES, eos=eos).references(jnp.array([3, 0, 1, 2, 3]))
    for place, photo in enumerate([3, 0, 1, 2, 3]):
        texts = nearest_references(order[photo], 2, eos)
        assert [[word for word in row.tolist() if word] for row in found.tokens[place][: len(texts)]] == texts
        assert not found.tokens[place][len(texts) :].any()
        assert found.per_image[place] == len(texts)
    expected = prepare_references(found.tokens, found.per_image, FREQUENCIES)
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-6)
    with pytest.raises(UserError, match=r"neighbours is 4; it must be below the number of training photos, 4"):
        captions_of_neighbours(neighbours, 4, FREQUENCIES, eos=eos)


def test_reward_is_a_weighted_mean_of_the_own_references_and_those_of_the_neighbours() -> None:
    graph, params, frozen = reading(small(dropout=0.3), sharper=3.0)
    neighbours, order = indexed()
    number = np.array([2, 0, 3, 1], np.int32)
    captions = captions_of_neighbours(neighbours, 2, FREQUENCIES, eos=True)
    theirs = np.zeros((4, 4, T + 1), np.int32)
    for place, photo in enumerate(number):
        for row, text in enumerate(nearest_references(order[photo], 2, eos=True)):
            theirs[place, row, : len(text)] = text
    as_own = {"references": theirs, "reference_count": theirs.any(-1).sum(-1).astype(np.float32)}
    batch = {**batch_of(4), "number": number}

    def reward(objective: SelfCritical, batch: dict[str, np.ndarray]) -> float:
        parallel, step = compiled(graph, objective)
        state = parallel.replicate(first_state(jax.tree.map(jnp.copy, params), SGD, ema=False))
        constants = parallel.replicate(Constants(frozen, FREQUENCIES, None, captions if objective.neighbours else None))
        return float(step(state, constants, parallel.put(batch))[1]["reward"])

    own, others = (reward(SelfCritical(samples=8), one) for one in (batch, {**batch, **as_own}))
    assert abs(own - others) > 0.1
    mixed = reward(SelfCritical(samples=8, neighbours=2, neighbours_weight=0.3), batch)
    assert mixed == pytest.approx(0.7 * own + 0.3 * others, rel=1e-5)


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(SelfCritical(samples=4), id="mean", marks=_SLOW),
        pytest.param(SelfCritical(samples=1, baseline="greedy"), id="greedy", marks=_SLOW),
        pytest.param(
            SelfCritical(samples=3, baseline="greedy", cider=0.5, bleu=2.0, reward_eos=False, temperature=1.7),
            id="mixture",
            marks=_SLOW,
        ),
        pytest.param(SelfCritical(samples=3, temperature=0.7, repetition=0.6, entropy=0.8, kl=0.9), id="penalties"),
    ],
)
def test_mean_gradient_equals_the_gradient_of_the_expected_reward(objective: SelfCritical) -> None:
    """Each component agrees within its standard error, and the projection on the exact gradient within 6 %."""
    graph, params, frozen = reading(small())
    _, start, _ = reading(small(), sharper=2.0)
    batch, captions = batch_of(512), every_caption()
    corpus = CORPUS if objective.reward_eos else [[text[:-1] for text in texts] for texts in CORPUS]
    frequencies = document_frequencies(corpus, words=9)
    if not objective.reward_eos:
        batch["references"] = np.where(batch["references"] == EOS, PAD, batch["references"])
    references = prepare_references(
        jnp.asarray(batch["references"][:1]), jnp.asarray(batch["reference_count"][:1]), frequencies
    )
    # Word 4 is the only function word.
    repeated = np.array(
        [repeated_words(["a" if word == 4 else str(word) for word in row if word > EOS]) for row in captions]
    )
    reward = objective.rewards(captions[None], references, frequencies)[0] - objective.repetition * repeated  # [C]
    before = log_probs(graph, start, frozen, batch["regions"], captions, objective.temperature)

    def expected(params: Any) -> Any:
        log_p = log_probs(graph, params, frozen, batch["regions"], captions, objective.temperature)
        gain = reward - objective.entropy * log_p - objective.kl * (log_p - before)
        return (jnp.exp(log_p) * gain).sum(), jnp.exp(log_p)

    exact, probabilities = jax.grad(expected, has_aux=True)(params)
    assert len(captions) == 40
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-5)
    assert float((probabilities * (reward > 0)).sum()) > 0.1  # the reward is not 0 everywhere

    parallel, step = compiled(graph, objective)
    constants = Constants(frozen, frequencies, start if objective.kl else None)
    on_device, estimates = parallel.put(batch), []
    metrics: list[dict[str, float]] = []
    for number in range(48):
        state = first_state(jax.tree.map(jnp.copy, params), SGD, ema=False).replace(step=jnp.int32(number))
        after, measured = step(parallel.replicate(state), constants, on_device)
        estimates.append(
            np.concatenate(
                [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (after.params, params)), strict=True)]
            )
        )
        metrics.append({name: float(value) for name, value in measured.items()})
    wanted = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(exact)])
    found = np.stack(estimates)
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - wanted) < 5 * error + 1e-5).all()
    along = found @ wanted / (wanted @ wanted)
    assert along.std(ddof=1) / np.sqrt(len(along)) < 0.02
    assert abs(along.mean() - 1) < 0.06
    mean = {name: np.mean([one[name] for one in metrics]) for name in metrics[0]}
    p = np.asarray(probabilities)
    np.testing.assert_allclose(mean["reward"], p @ np.asarray(reward), rtol=0.03)
    np.testing.assert_allclose(
        mean["reward_deviation"], np.sqrt(p @ np.asarray(reward) ** 2 - (p @ np.asarray(reward)) ** 2), rtol=0.03
    )
    np.testing.assert_allclose(mean["surprisal"], -p @ np.log(p), rtol=0.03)
    words = ((captions != PAD) & (captions != EOS)).sum(1)
    np.testing.assert_allclose(mean["length"], p @ words, rtol=0.03)
    np.testing.assert_allclose(mean["ended"], p @ (captions == EOS).any(1), rtol=0.03)
    last = np.where(words > 0, captions[np.arange(len(captions)), np.maximum(words - 1, 0)], 0)
    np.testing.assert_allclose(mean["bad_endings"], p @ (last == 4), rtol=0.05)
    np.testing.assert_allclose(mean["repeated_words"], p @ (repeated > 0), rtol=0.05)
    if objective.kl:
        np.testing.assert_allclose(mean["kl"], p @ (np.log(p) - np.asarray(before)), rtol=0.05)


@pytest.mark.parametrize("baseline", ["mean", pytest.param("greedy", marks=_SLOW)])
def test_constant_reward_has_no_gradient(baseline: Any) -> None:
    graph, params, frozen = reading(small(dropout=0.5))
    objective = SelfCritical(samples=3, baseline=baseline, cider=0.0, reward=ByNumber(0.7, 0.7))
    parallel, step = compiled(graph, objective)
    state = parallel.replicate(first_state(jax.tree.map(jnp.copy, params), SGD, ema=False))
    after, metrics = step(state, Constants(frozen, FREQUENCIES, None), parallel.put(batch_of(4)))
    assert float(metrics["gradient_norm"]) == 0.0
    np.testing.assert_allclose(metrics["reward"], 0.7, rtol=1e-6)
    for new, old in zip(*map(jax.tree.leaves, (after.params, params)), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    "decoder",
    [
        pytest.param(small(dropout=0.5), id="attend", marks=_SLOW),
        pytest.param(small(dropout=0.5, variational_dropout=True), id="variational"),
        pytest.param(
            Transformer(
                hidden_size=8, embedding_size=8, feedforward_size=8, heads=2, layers=1, dropout=0.3, max_length=8
            ),
            id="transformer",
        ),
        pytest.param(
            AttentionOnAttention(hidden_size=8, embedding_size=8, heads=2, refining=1, dropout=0.3),
            id="aoa",
            marks=_SLOW,
        ),
    ],
)
def test_loss_equals_the_log_probability_under_which_captions_were_sampled(decoder: Any) -> None:
    """Stepping and teacher forcing give a caption the same probability, dropout and temperature included."""
    graph, params, frozen = reading(decoder, sharper=1.5)
    # Every sample has an advantage of 1, so that the loss is the mean surprisal.
    objective = SelfCritical(samples=3, baseline="greedy", temperature=0.8, cider=0.0, reward=ByNumber(0.0, 1.0))
    parallel, step = compiled(graph, objective)
    state = parallel.replicate(first_state(params, SGD, ema=False))
    _, metrics = step(state, Constants(frozen, FREQUENCIES, None), parallel.put(batch_of(16)))
    np.testing.assert_allclose(metrics["loss"], metrics["surprisal"], rtol=1e-5)
    assert metrics["loss"] > 1


def seeing() -> Any:
    """A model with a trained encoder, which reads images."""
    rngs = nnx.Rngs(0)
    encoder = SmallCNN(widths=(8, 8), blocks=(0, 0)).build(16, dtype=jnp.float32, rngs=rngs)
    decoder = small(dropout=0.5).build(encoder.region_size, V, dtype=jnp.float32, rngs=rngs)
    return split_trained(CaptionModel(encoder, decoder))


def images(count: int) -> dict[str, np.ndarray]:
    batch = batch_of(count)
    del batch["regions"]
    batch["image"] = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    batch["weight"][-1] = 0
    batch["reference_count"][-1] = 0
    batch["references"][-1] = PAD
    return batch


FULL = SelfCritical(samples=3, baseline="greedy", entropy=0.1, kl=0.1, bleu=0.5)


@pytest.fixture(scope="module")
def stepped() -> Callable[..., Any]:
    graph, params, frozen = seeing()

    def run(mode: str, devices: int, accumulate: int = 1, steps: int = 3) -> Any:
        parallel, step = compiled(graph, FULL, mode, devices, accumulate=accumulate, ema_decay=0.9)
        state = parallel.replicate(first_state(jax.tree.map(jnp.copy, params), SGD, ema=True))
        constants = parallel.replicate(Constants(frozen, FREQUENCIES, jax.tree.map(jnp.copy, params)))
        for _ in range(steps):
            state, metrics = step(state, constants, parallel.put(images(8)))
        return jax.device_get(state), jax.device_get(metrics)

    return run


@pytest.mark.parametrize(
    ("mode", "devices", "accumulate"), [("pmap", 4, 1), pytest.param("shard_map", 2, 2, marks=_SLOW)]
)
def test_parameters_do_not_depend_on_the_number_of_devices(
    stepped: Callable[..., Any], mode: str, devices: int, accumulate: int
) -> None:
    (expected, alone), (got, metrics) = stepped("pmap", 1), stepped(mode, devices, accumulate)
    for name, value in alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert alone["captions"] == 21  # the padding row does not count
    _, params, _ = seeing()
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (expected.params, params)), strict=True)]
    assert min(moved) > 0  # the encoder too


@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=_SLOW)])
def test_step_is_compiled_once_and_never_leaves_the_device(mode: Any, compilations: list[str]) -> None:
    graph, params, frozen = seeing()
    parallel, step = compiled(graph, FULL, mode, 2)
    constants = parallel.replicate(Constants(frozen, FREQUENCIES, jax.tree.map(jnp.copy, params)))
    state = parallel.replicate(first_state(params, SGD, ema=False))
    _, whole = compiled(graph, FULL, "shard_map", 2)
    traced = jax.jit(whole).trace(state, constants, images(8))
    assert "callback" not in str(traced.jaxpr)
    text = traced.lower().compile().as_text()
    for word in ("callback", "infeed", "outfeed", "host"):
        assert word not in text.lower().replace(jax.devices()[0].platform, ""), word
    on_devices = [parallel.put(images(8)) for _ in range(3)]
    compilations.clear()
    state, _ = step(state, constants, on_devices[0])
    assert compilations  # the listener works
    compilations.clear()
    with jax.transfer_guard("disallow"):
        for batch in on_devices[1:]:
            state, _ = step(state, constants, batch)
    assert not compilations
    assert isinstance(state, TrainState)


def test_invalid_settings_are_an_error() -> None:
    for wrong, said in (
        ({"samples": 1}, "at least 2"),
        ({"samples": 1, "baseline": "greedy", "kl": 0.1}, "at least 2"),
        ({"cider": 0.0}, "cider and bleu are both 0"),
        ({"entropy": -1.0}, "finite and not negative"),
        ({"kl": float("nan")}, "finite and not negative"),
        ({"repetition": -0.5}, "finite and not negative"),
        ({"temperature": 0.0}, "at least 0.01"),
        ({"baseline": "other"}, "mean or greedy"),
        ({"neighbours_weight": 0.3}, "no effect without objective.neighbours"),
        ({"neighbours": 5, "neighbours_weight": 0.0}, "must be above 0"),
    ):
        with pytest.raises(UserError, match=said):
            SelfCritical(**wrong)  # type: ignore[arg-type]


def test_penalty_for_repeated_words_needs_english_words() -> None:
    setup: Any = SimpleNamespace(references=object(), vocabulary=Vocabulary.build(["狗 跑"], min_count=1))
    with pytest.raises(UserError, match=r"objective\.repetition has no effect"):
        SelfCritical(repetition=0.1).make_step(setup)


def test_title_is_a_sacreeos_signature() -> None:
    """The two most common ones of https://github.com/jchenghu/sacreeos, one with a greedy baseline, and others."""
    assert SelfCritical().title == "self-critical, STANDARD_wInit+Cider-D[n4,s6.0]+average[nspi5]+1.0.0"
    assert SelfCritical(reward_eos=False).title.endswith("NO<EOS>_wInit+Cider-D[n4,s6.0]+average[nspi5]+1.0.0")
    assert "greedy[nspi1]" in SelfCritical(samples=1, baseline="greedy").title
    assert SelfCritical(temperature=0.6, kl=0.1).title.endswith("+1.0.0, temperature 0.6, kl 0.1")
    assert SelfCritical(repetition=0.5).title.endswith("+1.0.0, repetition 0.5")
    assert "+0.5*BLEU[n4]+" in SelfCritical(cider=0, bleu=0.5).title


class RealCaptions:
    """A ``CaptionSource`` of Flickr8k's captions."""

    def __init__(self, images: list[list[str]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def captions(self, i: int) -> list[str]:
        return self.images[i]


@pytest.mark.parametrize("eos", [True, False])
def test_reward_of_real_captions_equals_the_official_score_of_their_text(eos: bool, shared: Path) -> None:
    """From text to reward, with candidates in which rare words are unk."""
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    images = [[text["raw"] for text in image["sentences"]] for image in karpathy["images"][:300]]
    vocabulary = Vocabulary.build((text for texts in images for text in texts), min_count=3)
    table = CaptionTable.as_references([RealCaptions(images)], vocabulary, eos=eos)  # type: ignore[list-item]
    assert table.words > len(vocabulary) + 100
    # The candidates of an image: a caption of the next image, one of its own captions cut short, and an empty one.
    others = images[1:] + images[:1]
    said = np.zeros((len(images), 3, 16), np.int32)
    for row, (own, other) in enumerate(zip(images, others, strict=True)):
        said[row, 0] = vocabulary.encode(other[0], 17)[1:]
        said[row, 1, :6] = vocabulary.encode(own[1], 7)[1:]
        said[row, 2, 0] = EOS

    def text(tokens: list[int]) -> str:
        words = [vocabulary.words[number] if number != EOS else "endofcaption" for number in tokens if number != PAD]
        return " ".join(word for word in words if eos or word != "endofcaption")

    numbers = np.arange(len(images))
    tokens, count = table.read(table.first_rows(numbers, table.most)), jnp.array(table.counts(numbers))
    objective, frequencies = SelfCritical(reward_eos=eos), document_frequencies(list(table.captions()), table.words)
    found = jax.jit(lambda said: objective.rewards(said, prepare_references(tokens, count, frequencies), frequencies))(
        said
    )
    ended = [[" ".join([*tokenize(caption), *(["endofcaption"] * eos)]) for caption in texts] for texts in images]
    scorer = CaptionScorer(dict(enumerate(ended)))
    for m in range(3):
        candidates = {row: text(tokens) for row, tokens in enumerate(said[:, m].tolist())}
        expected = list(scorer.score(candidates).per_image["CIDEr-D"].values())
        np.testing.assert_allclose(found[:, m], expected, atol=1e-5)
        if find_spec("pycocoevalcap"):
            from pycocoevalcap.cider.cider import Cider

            theirs = Cider().compute_score(dict(enumerate(ended)), {row: [text] for row, text in candidates.items()})[1]
            np.testing.assert_allclose(found[:, m], theirs, atol=1e-5)
    assert np.asarray(found).max(0)[1] > 3
