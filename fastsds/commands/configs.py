"""A command's config: typed dataclasses, from the command line and a YAML file, and back to YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import tyro
import yaml
from safetensors import SafetensorError

Config = TypeVar("Config")
FILE_NAME = "config.yaml"


class ConfigError(ValueError):
    """A config file that cannot be used; the message names the file, the option and what was expected."""


class UsageError(ValueError):
    """A command line that does not serve: an option that is missing, unknown, or has a value outside its range."""


def parse(kind: type[Config], arguments: Sequence[str], *, command: str, description: str = "") -> Config:
    """The config of a command from its arguments; those beside `--config file.yaml` override the file.

    Raises:
        ConfigError: a file that cannot be read, or options in it that do not exist or are of another type.
        UsageError: the arguments do not serve.
        SystemExit: help was asked for; or the arguments do not serve, and the main process says why.
    """
    rest, file = _take_file(arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=f"fastsds {command}",
                description=description or None,
                args=rest,
                default=tyro.MISSING_NONPROP if file is None else read_config(file, kind, command),
                console_outputs=is_main_process(),
            )
    except SystemExit as stop:
        if not stop.code or not is_main_process():
            raise
        raise UsageError(f"{_unboxed(complaint.getvalue())}; see fastsds {command} --help") from None


def read_config(path: Path, kind: type[Config], command: str = "") -> Config:
    """A config from a YAML file, where options that it lacks and that have no default are `tyro.MISSING`.

    The instance is for tyro, which makes the real one with the command line's options; nothing is validated but names
    and types.

    Raises:
        ConfigError: a file that cannot be read, or options in it that do not exist or are of another type, as in the
            file that another command than `command` wrote.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config: could not read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _partial(kind, {} if document is None else document, path, "")
    except ConfigError:
        writer = re.match(r"# fastsds (.+) --config ", text)
        if writer and command and writer[1] != command:
            raise ConfigError(f"config: {path} is of fastsds {writer[1]}, expected one of fastsds {command}") from None
        raise


def save_config(path: Path, config: Any, command: str) -> None:
    """Writes every option of a config, so that `fastsds <command> --config <path>` runs it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, config_text(config, command))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what writes `out`.

    Raises:
        OSError: it could not be written; the message names it and says why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if reason is None:  # already a message of ours
            raise
        raise OSError(f"out: could not write {out}: {reason}") from error


def config_text(config: Any, command: str) -> str:
    """Every option of a config as YAML, under the command line that reads it."""
    text = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
    return f"# fastsds {command} --config {FILE_NAME}\n{text}"


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings (by `to_json` where they have it), tuples as lists, paths as strings."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def is_main_process() -> bool:
    """Whether this is the process that speaks, as the launchers number them."""
    return os.environ.get("RANK", "0") == "0"


def default_workers() -> int:
    """Processes that read images: 4, or as many as the cores that this process may use, of which more is a warning."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def say(message: str) -> None:
    """Prints a line, in the main process."""
    if is_main_process():
        print(message, flush=True)


def _unboxed(text: str) -> str:
    """What tyro says in a box of a title, a complaint and advice, with rules between them, in one line."""
    bare = re.sub(r"[╭╮╰╯│]|^[+|]|[+|]$", " ", text, flags=re.MULTILINE)
    _, said, *advice = (" ".join(part.split()) for part in re.split(r"[─-]{8,}", bare))
    if said.startswith("Missing from"):
        return f"expected {' and '.join(re.findall(r'(?<= )--[^ ]+', said))}, got none"
    unfit = re.match(r"Error parsing (\S+): no type matching (.+?) could be instantiated from \[(.*?)\]\.", said)
    if unfit is not None:
        return f"{unfit[1]}: expected {re.sub('[{}]', '', unfit[2]).replace('|', ' or ')}, got {unfit[3]}"
    close = [found[0] for part in advice if "you meant" in part and (found := re.search(r"--[\w.-]+", part))]
    return re.sub(r"^Error parsing \w+: ", "", said) + "".join(f"; did you mean {option}?" for option in close)


def _take_file(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    file: Path | None = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        if not given:
            raise ConfigError("config: expected a YAML file after --config, got none")
        file = Path(given)
    return rest, file


def _partial(kind: type[Any], values: Any, path: Path, prefix: str) -> Any:
    """An instance of `kind` that was not validated."""
    if not isinstance(values, dict):
        where = f"{prefix.rstrip('.')} in {path}" if prefix else str(path)
        raise ConfigError(f"config: expected options by name in {where}, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise ConfigError(f"config: {path} has {prefix}{name}, which is no option; {_advice(str(name), fields)}")
    instance = object.__new__(kind)
    for name, field in fields.items():
        if name in values and dataclasses.is_dataclass(hints[name]):
            value = _partial(typing.cast(type, hints[name]), values[name], path, f"{prefix}{name}.")
        elif name in values:
            try:
                value = _coerce(values[name], hints[name])
            except TypeError:
                raise ConfigError(
                    f"config: {path}: {prefix}{name}: expected {_spell(hints[name])}, got {values[name]!r:.80}"
                ) from None
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif dataclasses.is_dataclass(hints[name]):
            value = _partial(typing.cast(type, hints[name]), {}, path, f"{prefix}{name}.")
        else:
            value = tyro.MISSING
        object.__setattr__(instance, name, value)
    return instance


def _advice(name: str, names: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def _coerce(value: Any, kind: Any) -> Any:
    """`value` as YAML has it, as an instance of the annotation `kind`.

    Raises:
        TypeError: it is none.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return _coerce(value, part)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == part and type(value) is type(part) for part in parts):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            kinds = [parts[0]] * len(value) if parts[1:] == (...,) else list(parts)
            if len(kinds) == len(value):
                return tuple(_coerce(item, part) for item, part in zip(value, kinds, strict=True))
    elif kind is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)  # YAML has 5e-5, without a dot, as a text
            except ValueError:
                raise TypeError from None
    elif kind is Path:
        if isinstance(value, str):
            return Path(value)
    elif kind is type(None) or kind is None:
        if value is None:
            return None
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError


def _spell(kind: Any) -> str:
    """An annotation as a user reads it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        if parts[1:] == (...,):
            return f"a list of {_spell(parts[0])}"
        return f"a list of {len(parts)}: {', '.join(map(_spell, parts))}"
    names = {str: "text", float: "a number", int: "a whole number", bool: "true or false", Path: "a path"}
    return names.get(kind, "nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)))
