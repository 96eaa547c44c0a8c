"""Diverse beam search, compared with a reference search over lists, and its documented properties."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import imgcap_jax.decoding.search as search_module
from imgcap_jax.decoding import Decoded, beam_search, diverse_beam_search
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD

IMAGES, STEPS, VOCABULARY = 3, 4, 6
SPOKEN = tuple(w for w in range(VOCABULARY) if w not in (PAD, BOS))


@functools.cache
def search(toy: Any, beam: int, groups: int, diversity: float, penalty: str = "power", norm: float = 0.7) -> Any:
    @jax.jit
    def run(parameters: Any) -> Decoded:
        carry, step = toy.start(parameters, beam), functools.partial(toy.step, parameters)
        return diverse_beam_search(
            step,
            carry,
            beam=beam,
            groups=groups,
            diversity=diversity,
            max_steps=STEPS,
            length_norm=norm,
            length_penalty=penalty,  # type: ignore[arg-type]
        )

    return lambda parameters: jax.device_get(run(parameters))


def captions(decoded: Decoded, image: int) -> list[tuple[int, ...]]:
    return [tuple(int(w) for w in row if w != PAD) for row in np.asarray(decoded.tokens[image]) if row.any()]


def reference(
    toy: Any, parameters: Any, image: int, beam: int, groups: int, diversity: float, penalty: str, norm: float
) -> list[tuple[tuple[int, ...], float]]:
    def ranked(caption: tuple[int, ...], total: float) -> float:
        return total / (len(caption) if penalty == "power" else (5 + len(caption)) / 6) ** norm

    width = beam // groups
    live: list[Any] = [[((), 0.0)] for _ in range(groups)]
    finished: list[Any] = [[] for _ in range(groups)]
    for _ in range(STEPS):
        taken: Counter[int] = Counter()
        for group in range(groups):
            candidates = []
            for prefix, total in live[group]:
                log_probs = toy.log_probs(parameters, image, prefix)
                candidates += [((*prefix, w), total + log_probs[w]) for w in SPOKEN]
            candidates.sort(key=lambda c: -(c[1] - diversity * taken[c[0][-1]]))
            live[group] = []
            for caption, total in candidates[:width]:
                taken[caption[-1]] += 1
                if caption[-1] == EOS:
                    finished[group].append((caption, ranked(caption, total)))
                else:
                    live[group].append((caption, total))
    best = []
    for group in range(groups):
        left = [(caption, ranked(caption, total)) for caption, total in live[group]]
        best += sorted(finished[group] + left, key=lambda c: -c[1])[:width]
    return sorted(best, key=lambda c: -c[1])


@pytest.mark.parametrize(
    ("beam", "groups", "diversity", "penalty", "norm"),
    [(4, 2, 0.5, "power", 0.7), (3, 3, 2.0, "power", 0.0), (6, 3, 0.3, "gnmt", 0.8), (3, 1, 0.9, "gnmt", 1.0)],
)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_the_reference(
    toy: Any, beam: int, groups: int, diversity: float, penalty: str, norm: float, seed: int
) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, beam, groups, diversity, penalty, norm)(parameters)
    for image in range(IMAGES):
        expected = reference(toy, parameters, image, beam, groups, diversity, penalty, norm)
        assert sorted(captions(decoded, image)) == sorted(caption for caption, _ in expected)
        scores = [score for _, score in expected]
        np.testing.assert_allclose(decoded.score[image][: len(scores)], scores, rtol=1e-4, atol=1e-4)


def test_zero_diversity_repeats_one_group_and_high_diversity_gives_different_first_words(table: Any) -> None:
    parameters = table.parameters(0)
    alone = search(table, 2, 1, 0.0)(parameters)
    thrice = search(table, 6, 3, 0.0)(parameters)
    apart = search(table, 3, 3, 50.0)(parameters)
    for image in range(IMAGES):
        assert Counter(captions(thrice, image)) == Counter(3 * captions(alone, image))
        assert len({caption[0] for caption in captions(apart, image)}) == 3


def test_early_exit_does_not_change_the_result(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    early = search(table, 4, 2, 0.5)
    early(table.parameters(0))  # traced before the condition is replaced
    monkeypatch.setattr(search_module, "_decided", lambda *args: jnp.zeros((), bool))
    patient = search.__wrapped__(table, 4, 2, 0.5)
    saved = 0
    for seed in range(30):
        parameters = table.parameters(seed)
        parameters["image"][..., EOS] += 4
        left, right = early(parameters), patient(parameters)
        for name in ("tokens", "word_log_probs", "log_prob", "score"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        saved += int(right.steps - left.steps)
    assert saved > 3


def test_invalid_arguments_raise(table: Any) -> None:
    parameters = table.parameters(0)
    step, carry = functools.partial(table.step, parameters), table.start(parameters, 4)
    with pytest.raises(UserError, match=r"beam is 4; it must be a multiple of groups \(3\)"):
        diverse_beam_search(step, carry, beam=4, groups=3, diversity=0.5, max_steps=4)
    with pytest.raises(UserError, match="diversity is -1"):
        diverse_beam_search(step, carry, beam=4, groups=2, diversity=-1, max_steps=4)
    with pytest.raises(ValueError, match="carry has 4 sequences"):
        beam_search(step, carry, beam=2, max_steps=4)
