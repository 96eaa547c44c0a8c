"""Control flow of populations, whose members are computed as one program (``training/population.py``).

``jax.vmap`` replaces a branch that differs between members by both branches, and copies the state of a loop whose end
differs in each of its steps. Therefore all members take the branch, and end the loop, of the member with the most work.
"""

import jax
import jax.numpy as jnp
from jax import Array

POPULATION = "population"
"""The axis of the members."""


def most(number: Array) -> Array:
    """The largest of a number [], or of a bool, of all members; the number itself outside of populations."""
    try:
        jax.lax.axis_size(POPULATION)
    except NameError:  # the axis is not bound
        return number
    if number.dtype == jnp.bool_:
        return jax.lax.pmax(number.astype(jnp.int32), POPULATION) > 0
    return jax.lax.pmax(number, POPULATION)


def has_effect(weight: float | Array) -> bool:
    """Whether a weight is not 0. A weight that differs between the members of a population is traced, and has one."""
    return not isinstance(weight, float | int) or weight != 0
