"""Greedy decoding and beam search, compared with reference searches over lists and tuples."""

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
from imgcap_jax.decoding import (
    Decoded,
    ForbidBadEnding,
    ForbidRepeatedWords,
    MinLength,
    NoRepeatNgram,
    SuppressUnk,
    Temperature,
    beam_search,
    greedy,
)
from imgcap_jax.decoding.rules import FORBIDDEN
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

IMAGES, STEPS, VOCABULARY = 3, 4, 6
SPOKEN = tuple(w for w in range(VOCABULARY) if w not in (PAD, BOS))
SEQUENCES = 1 + 3 + 9 + 27 + 81  # three words: eos after 0 to 3 of them, or 4 without eos

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=12, deadline=None, derandomize=True)


@functools.cache
def search(toy: Any, beam: int, length_norm: float | None, rules: tuple[Any, ...] = ()) -> Any:
    """A jitted function: parameters -> Decoded of NumPy arrays. length_norm None is greedy decoding."""

    @jax.jit
    def run(parameters: Any) -> Decoded:
        carry, step = toy.start(parameters, beam), functools.partial(toy.step, parameters)
        if length_norm is None:
            return greedy(step, carry, max_steps=STEPS, rules=rules)
        return beam_search(step, carry, beam=beam, max_steps=STEPS, length_norm=length_norm, rules=rules)

    return lambda parameters: jax.device_get(run(parameters))


def captions(decoded: Decoded, image: int) -> list[tuple[int, ...]]:
    """The non-empty hypotheses of an image, as tuples that end with eos or have STEPS words."""
    rows = [tuple(int(w) for w in row) for row in np.asarray(decoded.tokens[image])]
    for row in rows:
        words = tuple(w for w in row if w != PAD)
        assert row == words + (PAD,) * (STEPS - len(words)), "pad inside a caption"
        assert EOS not in words[:-1], "words after eos"
    return [tuple(w for w in row if w != PAD) for row in rows if any(row)]


def forbidden(prefix: tuple[int, ...], rules: tuple[Any, ...]) -> set[int]:
    """The words that the rules forbid after a prefix, in plain Python."""
    words = {PAD, BOS}
    for rule in rules:
        match rule:
            case SuppressUnk():
                words.add(UNK)
            case MinLength(least) if len(prefix) < least:
                words.add(EOS)
            case NoRepeatNgram(n):
                grams = {prefix[i : i + n] for i in range(len(prefix) - n + 1)}
                words |= {w for w in range(VOCABULARY) if (*prefix, w)[-n:] in grams}
            case ForbidBadEnding(bad):
                words |= {EOS} if prefix and prefix[-1] in bad else set()
                words |= set(bad) if len(prefix) == STEPS - 1 else set()
            case ForbidRepeatedWords(function_words):  # RULES allow only one content word, and so no longer phrases
                words |= set(prefix) - set(function_words.ids)
    return words


