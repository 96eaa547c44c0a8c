"""Starting from the parameters of another run (``--init-from``)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.encoders.contract import weights_digest
from imgcap_jax.models.model import CaptionModel, Params, split_trained
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run, without_weights_path
from imgcap_jax.training.checkpoints import restore_best


def check_encoder(source: Path, new: Experiment, option: str = "--init-from") -> None:
    """Raises UserError unless the run ``source``, which ``option`` names, has the encoder of the experiment ``new``.

    A decoder only understands the features that it was trained with, even if others have the same size.
    """
    run = Run.load(source)
    old_encoder, new_encoder = run.experiment.encoder, new.encoder
    if run.weights is not None and type(old_encoder) is type(new_encoder):
        old_encoder, new_encoder = without_weights_path(old_encoder), without_weights_path(new_encoder)
    changed = _encoder_differences(old_encoder, new_encoder)
    if changed:
        raise UserError(
            f"{option} {source}: that run has another encoder ({changed}); use the same one, except for "
            f"trainable_stages"
        )
    if run.weights is not None and weights_digest(new.encoder) != run.weights:
        raise UserError(f"{option} {source}: that run has other encoder weights; use the same weights file")


def _encoder_differences(old: Any, new: Any) -> str:
    """The first field in which two encoders compute different features; "" if there is none."""
    if type(old) is not type(new):
        return f"{type(old).__name__} -> {type(new).__name__}"
    for item in dataclasses.fields(old):
        if item.name in ("trainable_stages", "checkpoint_stages", "folder"):
            continue
        before, after = getattr(old, item.name), getattr(new, item.name)
        if _are_settings(before) and _are_settings(after) and len(before) == len(after):
            changed = next(filter(None, map(_encoder_differences, before, after)), "")
            if changed:
                return changed
        elif before != after:
            return f"{item.name}: {before} -> {after}"
    return ""


def _are_settings(value: Any) -> bool:
    """Whether a field contains the settings of several encoders, as that of ``Concatenated`` does."""
    return isinstance(value, tuple) and bool(value) and all(map(dataclasses.is_dataclass, value))


def transfer(source: Path, run: Run, *, with_encoder: bool) -> tuple[CaptionModel, str]:
    """Makes the model of a new run and copies the best parameters of the run ``source`` into it.

    The word embedding and the output layer (``Decoder.word_axes``) are mapped by word: rows of words that both
    vocabularies have are copied, rows of new words keep the model's initial values.

    Args:
        source: the folder of the run to start from.
        run: the new run.
        with_encoder: see ``Run.model``.

    Returns:
        The model, and a line that says how many words were found.

    Raises:
        UserError: there is no run, no finished validation in it, or it has another architecture (see also
            `check_encoder`).
    """
    old = Run.load(source)
    vocabulary = run.vocabulary
    old_model = old.model(with_encoder=not uses_store(old.experiment), restored=True)
    _, template, _ = split_trained(old_model)
    restored, _ = restore_best(source, template)
    known = {word: i for i, word in enumerate(old.vocabulary.words)}
    pairs = [(i, known[word]) for i, word in enumerate(vocabulary.words) if word in known]
    new_rows = jnp.array([i for i, _ in pairs])
    old_rows = jnp.array([i for _, i in pairs])
    old_leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}

    model = run.model(with_encoder=with_encoder, restored=len(pairs) == len(vocabulary))
    _, params, _ = split_trained(model)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    if any(name not in old_leaves for name in names) and _lacks_values(params):
        model = run.model(with_encoder=with_encoder)
        _, params, _ = split_trained(model)

    def mapped(path: Any, leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        other = old_leaves.get(name)
        if other is None and name.startswith(("['encoder']", "['retriever']")):
            return leaf  # frozen in the other run, trained in this one; or not in the other run
        if other is None:
            raise UserError(f"{source} has no parameter {name}, so its architecture differs; use the same one")
        axis = next(
            (axis for ending, axis in model.decoder.word_axes.items() if name.removesuffix(".value").endswith(ending)),
            None,
        )
        rest = tuple(size for i, size in enumerate(leaf.shape) if i != axis)
        old_rest = tuple(size for i, size in enumerate(other.shape) if i != axis)
        if axis is not None and rest == old_rest:
            first = jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
            moved = jnp.moveaxis(first, axis, 0).at[new_rows].set(jnp.moveaxis(other, axis, 0)[old_rows])
            return jnp.moveaxis(moved, 0, axis)
        if leaf.shape != other.shape:
            raise UserError(
                f"{source}: parameter {name} has shape {other.shape}, here it is {leaf.shape}; "
                f"use the same sizes as that run"
            )
        return other

    lost = [name for name in old_leaves if name not in names]
    if lost:
        raise UserError(
            f"{source} trained {lost[0]}, which is not trained here; "
            f"use the --encoder and --decoder options of that run"
        )
    nnx.update(model, jax.tree_util.tree_map_with_path(mapped, params))
    return model, f"starting from {source}: {len(pairs)} of {len(vocabulary)} words are in its vocabulary"


def _lacks_values(params: Params) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
