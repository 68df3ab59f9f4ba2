"""One settings class gives a command its flags, its environment variables and its TOML keys.

Every field of a pydantic-settings class becomes a flag of the same name, so none of the three can be forgotten and
each default is written once. A flag beats the environment, which beats the file given with ``--config``, which beats
the default. In the file each command has its own table: ``[target]``, ``[draft]``, ``[coordinator]``, ``[up]``,
``[generate]``, ``[demo]``. Unknown keys are refused.
"""

from __future__ import annotations

import functools
import inspect
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from outrider.failures import BadUsage

SettingsT = TypeVar("SettingsT", bound=BaseSettings)

TABLES = frozenset({"target", "draft", "coordinator", "up", "generate", "demo", "bench", "simulate", "doctor"})

_METAVARS: Mapping[Any, str | None] = {bool: None, int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with defaults for these flags, one table per command."),
]


def with_settings(settings_type: type[SettingsT], table: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives the decorated command one flag per field; it is called with ``settings`` and its own parameters.

    The command may take ``config`` itself; ``--config`` exists either way.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in {"settings", "config"}
        ]
        flags = [_flag(settings_type, name, field) for name, field in settings_type.model_fields.items()]
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: _split(values.pop(name)) for name in settings_type.model_fields}
            given = {name: value for name, value in given.items() if value is not None}
            settings = load_settings(settings_type, table, values["config"], given)
            if "config" not in hints:
                del values["config"]
            command(settings=settings, **values)

        parameters = [*own, *flags, config]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def load_settings(
    settings_type: type[SettingsT], table: str, config: Path | None, flags: Mapping[str, object]
) -> SettingsT:
    """Settings from flags, environment and file. Raises `BadUsage` naming the flag, variable or key at fault."""
    from_file = {} if config is None else _keys_to_fields(settings_type, table, config)

    class WithFile(settings_type):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        return WithFile(**flags)
    except ValidationError as error:
        raise BadUsage("; ".join(_violation(settings_type, table, details) for details in error.errors())) from None
    except SettingsError as error:
        raise BadUsage(f"an OUTRIDER_* environment variable cannot be read: {error}") from None


def read_table(config: Path, table: str) -> dict[str, Any]:
    """One command's table of a TOML file; empty if it has none. Raises `BadUsage`."""
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadUsage(f"--config {config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadUsage(f"--config {config} is not TOML: {error}") from None
    unknown = sorted(key for key in document if key not in TABLES or not isinstance(document[key], dict))
    if unknown:
        raise BadUsage(f"--config {config}: unknown table [{unknown[0]}]; known are {', '.join(sorted(TABLES))}")
    found: dict[str, Any] = document.get(table, {})
    return found


def public_name(name: str) -> str:
    """The field's name in flags and files: ``as_json`` is ``json``, a name that pydantic keeps for itself."""
    return name.removeprefix("as_")


def environment_name(settings_type: type[BaseSettings], name: str) -> str:
    """The environment variable that sets a field."""
    alias = settings_type.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else (settings_type.model_config.get("env_prefix", "") + name).upper()


def flag_name(name: str, field: FieldInfo) -> str:
    """``max_k`` is ``--max-k``; a list such as ``targets`` is ``--target``, which may be repeated."""
    name = public_name(name)
    is_plural = _is_list(field.annotation) and not name.endswith("bias")
    return "--" + (name.removesuffix("s") if is_plural else name).replace("_", "-")


def _flag(settings_type: type[BaseSettings], name: str, field: FieldInfo) -> inspect.Parameter:
    """The field as a typer option whose default, None, means: not given here."""
    kind, metavar = _flag_type(field.annotation)
    flag = flag_name(name, field)
    declaration = f"{flag}/--no-{flag[2:]}" if kind is bool and field.get_default() is not False else flag
    text = " ".join((field.description or "").replace("``", "").split())
    notes = [environment_name(settings_type, name)]
    if not field.is_required() and field.get_default() not in (None, "", (), False):
        notes.append(f"default {field.get_default(call_default_factory=True)}")
    option = typer.Option(
        declaration, help=f"{text} ({'; '.join(notes)})".strip(), metavar=metavar, show_default=False, show_envvar=False
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag_type(annotation: Any) -> tuple[Any, str | None]:
    """What the flag takes, and how the help calls it; pydantic does the checking."""
    if get_origin(annotation) is Annotated:
        return _flag_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [argument for argument in get_args(annotation) if argument is not type(None)]
        return _flag_type(inner[0]) if len(inner) == 1 else (str, "TEXT")
    if _is_list(annotation):
        return list[str], "TEXT,..."
    if get_origin(annotation) is Literal:
        return str, "|".join(str(value) for value in get_args(annotation))
    return (annotation, _METAVARS[annotation]) if annotation in _METAVARS else (str, "TEXT")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list, frozenset, set)


def _split(value: Any) -> Any:
    """A repeated flag may also hold several values, separated by commas, as its environment twin does."""
    if not isinstance(value, list):
        return value
    return [part.strip() for item in value for part in item.split(",") if part.strip()] or None


def _keys_to_fields(settings_type: type[BaseSettings], table: str, config: Path) -> dict[str, Any]:
    fields = {public_name(name): name for name in settings_type.model_fields}
    keys = read_table(config, table)
    unknown = sorted(set(keys) - set(fields))
    if unknown:
        raise BadUsage(
            f"--config {config}: unknown key {unknown[0]!r} in [{table}]; known are {', '.join(sorted(fields))}"
        )
    return {fields[key]: value for key, value in keys.items()}


def _violation(settings_type: type[BaseSettings], table: str, details: Mapping[str, Any]) -> str:
    """One pydantic complaint in one line, naming the flag and its twins."""
    name = str(details["loc"][0]) if details["loc"] else ""
    message = str(details["msg"]).removeprefix("Value error, ")
    if name not in settings_type.model_fields:
        return f"{name}: {message}" if name else message
    flag = flag_name(name, settings_type.model_fields[name])
    variable, key = environment_name(settings_type, name), public_name(name)
    if details["type"] == "missing":
        return f"{flag} is missing (or set {variable}, or {key} in [{table}] of a --config file)"
    told = f"{flag} ({variable}, or {key} in [{table}]): {message[:1].lower()}{message[1:]}"
    given = repr(details["input"])
    return told if given in message else f"{told}, got {given}"
