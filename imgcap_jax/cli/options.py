"""Command-line options made from settings: one option per field, by tyro, for every command."""

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructTypeInfo

from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import NAMES, Tokenizer, find_tokenizer
from imgcap_jax.user_code import class_name

Settings = TypeVar("Settings")

_CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed)
_registry = ConstructorRegistry()
_names_registry = ConstructorRegistry()  # used if the settings contain a value that an option can name


def _is_named(value: Any) -> bool:
    """Whether an option takes the value's name, because it has no fields that could be options."""
    return type(value) in NAMES.values() and not dataclasses.fields(value)


def _has_named(settings: Any) -> bool:
    return _is_named(settings) or (
        dataclasses.is_dataclass(settings)
        and any(_has_named(getattr(settings, item.name)) for item in dataclasses.fields(settings))
    )


@_names_registry.primitive_rule
def _named_tokenizer(info: Any) -> PrimitiveConstructorSpec[Tokenizer] | None:
    if info.type is not Tokenizer:
        return None

    def read(arguments: list[str]) -> Tokenizer:
        try:
            return find_tokenizer(arguments[0])
        except UserError as error:
            raise ValueError(str(error)) from error

    names: dict[type, str] = {kind: name for name, kind in NAMES.items()}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(NAMES)},MODULE:CLASS}}",
        instance_from_str=read,
        is_instance=lambda value: hasattr(value, "join"),
        str_from_instance=lambda value: [names.get(type(value)) or class_name(type(value))],
    )


@_registry.struct_rule
def _class_of_default(info: StructTypeInfo) -> Any:
    """A field that is typed by a contract has the options of the class of its value."""
    value = info.default
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or info.type is type(value) or _is_named(value):
        return None
    return _registry.get_struct_spec(StructTypeInfo.make(type(value), value, info.in_union_context))


@_registry.primitive_rule
def _true_or_false(info: Any) -> PrimitiveConstructorSpec[bool] | None:
    if info.type is not bool:
        return None
    values = {"true": True, "false": False}

    def read(arguments: list[str]) -> bool:
        if arguments[0].lower() not in values:
            raise ValueError(f"{arguments[0]!r} is neither true nor false")
        return values[arguments[0].lower()]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


