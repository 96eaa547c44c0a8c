"""Classes that settings are made of: their names in JSON, and the code of users that defines some of them.

A class is named ``module:Class``. Reading a name never imports code that the reader has not named: classes of
``imgcap_jax`` are imported, every other class has to be in a module that the program has already imported.
``load_code`` imports a file that the user gave.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from imgcap_jax.errors import UserError

_OURS = re.compile(r"imgcap_jax(\.[A-Za-z_][A-Za-z0-9_]*)*")
_loaded: dict[str, tuple[Path, str]] = {}  # module -> its file and the digest of what was run


class UnknownClassError(LookupError):
    """A class is in no module that may be imported. ``module`` and ``name`` say which."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}:{name}")
        self.module, self.name = module, name


def load_code(code: str | Path) -> ModuleType:
    """Imports the Python file or the module that a user named.

    A file is imported under its name without ``.py``, with its folder on the module search path, as ``python FILE``
    does. A file that has changed since it was last imported is imported again.

    Raises:
        UserError: there is no such file or module, its name is taken by another module, or running it fails.
    """
    path = Path(code)
    if path.suffix != ".py":
        name = str(code)
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise UserError(f"{code} is not a Python file; give a file that ends in .py, or the name of a module")
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise _failure(name, error) from error
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name, path = path.stem, path.resolve()
    if not name.isidentifier():
        raise UserError(f"{path}: {name!r} cannot name a Python module; rename the file, for instance to my_code.py")
    if name not in _loaded and (name in sys.modules or name in sys.stdlib_module_names):
        present = getattr(sys.modules.get(name), "__file__", None)
        if present is None or Path(present).resolve() != path:
            raise UserError(f"{path}: another Python module is called {name}; rename the file")
    digest = file_digest(path)
    if name in sys.modules and _loaded.get(name) == (path, digest):
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if isinstance(error, Exception):
            raise _failure(str(code), error) from error
        raise
    _loaded[name] = path, digest
    return module


def load_all_code(codes: Iterable[str | Path]) -> None:
    """Imports several files or modules.

    Raises:
        UserError: two files have the same name; see also ``load_code``.
    """
    files: dict[str, Path] = {}
    for code in codes:
        path = Path(code).resolve()
        if path.suffix == ".py" and files.setdefault(path.stem, path) != path:
            raise UserError(f"{files[path.stem]} and {path} have the same name; rename one of them")
        load_code(code)


def _failure(code: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{code}: {type(error).__name__}: {error}; correct it")


def file_digest(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def class_name(kind: type) -> str:
    """The name ``module:Class`` of a class. A script that is run as ``__main__`` goes by its file's name."""
    return f"{_module_name(kind)}:{kind.__qualname__}"


def _module_name(kind: type) -> str:
    if kind.__module__ == "__main__" and (file := getattr(sys.modules["__main__"], "__file__", None)):
        return Path(file).stem
    return kind.__module__


def find_class(name: str) -> type[Any]:
    """The settings class with a name that ``class_name`` gave.

    Only frozen dataclasses are found. An imported module outside of ``imgcap_jax`` also matches by its last part, so
    that ``my_package.decoders`` can be given as the file ``decoders.py``.

    Raises:
        UnknownClassError: the class is in no module that may be imported.
        ValueError: the module has no such settings class.
    """
    module_name, _, qualified = name.partition(":")
    if _OURS.fullmatch(module_name):
        try:
            module: ModuleType | None = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"there is no module {module_name}") from error
    else:
        module = _imported(module_name, qualified)
    if module is None:
        raise UnknownClassError(module_name, qualified)
    kind: Any = module
    for part in qualified.split("."):
        kind = vars(kind).get(part) if isinstance(kind, ModuleType | type) else None
    frozen = isinstance(kind, type) and getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    if not frozen:
        raise ValueError(f"{module_name} has no settings class {qualified} (a frozen dataclass)")
    result: type[Any] = kind
    return result


def _imported(module_name: str, qualified: str) -> ModuleType | None:
    script = sys.modules["__main__"]
    stem = Path(getattr(script, "__file__", None) or "__main__").stem
    if stem == module_name and qualified.split(".")[0] in vars(script):
        return script
    if module_name in sys.modules:
        return sys.modules[module_name]
    last = module_name.rpartition(".")[2]
    return sys.modules[last] if last in _loaded else None


def source_files(kinds: Iterable[type]) -> dict[str, Path]:
    """Module names and files of those classes that are not part of ``imgcap_jax`` and have a file."""
    files: dict[str, Path] = {}
    for kind in kinds:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if not _OURS.fullmatch(kind.__module__) and file is not None and Path(file).is_file():
            files[_module_name(kind)] = Path(file)
    return files
