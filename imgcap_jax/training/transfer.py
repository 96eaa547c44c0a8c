"""Starting from another run's weights (``--init-from``)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.extraction import uses_store
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.run import Run
from imgcap_jax.training.checkpoints import Checkpoints


def transfer(source: Path, model: CaptionModel, vocabulary: Vocabulary) -> str:
    """Puts the best parameters of the run ``source`` into ``model``, in place.

    An axis as long as the old vocabulary is mapped by word: rows of words that both know are copied, those of
    new words keep the model's fresh values.

    Args:
        source: the folder of the run to start from.
        model: the new model.
        vocabulary: the new model's words.

    Returns:
        A line that says how much was taken over.

    Raises:
        UserError: no run there, no finished validation in it, or another architecture.
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
    sizes = (len(vocabulary), len(old.vocabulary))

    _, params, _ = split_trained(model)
    old_leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}

    def mapped(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        other = old_leaves.get(name)
        if other is None and name.startswith("['encoder']"):
            return leaf  # frozen there, to be trained here
        if other is None:
            raise UserError(f"{source} has no parameter {name}: it has another architecture; use the same one")
        for axis in range(leaf.ndim):
            if leaf.ndim == other.ndim and (leaf.shape[axis], other.shape[axis]) == sizes:
                rest = leaf.shape[:axis] + leaf.shape[axis + 1 :]
                if rest == other.shape[:axis] + other.shape[axis + 1 :]:
                    moved = jnp.moveaxis(leaf, axis, 0).at[new_rows].set(jnp.moveaxis(other, axis, 0)[old_rows])
                    return jnp.moveaxis(moved, 0, axis)
        if leaf.shape != other.shape:
            raise UserError(
                f"{source}: parameter {name} has shape {other.shape}, here it is {leaf.shape}; "
                f"use the same sizes as the run it starts from"
            )
        return other

    lost = [name for name in old_leaves if name.startswith("['encoder']") and model.encoder is None]
    if lost:
        raise UserError(f"{source} trained its encoder, here it is frozen; give the --encoder options of that run")
    nnx.update(model, jax.tree_util.tree_map_with_path(mapped, params))
    return f"starting from {source}: {len(pairs)} of {len(vocabulary)} words known there"
