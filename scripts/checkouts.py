"""Another checkout of imgcap_jax in the same process, for benchmarks that compare two versions in the same rounds."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from measuring import BEFORE, PACKAGE, Thing, first_call


def _take_modules() -> dict[str, ModuleType]:
    """Removes the package's modules from ``sys.modules`` and returns them."""
    names = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def package_of(folder: Path) -> Iterator[None]:
    """``import imgcap_jax`` imports the package in ``folder`` inside the block, and the own one after it.

    Functions that the block has imported continue to work after it if they import nothing more. Call a compiled
    function once inside the block, because JAX traces it at its first call.

    Raises:
        ImportError: a module of the package was imported from elsewhere. An editable installation finds modules that
            the folder lacks.
    """
    folder = folder.resolve()
    kept = _take_modules()
    sys.path.insert(0, str(folder))
    try:
        import_module(PACKAGE)
        yield
    finally:
        sys.path.remove(str(folder))
        taken = _take_modules()
        sys.modules.update(kept)
    for name, module in taken.items():
        if not Path(module.__file__ or "").resolve().is_relative_to(folder):
            raise ImportError(f"{name} was imported from {module.__file__}")


def of_each_checkout(
    options: argparse.Namespace, build: Callable[[], Mapping[str, Thing]]
) -> tuple[dict[tuple[str, str], Thing], dict[tuple[str, str], float]]:
    """Builds the candidates with the own package and, with --before, with that of the other checkout too.

    Args:
        options: those of the command line.
        build: imports the package and returns one candidate per row of the report. Each is called once here.

    Returns:
        The candidates by (side, row), and the seconds of their first calls, with compilation. The sides are
        "imgcap_jax" and "before".
    """
    first: dict[tuple[str, str], float] = {}

    def called(side: str) -> dict[tuple[str, str], Thing]:
        things = {(side, row): thing for row, thing in build().items()}
        for (_, row), thing in things.items():
            first[side, row] = first_call(thing, f"{side}, {row}")
            print(f"first call, with compilation: {first[side, row]:.1f} s ({side}, {row})", flush=True)
        return things

    candidates = called(PACKAGE)
    if options.before is not None:
        try:
            with package_of(options.before):
                candidates |= called(BEFORE)
        except (ImportError, AttributeError, TypeError) as error:
            sys.exit(
                f"benchmark.py: --before {options.before}: this checkout does not have what the benchmark calls "
                f"({type(error).__name__}: {error}); use one that is closer to this one"
            )
    return candidates, first
