"""Every search with every decoder, ensembles, attention maps and decoding settings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.degeneration import repeated_words
from imgcap_jax.models.decoders.adaptive import Adaptive
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.models.decoders.att2in import Att2in
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.run.generation import attention_function, caption_function, check_decoding
from imgcap_jax.special_tokens import BOS, EOS, PAD

B, N, D = 3, 4, 6
slow = pytest.mark.slow
WORDS = ("dog", "dogs", "a", "runs", "frisbee", "red", "with", "grass")
VOCABULARY = Vocabulary.build(WORDS, min_count=1)

SMALL: dict[str, Any] = {
    "show_tell": ShowTell(hidden_size=8, embedding_size=8),
    "attend": ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=8),
    "att2in": Att2in(hidden_size=8, embedding_size=8, attention_size=4, region_size=8),
    "adaptive": Adaptive(hidden_size=8, embedding_size=8, attention_size=4),
    "up_down": UpDown(hidden_size=8, embedding_size=8, attention_size=4),
    "aoa": AttentionOnAttention(hidden_size=8, embedding_size=8, heads=2, refining=1),
    "transformer": Transformer(hidden_size=8, embedding_size=8, heads=2, layers=2, feedforward_size=8, max_length=8),
}
SEARCHES = {
    "greedy": Decoding(beam=1, max_words=5, min_words=2),
    "beam": Decoding(beam=3, n_best=3, max_words=5),
    "diverse": Decoding(beam=4, groups=2, max_words=5, length_penalty="gnmt"),
    "constrained": Decoding(beam=2, must=("frisbee", "dog|dogs"), max_words=5),
    "samples": Decoding(samples=3, max_words=5, temperature=0.8, top_k=5),
}


def parts(kind: str, seed: int = 0, scale: float = 2.0) -> tuple[Any, Any, Any]:
    """A small model as (graph, params, frozen). Its large weights make the words depend on the input."""
    decoder = SMALL[kind].build(D, len(VOCABULARY), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, params, frozen = split_trained(CaptionModel(None, decoder))
    return graph, jax.tree.map(lambda leaf: scale * leaf, params), frozen


def regions(seed: int = 0) -> dict[str, np.ndarray]:
    return {"regions": np.random.default_rng(seed).normal(size=(B, N, D)).astype(np.float32)}


def own_log_probs(parts: tuple[Any, Any, Any], batch: Any, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [B,M,T,V] of the next words under teacher forcing, for captions without bos."""
    graph, params, frozen = parts
    model = nnx.merge(graph, params, frozen)
    read = np.concatenate([np.full_like(tokens[:, :, :1], BOS), tokens], axis=-1)
    outputs = model.teacher_forced({**batch, "tokens": jnp.asarray(read)})
    return np.asarray(jax.nn.log_softmax(model.score_words(outputs.hidden)))


