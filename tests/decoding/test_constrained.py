"""Constrained beam search, compared with all possible captions and with a reference search over lists."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import imgcap_jax.decoding.search as search_module
from imgcap_jax.decoding import Decoded, NoRepeatNgram, constrained_beam_search, constrained_rows
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

IMAGES, STEPS, VOCABULARY = 3, 4, 6
SPOKEN = tuple(w for w in range(VOCABULARY) if w not in (PAD, BOS))

Words = tuple[tuple[int, ...], ...]


@functools.cache
def search(toy: Any, beam: int, words: Words, norm: float = 0.7, steps: int = STEPS, rules: Any = ()) -> Any:
    @jax.jit
    def run(parameters: Any) -> Decoded:
        carry = toy.start(parameters, constrained_rows(beam, words))
        step = functools.partial(toy.step, parameters)
        return constrained_beam_search(
            step, carry, beam=beam, words=words, max_steps=steps, length_norm=norm, rules=rules
        )

    return lambda parameters: jax.device_get(run(parameters))


def captions(decoded: Decoded, image: int) -> list[tuple[int, ...]]:
    return [tuple(int(w) for w in row if w != PAD) for row in np.asarray(decoded.tokens[image]) if row.any()]


def satisfied(caption: tuple[int, ...], words: Words) -> bool:
    return all(set(forms) & set(caption) for forms in words)


def exhaustive(toy: Any, parameters: Any, image: int, words: Words, norm: float) -> list[Any]:
    """All captions that contain the words, with their scores, best first."""
    inner = [w for w in SPOKEN if w != EOS]
    every = [(*p, EOS) for n in range(STEPS) for p in itertools.product(inner, repeat=n)]
    every += itertools.product(inner, repeat=STEPS)
    scored = []
    for caption in filter(lambda c: satisfied(c, words), every):
        total = sum(toy.log_probs(parameters, image, caption[:i])[w] for i, w in enumerate(caption))
        scored.append((caption, total / len(caption) ** norm))
    return sorted(scored, key=lambda c: -c[1])


def reference(toy: Any, parameters: Any, image: int, beam: int, words: Words, norm: float) -> list[Any]:
    """Constrained beam search with lists, one beam per set of words found, without early exit."""
    complete = frozenset(range(len(words)))
    live: dict[frozenset[int], list[Any]] = {frozenset(): [((), 0.0)]}
    finished: list[Any] = []
    for _ in range(STEPS):
        candidates: dict[frozenset[int], list[Any]] = {}
        for found, hypotheses in live.items():
            for prefix, total in hypotheses:
                log_probs = toy.log_probs(parameters, image, prefix)
                for w in SPOKEN:
                    if w == EOS and found != complete:
                        continue
                    after = found | {i for i, forms in enumerate(words) if w in forms}
                    candidates.setdefault(after, []).append(((*prefix, w), total + log_probs[w]))
        live = {}
        for found, hypotheses in candidates.items():
            for caption, total in sorted(hypotheses, key=lambda c: -c[1])[:beam]:
                if caption[-1] == EOS:
                    finished.append((caption, total / len(caption) ** norm))
                else:
                    live.setdefault(found, []).append((caption, total))
    finished += [(caption, total / len(caption) ** norm) for caption, total in live.get(complete, [])]
    return sorted(finished, key=lambda c: -c[1])[:beam]


CASES: list[Words] = [((4,),), ((4,), (5,)), ((UNK, 5), (4,))]
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.mark.parametrize("words", CASES, ids=str)
@few
@given(seed=seeds)
def test_wide_beams_rank_every_caption_with_the_words(toy: Any, words: Words, seed: int) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, 121, words)(parameters)
    for image in range(IMAGES):
        everything = exhaustive(toy, parameters, image, words, 0.7)
        assert set(captions(decoded, image)) == {caption for caption, _ in everything}
        assert captions(decoded, image)[:5] == [caption for caption, _ in everything[:5]]
        scores = [score for _, score in everything]
        np.testing.assert_allclose(decoded.score[image][: len(scores)], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", CASES, ids=str)
@few
@given(seed=seeds)
def test_narrow_beams_equal_the_reference(toy: Any, words: Words, seed: int) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, 2, words)(parameters)
    for image in range(IMAGES):
        expected = reference(toy, parameters, image, 2, words, 0.7)
        assert captions(decoded, image) == [caption for caption, _ in expected]
        scores = [score for _, score in expected]
        np.testing.assert_allclose(decoded.score[image][: len(scores)], scores, rtol=1e-4, atol=1e-4)


def test_early_exit_does_not_change_the_result(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def parameters_of(seed: int) -> dict[str, np.ndarray]:
        image = table.parameters(seed)["image"][:1]  # one image, because the loop runs until the last one is decided
        image[..., EOS] += 6
        image[..., 4] += 4
        return {"image": image}

    early = search(table, 2, ((4,),))
    early(parameters_of(0))  # traced before the condition is replaced
    monkeypatch.setattr(search_module, "_decided", lambda *args: jnp.zeros((), bool))
    patient = search.__wrapped__(table, 2, ((4,),))
    saved = 0
    for seed in range(40):
        parameters = parameters_of(seed)
        left, right = early(parameters), patient(parameters)
        for name in ("tokens", "word_log_probs", "log_prob", "score"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        saved += int(right.steps - left.steps)
    assert saved > 3


def test_captions_too_short_for_all_words_contain_as_many_as_possible(table: Any) -> None:
    decoded = search(table, 2, ((4,), (5,), (UNK,)), steps=2)(table.parameters(0))
    for image in range(IMAGES):
        for caption in captions(decoded, image):
            assert len(set(caption) & {4, 5, UNK}) == 2


def test_rules_apply_in_constrained_search(table: Any) -> None:
    # Each word is allowed at most once. Word 5 is a form of both required words.
    decoded = search(table, 1, ((5,), (VOCABULARY - 1, UNK)), rules=(NoRepeatNgram(1),))(table.parameters(0))
    for image in range(IMAGES):
        (caption,) = captions(decoded, image)
        assert len(set(caption)) == len(caption)
        assert 5 in caption


def test_too_many_words_raise() -> None:
    with pytest.raises(UserError, match="5 words must occur"):
        constrained_rows(3, ((4,),) * 5)
