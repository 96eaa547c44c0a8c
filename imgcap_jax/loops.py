"""Names of the loops whose length depends on the captions.

XLA does not know how often they run. The name is part of the metadata of the compiled loop, so that ``imgcap plan`` can
multiply its body by an assumed length.
"""

import re
from contextlib import AbstractContextManager
from typing import Literal, get_args

import jax

Loop = Literal[
    "training_steps",
    "caption_steps",
    "caption_steps_of_half",
    "word_chunks",
    "three_quarter_chunk",
    "quarter_chunk",
    "search",
]


def named_loop(name: Loop) -> AbstractContextManager[None]:
    """Names the loops that are traced within this context."""
    return jax.named_scope(f"loop:{name}")


def loop_name(op_name: str) -> Loop | None:
    """The name of a compiled loop from its ``op_name``, the path of its scopes; the innermost one if it has several."""
    found = re.findall(rf"loop:({'|'.join(get_args(Loop))})\b", op_name)
    return found[-1] if found else None