def reference(
    toy: Any, parameters: Any, image: int, beam: int, norm: float, rules: tuple[Any, ...] = ()
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search with lists and without early exit: (caption, score), best first."""
    live, finished = [((), 0.0)], []
    for _ in range(STEPS):
        candidates = []
        for prefix, total in live:
            log_probs = toy.log_probs(parameters, image, prefix)
            allowed = set(range(VOCABULARY)) - forbidden(prefix, rules) or {EOS}
            candidates += [((*prefix, w), total + log_probs[w]) for w in allowed]
        candidates.sort(key=lambda c: -c[1])
        live = []
        for caption, total in candidates[:beam]:
            if caption[-1] == EOS:
                finished.append((caption, total / len(caption) ** norm))
            else:
                live.append((caption, total))
    finished += [(caption, total / len(caption) ** norm) for caption, total in live]
    return sorted(finished, key=lambda c: -c[1])[:beam]


def exhaustive(toy: Any, parameters: Any, image: int, norm: float) -> list[tuple[tuple[int, ...], float]]:
    """All possible captions with their scores, best first."""
    words = [w for w in SPOKEN if w != EOS]
    every = [(*p, EOS) for n in range(STEPS) for p in itertools.product(words, repeat=n)]
    every += itertools.product(words, repeat=STEPS)
    scored = []
    for caption in every:
        total = sum(toy.log_probs(parameters, image, caption[:i])[w] for i, w in enumerate(caption))
        scored.append((caption, total / len(caption) ** norm))
    return sorted(scored, key=lambda c: -c[1])


def assert_same(decoded: Decoded, image: int, expected: list[tuple[tuple[int, ...], float]]) -> None:
    assert captions(decoded, image) == [caption for caption, _ in expected]
    scores = np.asarray(decoded.score[image])[: len(expected)]
    np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [0.7, 1.0])
@few
@given(seed=seeds)
def test_beam_as_wide_as_all_captions_ranks_every_caption(toy: Any, norm: float, seed: int) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, SEQUENCES, norm)(parameters)
    everything = exhaustive(toy, parameters, 0, norm)
    assert len(everything) == SEQUENCES
    np.testing.assert_allclose(decoded.score[0], [s for _, s in everything], rtol=1e-4, atol=1e-4)
    assert captions(decoded, 0)[:20] == [caption for caption, _ in everything[:20]]
    assert set(captions(decoded, 0)) == {caption for caption, _ in everything}


@few
@given(seed=seeds)
def test_beam_as_wide_as_the_live_prefixes_finds_the_most_likely_caption(toy: Any, seed: int) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, 27, 0.0)(parameters)
    for image in range(IMAGES):
        assert captions(decoded, image)[0] == exhaustive(toy, parameters, image, 0.0)[0][0]


RULES = (SuppressUnk(), NoRepeatNgram(2), MinLength(2), ForbidBadEnding((4,)), ForbidRepeatedWords(FunctionWords((4,))))


@pytest.mark.parametrize(
    ("beam", "norm", "rules"),
    [(3, 0.0, RULES), (3, 0.7, ()), (2, 1.0, ()), (2, 0.7, RULES)],
    ids=["3-sum-ruled", "3-0.7", "2-average", "2-0.7-ruled"],
)
@few
@given(seed=seeds)
def test_narrow_beam_equals_the_reference(toy: Any, beam: int, norm: float, rules: Any, seed: int) -> None:
    parameters = toy.parameters(seed)
    decoded = search(toy, beam, norm, rules)(parameters)
    for image in range(IMAGES):
        assert_same(decoded, image, reference(toy, parameters, image, beam, norm, rules))


@pytest.mark.parametrize("rules", [(), RULES], ids=["free", "ruled"])
@few
@given(seed=seeds)
def test_beam_one_is_greedy_and_greedy_takes_the_most_likely_word(table: Any, rules: Any, seed: int) -> None:
    parameters = table.parameters(seed)
    greedily = search(table, 1, None, rules)(parameters)
    beam_one = search(table, 1, 0.7, rules)(parameters)
    np.testing.assert_array_equal(greedily.tokens, beam_one.tokens)
    np.testing.assert_array_equal(greedily.word_log_probs, beam_one.word_log_probs)
    assert greedily.steps == beam_one.steps == max(len(captions(greedily, i)[0]) for i in range(IMAGES))
    for image in range(IMAGES):
        caption: tuple[int, ...] = ()
        while len(caption) < STEPS and EOS not in caption:
            allowed = set(SPOKEN) - forbidden(caption, rules) or {EOS}
            log_probs = table.log_probs(parameters, image, caption)
            caption += (max(allowed, key=lambda w: log_probs[w]),)
        assert captions(greedily, image) == [caption]


@few
@given(seed=seeds)
def test_images_are_searched_independently(table: Any, seed: int) -> None:
    parameters = table.parameters(seed)
    together = search(table, 3, 0.7)(parameters)
    for image in range(IMAGES):
        one = dict(parameters, image=parameters["image"][image : image + 1])
        if "eos" in one:
            one["eos"] = parameters["eos"][image : image + 1]
        alone = search(table, 3, 0.7)(one)
        np.testing.assert_array_equal(together.tokens[image], alone.tokens[0])
        np.testing.assert_allclose(together.score[image], alone.score[0], rtol=1e-5, atol=1e-5)
        assert alone.steps <= together.steps


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_early_exit_saves_steps_and_does_not_change_the_result(
    table: Any, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = search(table, 2, norm)
    early(table.parameters(0))  # traced before the condition is replaced
    monkeypatch.setattr(search_module, "_decided", lambda *args: jnp.zeros((), bool))
    patient = search.__wrapped__(table, 2, norm)
    saved = 0
    for seed in range(40):
        parameters = table.parameters(seed)
        parameters["image"][..., EOS] += 3
        left, right = early(parameters), patient(parameters)
        for name in ("tokens", "word_log_probs", "log_prob", "score"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        assert right.steps == STEPS
        saved += int(right.steps - left.steps)
    assert saved > 3


@pytest.mark.parametrize("norm", [0.0, 0.7])
def test_smaller_n_best_saves_steps_and_does_not_change_the_captions(table: Any, norm: float) -> None:
    @functools.partial(jax.jit, static_argnums=1)
    def run(parameters: Any, n_best: int | None) -> Decoded:
        step, carry = functools.partial(table.step, parameters), table.start(parameters, 3)
        return beam_search(step, carry, beam=3, max_steps=STEPS, length_norm=norm, n_best=n_best)

    saved = 0
    for seed in range(40):
        parameters = table.parameters(seed)
        parameters["image"][..., EOS] += 3
        everything = run(parameters, None)
        for n_best in (1, 2, 3):
            found = run(parameters, n_best)
            np.testing.assert_array_equal(found.tokens[:, :n_best], everything.tokens[:, :n_best])
            np.testing.assert_array_equal(found.score[:, :n_best], everything.score[:, :n_best])
            saved += int(everything.steps - found.steps)
    assert saved > 10


def chain(*rows: dict[int, float]) -> dict[str, np.ndarray]:
    """Parameters of a table decoder for one image: the next word's probabilities at each position."""
    table = np.full((1, STEPS, VOCABULARY, VOCABULARY), -50.0, np.float32)
    for position, row in enumerate(rows):
        for word, probability in row.items():
            table[0, position, :, word] = np.log(probability)
    return {"image": table}


def test_finished_captions_do_not_stop_a_longer_one_that_the_length_norm_favours(table: Any) -> None:
    # After two steps both slots are filled: (eos) has mean log .55 = -.60, (4 eos) has log(.45 * .45) / 2 = -.80.
    # The live (4 4), with log(.45 * .55) = -1.40, continues with probability 1 and ends at -1.40 / 4 = -.35.
    parameters = chain({EOS: 0.55, 4: 0.45}, {EOS: 0.45, 4: 0.55}, {4: 1.0}, {EOS: 1.0})
    averaged = search(table, 2, 1.0)(parameters)
    assert captions(averaged, 0) == [(4, 4, 4, EOS), (EOS,)]
    assert averaged.steps == 4
    summed = search(table, 2, 0.0)(parameters)
    assert captions(summed, 0) == [(EOS,), (4, 4, 4, EOS)]


def test_loop_runs_until_the_last_image_is_decided(table: Any) -> None:
    at_once = chain({EOS: 0.9, 4: 0.1}, {EOS: 1.0})["image"]
    later = chain({4: 1.0}, {4: 1.0}, {EOS: 0.9, 4: 0.1}, {EOS: 1.0})["image"]
    for images, steps in [([at_once], 2), ([later], 4), ([at_once, later], 4)]:
        decoded = search(table, 2, 0.0)({"image": np.concatenate(images)})
        assert decoded.steps == steps
    for images, steps in [([at_once], 1), ([later], 3), ([at_once, later], 3)]:
        decoded = search(table, 1, None)({"image": np.concatenate(images)})
        assert decoded.steps == steps


def test_empty_slots_have_pad_tokens_and_forbidden_scores(table: Any) -> None:
    parameters = table.parameters(0)

    def decode(p: Any) -> Decoded:
        step = functools.partial(table.step, p)
        return beam_search(step, table.start(p, 7), beam=7, max_steps=1)

    decoded = jax.device_get(jax.jit(decode)(parameters))
    for image in range(IMAGES):
        tokens = np.asarray(decoded.tokens[image, :, 0])
        assert set(tokens[:4]) == set(SPOKEN)
        assert set(tokens[4:]) == {PAD}
        np.testing.assert_array_equal(decoded.log_prob[image, 4:], np.float32(FORBIDDEN))
        np.testing.assert_array_equal(decoded.score[image, 4:], np.float32(FORBIDDEN))
        assert np.all(np.asarray(decoded.log_prob[image, :4]) > -100)


@pytest.mark.parametrize("length_norm", [None, 0.7])
def test_log_probabilities_are_before_the_rules_and_scores_after_them(table: Any, length_norm: float | None) -> None:
    parameters = table.parameters(3)
    rules = (Temperature(2.0), SuppressUnk(), MinLength(2))
    decoded = search(table, 1 if length_norm is None else 3, length_norm, rules)(parameters)
    for image in range(IMAGES):
        for m, caption in enumerate(captions(decoded, image)):
            own = [table.log_probs(parameters, image, caption[:i])[w] for i, w in enumerate(caption)]
            padded = own + [0.0] * (STEPS - len(own))
            np.testing.assert_allclose(decoded.word_log_probs[image, m], padded, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(decoded.log_prob[image, m], sum(own), rtol=1e-4)
            score = sum(own) / 2 / len(own) ** (length_norm or 0.0)
            np.testing.assert_allclose(decoded.score[image, m], score, rtol=1e-4)


@pytest.mark.parametrize("length_norm", [None, 0.7])
def test_caption_ends_if_the_rules_forbid_all_words(table: Any, length_norm: float | None) -> None:
    # Each of the three words is allowed once. eos is forbidden before the fourth word.
    rules = (NoRepeatNgram(1), MinLength(4))
    decoded = search(table, 1 if length_norm is None else 2, length_norm, rules)(table.parameters(1))
    for image in range(IMAGES):
        for caption in captions(decoded, image):
            assert sorted(caption[:3]) == [UNK, 4, 5]
            assert caption[3] == EOS


@pytest.mark.parametrize("length_norm", [None, 0.7])
def test_bfloat16_and_infinite_logits_give_float32_results_without_nan(table: Any, length_norm: float | None) -> None:
    parameters = table.parameters(2)
    parameters["image"][..., 5] = -np.inf
    parameters["image"][..., PAD] = 9.0  # most of the probability, but never emitted
    rounded = {"image": jnp.asarray(parameters["image"], jnp.bfloat16)}
    decoded = search(table, 1 if length_norm is None else 3, length_norm)(rounded)
    assert decoded.word_log_probs.dtype == jnp.float32
    exact = {"image": np.asarray(rounded["image"].astype(jnp.float32))}
    for image in range(IMAGES):
        found = captions(decoded, image)
        assert found
        for m, caption in enumerate(found):
            assert not {PAD, BOS, 5} & set(caption)
            own = [table.log_probs(exact, image, caption[:i])[w] for i, w in enumerate(caption)]
            np.testing.assert_allclose(decoded.word_log_probs[image, m, : len(own)], own, atol=1e-5)
    for value in jax.tree.leaves(decoded):
        assert not np.any(np.isnan(np.asarray(value)))


@pytest.mark.parametrize("length_norm", [None, 0.7])
def test_batches_of_one_shape_are_compiled_once(table: Any, length_norm: float | None) -> None:
    traces = 0

    @jax.jit
    def run(parameters: Any) -> Decoded:
        nonlocal traces
        traces += 1
        step = functools.partial(table.step, parameters)
        if length_norm is None:
            return greedy(step, table.start(parameters, 2), max_steps=STEPS)
        carry = table.start(parameters, 2)
        return beam_search(step, carry, beam=2, max_steps=STEPS, length_norm=length_norm)

    for seed in range(3):
        run(table.parameters(seed))
    assert traces == 1


def test_invalid_arguments_raise(table: Any) -> None:
    parameters = table.parameters(0)
    step, carry = functools.partial(table.step, parameters), table.start(parameters, 2)
    with pytest.raises(UserError, match="beam is 0"):
        beam_search(step, carry, beam=0, max_steps=4)
    with pytest.raises(UserError, match="length_norm is -1"):
        beam_search(step, carry, beam=2, max_steps=4, length_norm=-1)
    with pytest.raises(UserError, match="max_steps is 0"):
        greedy(step, carry, max_steps=0)
    with pytest.raises(ValueError, match="carry has 2 sequences"):
        beam_search(step, carry, beam=3, max_steps=4)
    with pytest.raises(ValueError, match="start with the same"):
        greedy(step, {"a": jnp.zeros((2, 1)), "b": jnp.zeros((2, 3))}, max_steps=4)
