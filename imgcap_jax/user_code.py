"""Classes that settings are made of: their names in JSON, and the code of users that defines some of them.

A class is named ``module:Class``. Reading a name never imports code that the reader has not named: classes of
``imgcap_jax`` are imported, every other class has to be in a module that the program has already imported.
``load_code`` imports a file that the user gave.
"""

import hashlib
import importlib
import importlib.abc
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import file_digest

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
"""What the name of a class looks like."""
_OURS = re.compile(r"imgcap_jax(\.[A-Za-z_]\w*)*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class UnknownClassError(LookupError):
    """A class is in no module that may be imported. ``module`` and ``name`` say which."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}:{name}")
        self.module, self.name = module, name


class _NamedFiles(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the files that users named, and no other file of their folders.

    The source is compiled here. Python's own loader would prefer a compiled file next to it, which a reader of the
    source does not see.
    """

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.digests: dict[str, str] = {}  # of the source that was run

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.files:
            return None
        return importlib.util.spec_from_file_location(fullname, self.files[fullname], loader=self)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        path = self.files[module.__name__]
        source = path.read_bytes()
        self.digests[module.__name__] = hashlib.sha256(source).hexdigest()
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)


_named = _NamedFiles()


def load_code(code: str | Path, *, with_folder: bool = False) -> ModuleType:
    """Imports the Python file or the module that a user named.

    A file is imported under its name without ``.py``. A file that has changed since it was last imported is imported
    again.

    Args:
        code: a file that ends in ``.py``, or the name of a module.
        with_folder: also search the file's folder for modules that the file imports, after all other folders.

    Raises:
        UserError: there is no such file or module, its name is taken by another module, or running it fails.
    """
    return load_all_code([code], with_folder=with_folder)[0]


def load_all_code(codes: Iterable[str | Path], *, with_folder: bool = False) -> list[ModuleType]:
    """Imports several files or modules, which can import each other. See ``load_code``.

    Raises:
        UserError: two files have the same name; see also ``load_code``.
    """
    codes = list(codes)
    files: dict[str, Path] = {}
    for code in codes:
        path = Path(code)
        if path.suffix == ".py":
            _check_file(path)
            if files.setdefault(path.stem, path.resolve()) != path.resolve():
                raise UserError(f"{files[path.stem]} and {path} have the same name; rename one of them")
        elif not _MODULE.fullmatch(str(code)):
            raise UserError(f"{code} is not a Python file; give a file that ends in .py, or the name of a module")
    if _named not in sys.meta_path:
        sys.meta_path.insert(0, _named)
    for name, path in files.items():
        if with_folder and str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        _forget_if_changed(name, path)
    return [_import(code) for code in codes]


def _check_file(path: Path) -> None:
    """Raises UserError unless the file can be imported under its name."""
    name = path.stem
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not name.isidentifier():
        raise UserError(f"{path}: {name!r} cannot name a Python module; rename the file, for instance to my_code.py")
    if name in _named.files:
        return
    present = sys.modules.get(name)
    file = getattr(present, "__file__", None)
    same = file is not None and Path(file).resolve() == path.resolve()
    if not same and (present is not None or name in sys.stdlib_module_names):
        raise UserError(f"{path}: another Python module is called {name}; rename the file")


def _forget_if_changed(name: str, path: Path) -> None:
    """Makes the next import of a module run the file, unless the module is this file as it is now."""
    before, _named.files[name] = _named.files.get(name), path
    if name not in sys.modules:
        return
    digest = file_digest(path)
    if before is None and name not in _named.digests:
        _named.digests[name] = digest  # imported by the program itself, under its usual name
    elif before != path or _named.digests.get(name) != digest:
        del sys.modules[name]


def _import(code: str | Path) -> ModuleType:
    path = Path(code)
    name = path.stem if path.suffix == ".py" else str(code)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _failure(str(code), error) from error


def _failure(code: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name != code:
        name = error.name
        return UserError(
            f"{code} imports {name}, which is not installed; if it is a file, give --code {name}.py as well"
        )
    if isinstance(error, SyntaxError):
        place, reason = f"{error.filename}, line {error.lineno}", error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place, reason = f"{last.filename}, line {last.lineno}", str(error)
    return UserError(f"{code}: {type(error).__name__}: {reason} ({place}); correct it")


def class_name(kind: type) -> str:
    """The name ``module:Class`` of a class. A script that is run as ``__main__`` goes by its file's name."""
    return f"{_module_name(kind)}:{kind.__qualname__}"


def check_name(kind: type) -> None:
    """Raises UserError if a class could not be found again by its name."""
    module, name = _module_name(kind), kind.__qualname__
    if module == "__main__":
        raise UserError(f"{name} is defined in a session, so a run cannot store it; move it to a Python file")
    if "<locals>" in name:
        raise UserError(f"{name} of {module} is defined in a function, so a run cannot store it; move it out")
    if not NAME.fullmatch(f"{module}:{name}"):
        raise UserError(
            f"{module}.py, which defines {name}, cannot be imported by its name; rename it, as in my_code.py"
        )


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
        ValueError: the name is malformed, or the module has no such settings class.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a class")
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


def make_settings(name: str, where: str) -> Any:
    """An instance of the settings class ``module:Class``, with the defaults of its fields.

    Args:
        name: the class.
        where: what names it, for errors.

    Raises:
        UserError: the module is not imported, or has no such class.
    """
    try:
        return find_class(name)()
    except UnknownClassError as error:
        file = f"{error.module.rpartition('.')[2]}.py"
        raise UserError(f"{where}: {error.module} is not imported; add --code {file}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}; name a frozen dataclass whose fields have defaults") from error


def _imported(module_name: str, qualified: str) -> ModuleType | None:
    script = sys.modules["__main__"]
    stem = Path(getattr(script, "__file__", None) or "__main__").stem
    if stem == module_name and qualified.split(".")[0] in vars(script):
        return script
    if module_name in sys.modules:
        return sys.modules[module_name]
    last = module_name.rpartition(".")[2]
    return sys.modules.get(last) if last in _named.files else None


def source_files(kinds: Iterable[type]) -> dict[str, Path]:
    """The files that define those classes that are not part of ``imgcap_jax``, by the file names that a copy gets."""
    files: dict[str, Path] = {}
    for kind in sorted(kinds, key=class_name):
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if _OURS.fullmatch(kind.__module__) or file is None or not Path(file).is_file():
            continue
        name = f"{_module_name(kind).rpartition('.')[2]}.py"
        if files.setdefault(name, Path(file)) != Path(file):  # two modules of packages that end alike
            files[f"{_module_name(kind)}.py"] = Path(file)
    return files
