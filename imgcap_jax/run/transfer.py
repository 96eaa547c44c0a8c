"""Starting from another run's weights (``--init-from``)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import Checkpoints

# The axis that counts words, by the end of a parameter's name; every decoder has these two layers.
_WORD_AXES = {
    "['embedding']['embedding']": 0,
    "['words']['kernel']": 1,
    "['words']['bias']": 0,
}


def check_encoder(source: Path, new: Experiment) -> None:
    """Raises UserError unless the run ``source`` looks through the encoder of the experiment ``new``.

    A decoder understands its own encoder only, even where another's features are of the same size.
    """
    changed = _encoder_differences(Run.load(source).experiment.encoder, new.encoder)
    if changed:
        raise UserError(
            f"--init-from {source}: that run has another encoder ({changed}); take an experiment with the same "
            f"encoder, only trainable_stages may differ"
        )


def _encoder_differences(old: Any, new: Any) -> str:
    """The first field in which two encoders differ, but for what only training knows; "" where none does."""
    if type(old) is not type(new):
        return f"{type(old).__name__} -> {type(new).__name__}"
    for item in dataclasses.fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if item.name not in ("trainable_stages", "checkpoint_stages", "folder") and before != after:
            return f"{item.name}: {before} -> {after}"
    return ""


def transfer(source: Path, model: CaptionModel, vocabulary: Vocabulary) -> str:
    """Puts the best parameters of the run ``source`` into ``model``, in place.

    The word embedding and the layer of word scores are mapped by word: rows of words that both know are copied,
    those of new words keep the model's fresh values.

    Args:
        source: the folder of the run to start from.
        model: the new model.
        vocabulary: the new model's words.

    Returns:
        A line that says how much was taken over.

    Raises:
        UserError: no run there, no finished validation in it, or another architecture (see `check_encoder` as well).
    """
    old = Run.load(source)
    old_model = old.model(with_encoder=not uses_store(old.experiment))
    _, template, _ = split_trained(old_model)
    checkpoints = Checkpoints(source)
    restored = checkpoints.restore_best(template)
    checkpoints.close()
    known = {word: i for i, word in enumerate(old.vocabulary.words)}
    pairs = [(i, known[word]) for i, word in enumerate(vocabulary.words) if word in known]
    new_rows = jnp.array([i for i, _ in pairs])
    old_rows = jnp.array([i for _, i in pairs])

    _, params, _ = split_trained(model)
    old_leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}

    def mapped(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        other = old_leaves.get(name)
        if other is None and name.startswith("['encoder']"):
            return leaf  # frozen there, to be trained here
        if other is None:
            raise UserError(f"{source} has no parameter {name}: it has another architecture; use the same one")
        axis = next((axis for ending, axis in _WORD_AXES.items() if name.removesuffix(".value").endswith(ending)), None)
        rest = tuple(size for i, size in enumerate(leaf.shape) if i != axis)
        old_rest = tuple(size for i, size in enumerate(other.shape) if i != axis)
        if axis is not None and rest == old_rest:
            moved = jnp.moveaxis(leaf, axis, 0).at[new_rows].set(jnp.moveaxis(other, axis, 0)[old_rows])
            return jnp.moveaxis(moved, 0, axis)
        if leaf.shape != other.shape:
            raise UserError(
                f"{source}: parameter {name} has shape {other.shape}, here it is {leaf.shape}; "
                f"use the same sizes as the run it starts from"
            )
        return other

    ours = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}
    lost = [name for name in old_leaves if name not in ours]
    if lost:
        raise UserError(
            f"{source} trained {lost[0]}, which is not trained here; "
            f"give the --encoder and --decoder options of that run"
        )
    nnx.update(model, jax.tree_util.tree_map_with_path(mapped, params))
    return f"starting from {source}: {len(pairs)} of {len(vocabulary)} words known there"
