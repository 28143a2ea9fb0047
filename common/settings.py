"""Settings, one way for every command: a frozen model, a TOML table, flags; flags win.

    defaults in the model  <  [section] of cascache.toml  <  flags

The model is the only list of settings there is: its fields become flags (`max_len` -> `--max-len`),
its attribute docstrings the help text, its bounds the checks. A tuple field may be given several times.
"""

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from common.errors import ConfigError, quote
from common.home import expand_home, expand_homes

DEFAULT_FILE = "cascache.toml"
"""Read from the working directory when it is there and no other file is named."""
_MOST_SHOWN = 200
"""Characters of an invalid value that an error repeats."""

Model = TypeVar("Model", bound=BaseModel)


def load_settings(
    model: type[Model],
    argv: Sequence[str],
    *,
    prog: str,
    section: str | None = None,
    epilog: str | None = None,
) -> Model:
    """Read a command's settings from its defaults, the TOML file and its flags.

    Args:
        model: Frozen pydantic model whose fields are the settings.
        argv: Arguments without the program's name.
        prog: Name shown in the help text.
        section: Table of the TOML file; `prog` when not given.
        epilog: Text below the list of flags, such as examples.

    Raises:
        ConfigError: An unknown or invalid setting, in the file or among the flags.
        SystemExit: `--help`, or flags that argparse itself refuses.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=model.__doc__,
        epilog=epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", default=None, help=f"TOML file with a [{section or prog}] table"
    )
    source = _flags(model, parser)
    arguments = parser.parse_args(list(argv))
    flags = _values(model, source, arguments)
    table = read_table(arguments.config, section or prog)
    _refuse_unknown(model, table, arguments.config or DEFAULT_FILE, section or prog)
    return validate_settings(model, {**table, **flags}, prog)


def read_table(path: str | None, section: str) -> dict[str, Any]:
    """Return one table of a TOML file with its keys in field spelling.

    Args:
        path: The file; None means `cascache.toml` here, or nothing if there is none.
        section: Name of the table.

    Raises:
        ConfigError: The named file is missing, or is not TOML.
    """
    file = Path(expand_home(path or DEFAULT_FILE))
    if not file.exists():
        if path is None:
            return {}
        raise ConfigError(f"settings file {file} does not exist; name another with --config")
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} is not valid TOML: {error}; fix it or name another with --config"
        ) from error
    table = tables.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: [{section}] is a {type(table).__name__}, wanted a table of settings")
    return {key.replace("-", "_"): value for key, value in table.items()}


def _values(
    model: type[BaseModel], source: CliSettingsSource[Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Values of the flags that were given, by field."""
    # The library would split what a flag got at commas and take quotes off: a path is what the shell passed.
    tuples = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is tuple}
    given = vars(arguments)
    lists = {name: tuple(values) for name, values in given.items() if name in tuples and values is not None}
    others = {name: value for name, value in given.items() if name not in lists}
    return {**source(parsed_args=argparse.Namespace(**others))(), **lists}


def _flags(model: type[BaseModel], parser: argparse.ArgumentParser) -> CliSettingsSource[Any]:
    class Flags(BaseSettings, model):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(
            cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True, cli_avoid_json=True
        )

    fields = Flags.__pydantic_fields__
    for name in [name for name in fields if name not in model.__annotations__]:
        fields[name] = fields.pop(name)  # inherited settings come last in the help
    return CliSettingsSource(
        Flags, root_parser=parser, case_sensitive=True, add_argument_method=_add_argument
    )


def _add_argument(parser: Any, *names: str, **options: Any) -> Any:
    """Add a flag with a metavar that a person would write."""
    metavar = options.get("metavar")
    if isinstance(metavar, str) and not metavar.startswith("{"):
        options["metavar"] = _METAVARS.get(metavar, metavar.split("[")[0].upper())
    return parser.add_argument(*names, **options)


_METAVARS = {
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "tuple[str,...]": "TEXT",
    "tuple[float,...]": "X",
    "dict[str,str]": "KEY=VALUE",
    "dict[str,JSON]": "KEY=VALUE",
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _refuse_unknown(model: type[BaseModel], table: Mapping[str, Any], file: str, section: str) -> None:
    for key in table:
        if key not in model.model_fields:
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(model.model_fields)}"
            raise ConfigError(f"{file} [{section}] has an unknown setting {key!r}; {hint}")


def validate_settings(model: type[Model], values: Mapping[str, Any], prog: str) -> Model:
    """Settings from values by name, a home directory in their paths expanded.

    Raises:
        ConfigError: Names every invalid flag, its value and the reason.
    """
    try:
        return model.model_validate(expand_homes(values))
    except ValidationError as error:
        problems = map(_tell, error.errors(include_url=False))
        raise ConfigError(f"{'; '.join(problems)}; see {prog} --help") from error


def _tell(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems: the flag, the reason, and what was found where that is not quoted in it."""
    said, found = str(problem["msg"]).removeprefix("Value error, "), problem["input"]
    if not problem["loc"]:  # the whole model: what was found is every setting
        return said
    flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
    own = problem["type"] == "value_error"
    quoted = own and any(repr(each) in said for each in (found if isinstance(found, tuple) else [found]))
    said = said if said.startswith(f"{flag} ") else f"{flag}: {said}"
    return said if quoted else f"{said} (found {quote(found, _MOST_SHOWN)})"
