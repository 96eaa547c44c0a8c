"""The training step of a population: models that differ in their seed or in numbers of their settings.

A setting that differs is a traced value in the step, so that one program serves all members. It must be a number that
only enters the arithmetic of the step. A number that decides what is computed, such as a size, cannot differ.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.errors import UserError

Settings = TypeVar("Settings")


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """A copy of settings with other values, which can be arrays or traced; they are not checked.

    Args:
        settings: frozen dataclasses, such as an ``Experiment``.
        values: by field, as "optimizer.learning_rate".
    """
    for field, value in values.items():
        settings = _with_value(settings, field.split("."), value)
    return settings


def _with_value(settings: Settings, path: Sequence[str], value: Any) -> Settings:
    changed = copy.copy(settings)
    inner = value if len(path) == 1 else _with_value(getattr(settings, path[0]), path[1:], value)
    object.__setattr__(changed, path[0], inner)  # the class is frozen
    return changed


def merged(trees: Sequence[Any]) -> tuple[Any, Any]:
    """The trees of all members as one, in which leaves that differ are stacked.

    Returns:
        The tree, and a tree of bools: whether all members have the same leaf.
    """

    def same(*leaves: Array) -> bool:
        first, *others = leaves
        return all(leaf is first or _equal(leaf, first) for leaf in others)

    shared = jax.tree.map(same, *trees)
    joined = jax.tree.map(lambda is_shared, *leaves: leaves[0] if is_shared else jnp.stack(leaves), shared, *trees)
    return joined, shared


def _equal(a: Array, b: Array) -> bool:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b))


class Column:
    """The numbers of one member in an array [...,P] of a device, read when NumPy asks for them."""

    def __init__(self, of_all: Array, member: int) -> None:
        self._of_all, self._member = of_all, member

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(np.asarray(self._of_all)[..., self._member], dtype)


def cannot_differ(fields: Sequence[str], reason: str) -> UserError:
    """The error for settings that decide what is computed."""
    return UserError(
        f"--population: {' and '.join(fields)} cannot differ between members, because the training step decides by it "
        f"what it computes ({reason:.120}); train these runs one by one"
    )
