"""Similar training photos and the words of their captions, against brute force."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.models.neighbours import Neighbours, index, nearest_captions
from imgcap_jax.models.retrieval import Retrieval

PHOTOS, D, V, R, T = 12, 6, 20, 3, 5


def photos(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean features [photos,D], and captions int32 [photos,R,T]; ids from V on are unknown."""
    rng = np.random.default_rng(seed)
    captions = rng.integers(4, V + 3, (PHOTOS, R, T)).astype(np.int32)
    lengths = rng.integers(1, T + 1, (PHOTOS, R))
    captions[np.arange(T) >= lengths[..., None]] = 0
    captions[::4, 1:] = 0
    return rng.normal(size=(PHOTOS, D)).astype(np.float32), captions


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def expected_cosines(features: np.ndarray, captions: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of other photos with the training photos, and of the training photos with each other.

    The regression is fitted again without each training photo.
    """
    ids = [word for word in range(4, V + 3) if (captions == word).any()]
    words = np.zeros((PHOTOS, len(ids)))
    for photo, texts in enumerate(captions):
        texts = [set(text[text > 0].tolist()) for text in texts if text.any()]
        for place, word in enumerate(ids):
            of = sum((other == word).any() for other in captions)
            words[photo, place] = sum(word in text for text in texts) / len(texts) * np.log(PHOTOS / of)
    mean = features.mean(0)
    inputs, targets = (features - mean) / (features.std(0) + 0.05), words - words.mean(0)

    def fitted(chosen: np.ndarray) -> np.ndarray:
        covariance = inputs[chosen].T @ inputs[chosen] / PHOTOS + 0.1 * np.eye(D)
        return np.asarray(np.linalg.solve(covariance, inputs[chosen].T @ targets[chosen] / PHOTOS))

    everyone = np.arange(PHOTOS)
    left_out = np.stack([inputs[photo] @ fitted(everyone != photo) for photo in everyone])
    vectors = unit(unit(left_out) + unit(targets))
    predicted = (queries - mean) / (features.std(0) + 0.05) @ fitted(everyone >= 0)
    # The index keeps the part of a prediction that is a sum of vectors of photos.
    basis = np.linalg.svd(vectors, full_matrices=False)[2]
    return unit(predicted @ basis.T) @ (vectors @ basis.T).T, unit(left_out @ basis.T) @ (vectors @ basis.T).T


def test_captions_come_from_the_photos_whose_words_are_closest_to_the_predicted_ones() -> None:
    features, captions = photos()
    regions = np.random.default_rng(1).normal(size=(4, 3, D)).astype(np.float32)
    own = np.array([3, 2, 7, 11], np.int32)
    of_others, of_own = expected_cosines(features, captions, regions.mean(1))
    of_own = of_own[own]
    of_own[np.arange(4), own] = -np.inf  # a photo is not its own neighbour
    made = index(features, captions)
    for cosines, given in ((of_others, None), (of_own, jnp.asarray(own))):
        found, there, found_cosines = nearest_captions(jnp.asarray(regions), made, 4, given)
        nearest = np.argsort(-cosines, axis=1)[:, :4]
        np.testing.assert_array_equal(found, captions[nearest].reshape(4, -1, T))
        np.testing.assert_array_equal(there, captions[nearest].reshape(4, -1, T).any(-1))
        expected = np.repeat(np.take_along_axis(cosines, nearest, 1), R, axis=1)
        np.testing.assert_allclose(found_cosines, expected, atol=1e-4)


def test_an_index_that_is_read_is_the_one_that_was_written(tmp_path: Path) -> None:
    made = index(*photos())
    path = tmp_path / "neighbours.npz"
    made.save(path, "these photos")
    read = Neighbours.load(path, "these photos")
    assert read is not None
    for before, after in zip(made, read, strict=True):
        np.testing.assert_allclose(after, before, atol=2e-3)
    assert Neighbours.load(path, "other photos") is None
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        Neighbours.load(path)


def built(settings: Retrieval, seed: int = 0) -> Any:
    return settings.build(index(*photos()), D, V, dtype=jnp.float32, rngs=nnx.Rngs(seed))


def test_retrieved_words_are_frequent_among_neighbours_and_rare_elsewhere() -> None:
    features, captions = photos()
    retriever = built(Retrieval(neighbours=3, words=6))
    regions = np.random.default_rng(2).normal(size=(2, 4, D)).astype(np.float32)
    words, scores = retriever.retrieved(jnp.asarray(regions), None)
    cosines, _ = expected_cosines(features, captions, regions.mean(1))
    for image in range(2):
        expected = np.zeros(V)
        for photo in np.argsort(-cosines[image])[:3]:
            for word in captions[photo].ravel():
                if 3 < word < V:
                    in_photos = sum((texts == word).any() for texts in captions)
                    expected[word] += max(cosines[image, photo], 0) * np.log(PHOTOS / in_photos)
        np.testing.assert_allclose(scores[image], np.sort(expected)[::-1][:6], atol=1e-4)
        np.testing.assert_allclose(expected[np.asarray(words[image])], scores[image], atol=1e-4)


def test_dropout_leaves_out_words_but_never_all() -> None:
    retriever = built(Retrieval(neighbours=3, words=6, dropout=0.9))
    regions = jnp.asarray(np.random.default_rng(2).normal(size=(50, 4, D)), jnp.float32)
    _, there = retriever(regions, None, None)
    _, kept = retriever(regions, None, jax.random.split(jax.random.key(0), 50))
    assert kept[:, 0].all()
    assert not (kept & ~there).any()
    assert 0.02 < kept[:, 1:].sum() / there[:, 1:].sum() < 0.2


def test_a_model_attends_to_retrieved_words_and_shows_the_attention_of_regions_only() -> None:
    decoder = ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=8).build(
        D, V, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    plain = CaptionModel(None, decoder)
    model = CaptionModel(None, decoder, retriever=built(Retrieval(neighbours=3, words=6)))
    rng = np.random.default_rng(3)
    batch = {
        "regions": rng.normal(size=(2, 4, D)).astype(np.float32),
        "tokens": np.array([[[1, 5, 6, 2]], [[1, 7, 2, 0]]], np.int32),
        "number": np.array([1, 2], np.int32),
    }
    regions, mask = model.seen(batch)
    assert regions.shape == (2, 10, D)
    assert mask is not None
    assert mask[:, :4].all()
    outputs = model.teacher_forced(batch)
    assert outputs.attention is not None
    assert outputs.attention.shape == (2, 1, 3, 4)
    total = np.asarray(outputs.attention[0].sum(-1))
    assert ((total > 0.05) & (total < 0.95)).all()
    assert not np.allclose(outputs.hidden, plain.teacher_forced(batch).hidden, atol=1e-3)

    # The index is not trained, and the words and their scores are.
    graph, params, frozen = split_trained(model)

    def loss(params: Any) -> Any:
        return nnx.merge(graph, params, frozen).teacher_forced(batch).hidden.sum()

    gradients = jax.grad(loss)(params)["retriever"]
    assert set(gradients) == {"embedding", "of_score", "project"}
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
