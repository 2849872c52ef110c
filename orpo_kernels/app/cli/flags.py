"""A dataclass of settings becomes the flags of a command.

    @command(TrainSettings)
    def train(settings: TrainSettings, output: Output) -> None:
        "What `--help` says."

Each field is a flag (or, `setting(..., argument=True)`, an argument) with the field's type, default and help. A file
given with `--config` (YAML or JSON: field names and values) takes the place of the defaults; flags overrule it. So the
settings that a run folder holds are a configuration file, too.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import yaml

from ..finetuning.settings import flag_of
from .console import Output
from .endings import end

Settings = TypeVar("Settings")


def command(kind: type[Settings]) -> Callable[[Callable[[Settings, Output], None]], Callable[..., None]]:
    """Make a function of settings and output the function that typer takes for a command."""

    def decorate(function: Callable[[Settings, Output], None]) -> Callable[..., None]:
        def run(context: typer.Context, config: Path | None, json: bool, **values: Any) -> None:
            output = Output(json)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, for their callers' authors
                    function(_settings(kind, context, values), output)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                raise typer.Exit(end(error, output, values.get("output"))) from error

        parameters = [_CONTEXT, *_parameters(kind), *_COMMON]
        run.__name__, run.__doc__ = function.__name__, inspect.getdoc(function)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _settings(kind: type[Settings], context: typer.Context, values: dict[str, Any]) -> Settings:
    """The settings; a flag that was typed has to have an effect, even if it says what is the default."""
    settings = kind(**values)
    typed = {name for name in values if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    if hasattr(settings, "check_company"):
        settings.check_company(typed)
    return settings


def _parameters(kind: type) -> list[inspect.Parameter]:
    types = get_type_hints(kind)
    return [
        _parameter(field.name, types[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(kind)
        if field.metadata
    ]


def _parameter(
    name: str, kind: Any, default: Any, argument: bool = False, both: bool = False, **options: Any
) -> inspect.Parameter:
    """`both`: a bool with a --no-... beside it."""
    names = [flag_of(name)] if kind is bool and not both else []
    declared: Any = typer.Argument(**options) if argument else typer.Option(*names, **options)
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the file's values be the defaults. Runs before the other flags are looked at."""
    if path is None or context.resilient_parsing:
        return path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # of many kinds: of the file, of its bytes, of YAML, of a date that is none
        raise typer.BadParameter(f"{path} cannot be read as YAML or JSON: {error}") from error
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} holds no settings; write a line `name: value` for each of them.")
    if unknown := sorted(str(name) for name in values.keys() - known):
        raise typer.BadParameter(f"{path} sets {', '.join(unknown)}, but the settings are {', '.join(sorted(known))}.")
    context.default_map = {name: _text(value) for name, value in values.items() if value is not None}
    return path


def _text(value: Any) -> Any:
    """A list as it would be typed: with commas."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_COMMON = [
    _parameter(
        "config",
        Path | None,
        None,
        help="A YAML or JSON file of settings by their names; flags overrule it.",
        callback=_read_config,
        is_eager=True,
        metavar="FILE",
    ),
    _parameter("json", bool, False, help="Print one JSON object for machines; all else goes to stderr."),
]