def check_log_probs(decoded: Any, expected: np.ndarray) -> None:
    chosen = np.take_along_axis(expected, decoded.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(decoded.word_log_probs, np.where(decoded.tokens == PAD, 0, chosen), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["beam", "constrained", *(pytest.param(name, marks=slow) for name in ("greedy", "diverse", "samples"))]
)
@pytest.mark.parametrize("kind", SMALL)
def test_reported_log_probabilities_equal_those_of_teacher_forcing(kind: str, name: str) -> None:
    """They differ if the carry is not reordered together with the hypotheses."""
    graph, params, frozen = parts(kind)
    search = caption_function([graph], SEARCHES[name], VOCABULARY)
    decoded = jax.device_get(search([params], [frozen], [regions()]))
    check_log_probs(decoded, own_log_probs((graph, params, frozen), regions(), decoded.tokens))
    captions = [[VOCABULARY.decode(row).split() for row in image] for image in decoded.tokens]
    assert len({tuple(map(tuple, image)) for image in captions}) > 1, "captions do not depend on the image"
    if name == "constrained":
        for best, *_ in captions:
            assert "frisbee" in best
            assert {"dog", "dogs"} & set(best)


def test_ensemble_averages_the_probabilities_of_its_members() -> None:
    members = [parts("up_down", seed=1), parts("transformer", seed=2), parts("show_tell", seed=3)]
    batches = [regions(seed) for seed in (1, 2, 3)]  # each member has its own encoder
    graphs, params, frozen = (list(column) for column in zip(*members, strict=True))
    for decoding in (SEARCHES["beam"], SEARCHES["greedy"]):
        search = caption_function(graphs, decoding, VOCABULARY)
        decoded = jax.device_get(search(params, frozen, batches))
        probs = [
            np.exp(own_log_probs(member, batch, decoded.tokens)) for member, batch in zip(members, batches, strict=True)
        ]
        check_log_probs(decoded, np.log(np.mean(probs, axis=0)))


def test_greedy_ensemble_takes_the_word_of_highest_mean_probability() -> None:
    members = [parts("up_down", seed=1), parts("attend", seed=2)]
    graphs, params, frozen = (list(column) for column in zip(*members, strict=True))
    search = caption_function(graphs, Decoding(beam=1, max_words=4, suppress_unk=False), VOCABULARY)
    decoded = jax.device_get(search(params, frozen, [regions(), regions()]))
    probs = np.mean([np.exp(own_log_probs(member, regions(), decoded.tokens)) for member in members], axis=0)
    probs[..., [PAD, BOS]] = 0
    spoken = decoded.tokens != PAD
    np.testing.assert_array_equal(probs.argmax(-1)[spoken], decoded.tokens[spoken])


def test_attention_of_a_word_is_that_of_its_step() -> None:
    graph, params, frozen = parts("up_down")
    decoded = caption_function([graph], SEARCHES["greedy"], VOCABULARY)([params], [frozen], [regions()])
    maps = attention_function(graph)(params, frozen, regions(), decoded.tokens)
    decoder = nnx.merge(graph, params, frozen).decoder
    memory, carry = decoder.start(jnp.asarray(regions()["regions"]), 1, steps=decoded.tokens.shape[-1])
    token = jnp.full((B, 1), BOS)
    for t in range(decoded.tokens.shape[-1]):
        carry, output = decoder.step(carry, token, memory)
        np.testing.assert_allclose(maps[:, :, t], output.attention, atol=1e-5)
        token = decoded.tokens[:, :, t]
    assert attention_function(parts("show_tell")[0])(*parts("show_tell")[1:], regions(), decoded.tokens) is None


def test_samples_depend_on_the_row_of_an_image_and_the_seed() -> None:
    graph, params, frozen = parts("show_tell", scale=0.5)
    search = caption_function([graph], Decoding(samples=4, max_words=5), VOCABULARY)
    batch = {**regions(), "row": np.arange(B, dtype=np.int32)}
    whole = np.asarray(search([params], [frozen], [batch]).tokens)
    turned = {name: leaf[::-1] for name, leaf in batch.items()}
    np.testing.assert_array_equal(search([params], [frozen], [turned]).tokens[::-1], whole)
    other = caption_function([graph], Decoding(samples=4, max_words=5, seed=1), VOCABULARY)
    assert np.any(np.asarray(other([params], [frozen], [batch]).tokens) != whole)


def test_decoding_settings_take_effect() -> None:
    graph, params, frozen = parts("attend")

    def captions(**settings: Any) -> list[list[str]]:
        search = caption_function([graph], Decoding(**{"beam": 2, "n_best": 2, "max_words": 6, **settings}), VOCABULARY)
        tokens = np.asarray(search([params], [frozen], [regions()]).tokens)
        return [VOCABULARY.decode(row).split() for image in tokens for row in image if row.any()]

    assert all(caption[:2] == ["red", "dog"] for caption in captions(prefix="red dog"))
    assert all(len(caption) >= 5 for caption in captions(min_words=5))
    assert all(caption[-1:] not in (["a"], ["with"]) for caption in captions(forbid_bad_endings=True))
    assert all(len(set(caption)) == len(caption) for caption in captions(no_repeat_ngram=1))
    assert all(len(caption) <= 2 for caption in captions(max_words=2))
    for text in ("zebra", "red zebra"):
        with pytest.raises(UserError, match="lacks the word 'zebra'"):
            captions(prefix=text)
    with pytest.raises(UserError, match="is not a single word"):
        captions(must=("red dog",))
    with pytest.raises(UserError, match="prefix has 6 words"):
        captions(prefix="a a a a a a")


@pytest.mark.parametrize(
    "search",
    [
        pytest.param({"beam": 1}, marks=slow),
        {"beam": 3, "n_best": 3},
        {"samples": 4},
        pytest.param({"beam": 2, "must": ("frisbee",)}, marks=slow),
        pytest.param({"beam": 4, "groups": 2}, marks=slow),
    ],
    ids=str,
)
def test_no_search_repeats_words_if_they_are_forbidden(search: dict[str, Any]) -> None:
    """Of an ensemble, whose captions repeat words without the rule."""
    members = [parts("show_tell", seed=1, scale=6.0), parts("show_tell", seed=2, scale=6.0)]
    graphs, params, frozen = (list(column) for column in zip(*members, strict=True))

    def repeated(forbid: bool) -> int:
        settings = Decoding(max_words=8, min_words=8, forbid_repeated_words=forbid, **search)
        tokens = np.asarray(
            caption_function(graphs, settings, VOCABULARY)(params, frozen, [regions(), regions(1)]).tokens
        )
        return sum(repeated_words(VOCABULARY.decode_words(row)) for row in tokens.reshape(-1, 8))

    assert repeated(False) > 0
    assert repeated(True) == 0


def test_max_length_is_checked_before_decoding() -> None:
    settings = SMALL["transformer"]
    check_decoding(Decoding(max_words=8), VOCABULARY, settings)
    with pytest.raises(UserError, match=r"decoder.max_length is 8, but decoding.max_words needs 9 tokens"):
        check_decoding(Decoding(max_words=9), VOCABULARY, settings)
    check_decoding(Decoding(max_words=500), VOCABULARY, SMALL["attend"])
    graph, params, frozen = parts("transformer")
    tokens = np.full((B, 1, 20), EOS, np.int32)
    with pytest.raises(ValueError, match="max_length is 8"):
        nnx.merge(graph, params, frozen).teacher_forced({**regions(), "tokens": tokens})


@dataclasses.dataclass(frozen=True)
class OnlyDogs:
    """A custom rule: a caption of one given word."""

    word: int

    def __call__(self, logits: Any, tokens: Any, t: Any) -> Any:
        wanted = jnp.where(t == 0, self.word, EOS)
        return jnp.where(jnp.arange(logits.shape[-1]) == wanted, logits, -1e30)


def test_custom_rules_apply_in_every_search() -> None:
    graph, params, frozen = parts("attend")
    (dog,) = VOCABULARY.ids(["dog"])
    for name in ("greedy", "beam", "samples"):
        decoding = dataclasses.replace(SEARCHES[name], rules=(OnlyDogs(dog),), min_words=0, top_k=0)
        search = caption_function([graph], decoding, VOCABULARY)
        tokens = np.asarray(search([params], [frozen], [regions()]).tokens)
        assert {VOCABULARY.decode(row) for row in tokens[:, 0]} == {"dog"}
        assert "OnlyDogs" in decoding.title
    with pytest.raises(UserError, match="is not a rule"):
        Decoding(rules=("dog",))  # type: ignore[arg-type]
