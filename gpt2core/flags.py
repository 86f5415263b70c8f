"""Command-line flags made from the models of config.py, and errors as one sentence."""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from gpt2core.config import MODEL_SIZES, RECIPES, RunConfig, Settings, first_error
from gpt2core.storage import Location, read_text

Group = TypeVar("Group", bound=Settings)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and names the flag that a misspelt one resembles."""

    def __init__(self, prog: str, description: str = "") -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = next((word for word in message.split() if word.startswith("--")), "")
            known = [option for action in self._actions for option in action.option_strings]
            if close := difflib.get_close_matches(unknown.split("=")[0], known, n=1):
                message += f" (did you mean {close[0]}?)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_settings(parser: argparse.ArgumentParser, settings: type[Settings], only: set[str] | None = None) -> None:
    """Adds one flag a field; a field that is itself a group of settings adds its own flags."""
    group = parser.add_argument_group(settings.__name__, (settings.__doc__ or "").splitlines()[0])
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            add_settings(parser, field.annotation, only)
        elif only is None or name in only:
            options: dict[str, Any] = {"help": f"{field.description} [{field.default}]", "default": argparse.SUPPRESS}
            if field.annotation is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif choices := _choices(field.annotation):
                options["metavar"] = "{" + ",".join(choices) + "}"
            else:
                options["metavar"] = "X"
            group.add_argument(f"--{name}", **options)


def _choices(annotation: Any) -> list[str] | None:
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else None


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds what a configuration starts from, before single flags change it."""
    group = parser.add_argument_group("starting point")
    group.add_argument("--recipe", choices=sorted(RECIPES), default="gpt2_124m", help="named set of defaults")
    group.add_argument("--config", metavar="FILE", help="config.json to take instead of a recipe")
    group.add_argument("--model_size", choices=list(MODEL_SIZES), help="num_layers, embd_size and num_heads by name")


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the recipe or file and the flags together describe."""
    given = vars(arguments)
    start = read_config(Path(given["config"])) if given.get("config") else RECIPES[given.get("recipe", "gpt2_124m")]
    nested = start.model_dump()
    if size := given.get("model_size"):
        for name in ("num_layers", "embd_size", "num_heads"):
            nested["model"][name] = getattr(MODEL_SIZES[size], name)
    for group in (nested, *(value for value in nested.values() if isinstance(value, dict))):
        group.update({name: given[name] for name in group if name in given})
    return RunConfig.model_validate(nested)


def as_flags(settings: Settings) -> list[str]:
    """The command line that says these settings."""
    flags = []
    for name, value in settings.model_dump().items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def settings_of(group: type[Group], arguments: argparse.Namespace) -> Group:
    """A group of settings that is no part of the run's configuration, from its flags."""
    return group(**{name: value for name, value in vars(arguments).items() if name in group.model_fields})


def read_config(path: Location) -> RunConfig:
    """The configuration in a config.json. Raises ValueError when there is none or it is not one."""
    try:
        return RunConfig.model_validate_json(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such configuration file") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: it is not UTF-8") from None


NON_FINITE = 3  # exit code of a run that stopped because its gradients are not finite
# A file server that is away for a while, a disk that did not answer this time.
MAY_PASS = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EINTR,
}
TRY_AGAIN = 75  # exit code when something outside failed that may work later (EX_TEMPFAIL of sysexits.h)


def main_guard(main: Callable[[], int | None], program: str | None = None) -> NoReturn:
    """Runs a command's main; what the user can put right ends as one sentence on stderr and exit code 1.

    In front of the sentence stands `program`, else `python -m` and the module that runs.
    """
    program = program or _running_program()
    try:
        sys.exit(main() or 0)
    except ValidationError as error:
        _fail(program, first_error(error))
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl+C: 128 + SIGINT
    except BrokenPipeError:
        sys.exit(141)  # the reader of our output went away, as `| head` does: 128 + SIGPIPE
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(program, str(error), exit_code(error))


def exit_code(error: Exception) -> int:
    """What a process ends with that this error ends."""
    may_pass = isinstance(error, ConnectionError | ChildProcessError | BlockingIOError | TimeoutError)
    if may_pass or (isinstance(error, OSError) and error.errno in MAY_PASS):
        return TRY_AGAIN
    return NON_FINITE if isinstance(error, FloatingPointError) else 1


def _running_program() -> str:
    spec = sys.modules["__main__"].__spec__  # None for a script
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _fail(program: str, sentence: str, code: int = 1) -> NoReturn:
    what = "error, which may pass" if code == TRY_AGAIN else "error"
    print(f"{program}: {what}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