@_registry.primitive_rule
def _comma_separated(info: Any) -> PrimitiveConstructorSpec[tuple[str, ...]] | None:
    """Lists of words are one argument, so that a sweep can have several of them."""
    if info.type != tuple[str, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR,STR,...",
        instance_from_str=lambda arguments: tuple(word.strip() for word in arguments[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(word, str) for word in value),
        str_from_instance=lambda value: [",".join(value)],
    )


def override(settings: Settings, arguments: Sequence[str], *, prefix: str = "") -> Settings:
    """Replaces fields of settings by options such as ``--decoder.hidden-size 768``.

    Args:
        settings: a frozen dataclass, whose fields can be settings too.
        arguments: the options and their values.
        prefix: put before all names: with "decode", ``--decode.beam 3``.

    Raises:
        UserError: an option that does not exist (the nearest one is named), a value of the wrong type, or settings that
            refuse a value.
    """
    known = option_names(settings, prefix=prefix)
    for argument in arguments:
        option = argument.split("=", 1)[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            raise unknown_option(argument.split("=", 1)[0], known)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            return _parse(settings, arguments, prefix)
    except UserError as error:
        raise UserError(as_typed(str(error), arguments)) from error
    except SystemExit as error:
        # Tyro frames its message: title, rule, reason, rule, pointers to help.
        plain = re.sub("[─━│╭╮╰╯]+", "-", messages.getvalue())
        parts = [" ".join(part.split()) for part in re.split("-{5,}", plain)]
        reason = parts[1] if len(parts) > 1 else " ".join(parts)
        raise UserError(f"{_plain(reason, arguments)}; --help lists the options") from error


def _plain(reason: str, arguments: Sequence[str]) -> str:
    """A message of tyro, without the terms of Python for numbers."""
    if found := re.fullmatch(r"Error parsing (\S+): could not convert string to float: (.*)", reason):
        return as_typed(f"{found[1]} is {found[2]}; it must be a number", arguments)
    if found := re.fullmatch(r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", reason):
        return as_typed(f"{found[1]} is {found[2]}; it must be a whole number", arguments)
    if found := re.fullmatch(r"Missing value for argument '(\S+)'\. Expected 1 values\.", reason):
        return f"{found[1]} has no value; give one"
    return reason


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """A message of settings about their fields, with the name that the user typed for each field that options set.

    The field of ``--decode.top-p`` is ``decode.top_p``. Messages of ``Decoding`` begin with the bare name
    ``top_p``, because the prefix differs between commands.
    """
    for option in dict.fromkeys(argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        field = option.removeprefix("--").replace("-", "_")
        message = re.sub(rf"(?<![\w.-]){re.escape(field)}(?!\w)", option, message)
        if found := re.fullmatch(r"decod(?:e|ing)\.(\w+)", field):
            message = re.sub(rf"\A{found[1]}(?!\w)", option, message)
    return message


def options_help(settings: Any, *, prefix: str = "", command: str) -> str:
    """The options of settings with their present values, for ``--help``."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _parse(settings, ["--help"], prefix, command)
    # The command prints its own usage and --help. What follows them are the options.
    printed = re.sub(r"\A.*?show this help message and exit\s*\n(?:[ │╰─╯]*\n)*", "", text.getvalue(), flags=re.DOTALL)
    return _filled(printed)


def _filled(printed: str) -> str:
    """Fills each paragraph of the options anew, because tyro keeps the line breaks of docstrings and adds its own."""
    indent = " " * 8
    lines: list[str] = []
    for line in map(str.rstrip, printed.splitlines()):
        continues = re.match(rf"{indent}[\w(]", line) and lines and re.match(rf"{indent}\S", lines[-1])
        if continues:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "".join(f"{wrapper.fill(line) if line.startswith(indent) else line}\n" for line in lines)


def _parse(settings: Settings, arguments: Sequence[str], prefix: str, command: str | None = None) -> Settings:
    kind: Any = type(settings)
    if prefix:
        kind = dataclasses.make_dataclass("Options", [(prefix, kind)], frozen=True)
    with _names_registry if _has_named(settings) else contextlib.nullcontext():
        parsed: Any = tyro.cli(
            kind,
            default=kind(settings) if prefix else settings,
            args=list(arguments),
            config=_CONFIG,
            registry=_registry,
            prog=command,
        )
    result: Settings = getattr(parsed, prefix) if prefix else parsed
    return result


def option_names(settings: Any, *, prefix: str = "") -> list[str]:
    """The options of settings, as ``--decoder.hidden-size``."""
    return [f"--{name}" for name in _names(settings, f"{prefix}." if prefix else "")]


def _names(settings: Any, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        name = f"{prefix}{item.name.replace('_', '-')}"
        parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
        nested = [(f"{name}.{key}." if key != "" else f"{name}.", part) for key, part in parts]
        if nested and all(dataclasses.is_dataclass(part) and not _is_named(part) for _, part in nested):
            for inner, part in nested:
                yield from _names(part, inner)
        else:
            yield name


def unknown_option(option: str, known: Sequence[str]) -> UserError:
    """The error for an option that does not exist, with the nearest one that does, if one is near.

    Options are compared by the part after the last dot: ``--epochs`` is near ``--training.epochs``. A name of initials
    is near the whole name: ``--lr`` is near ``--optimizer.learning-rate``.
    """
    asked, name = option.replace("_", "-"), _last_part(option.replace("_", "-"))
    lasts = {one: _last_part(one) for one in known}
    near = {name} if name in lasts.values() else {last for last in lasts.values() if _initials(last) == name}
    near = near or set(difflib.get_close_matches(name, set(lasts.values()), n=1, cutoff=_NEAR))
    # If several options have this last part, the rest decides.
    found = difflib.get_close_matches(asked, [one for one in known if lasts[one] in near], n=1, cutoff=0.0)
    return UserError(f"unknown option {option}; {f'did you mean {found[0]}?' if found else '--help lists the options'}")


def _last_part(option: str) -> str:
    return option.removeprefix("--").rpartition(".")[2]


def _initials(name: str) -> str:
    words = name.split("-")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


_NEAR = 0.65  # difflib's similarity of two names, 0 to 1
