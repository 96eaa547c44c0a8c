"""JAX's persistent compilation cache."""

from pathlib import Path

import jax


def cache_compilations(folder: Path) -> None:
    """Keeps compiled programs in ``folder``/xla, so that the second start is quick."""
    jax.config.update("jax_compilation_cache_dir", str((folder / "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
