"""From what a user names (a built-in app, or a file) to an App, or to every problem and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meshdemo.apps.model import App
from meshdemo.errors import BadInput

_SUFFIX = ".yaml"


def built_in() -> list[str]:
    """The names of the apps that meshdemo carries."""
    folder = resources.files("meshdemo.apps")
    return sorted(
        entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)
    )


def load(reference: str) -> App:
    """The app of a built-in name, or of a YAML file.

    Raises BadInput: no such app, or the file is not sound; then with every problem and where it stands.
    """
    name, text = _read(reference)
    from meshdemo import positions

    document = positions.parse(text)
    problems = list(document.problems)
    if not problems:
        try:
            return App.model_validate(document.data)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path = [step for step in detail["loc"] if step != "[key]"]
                at_key = detail["type"] == "extra_forbidden" or "[key]" in detail["loc"]
                place = document.key_at(path) if at_key else document.value_at(path)
                problems.append(positions.Problem(*place, _words(path, dict(detail))))
    lines = [f"{name}:{problem}" for problem in sorted(problems)]
    raise BadInput("\n  ".join(lines), f"built-in apps to start from: {', '.join(built_in())}")


def folder(reference: str) -> Path:
    """Where the commands of an app's workloads run: the folder of its file; of a built-in one, here."""
    return Path.cwd() if reference in built_in() else Path(reference).absolute().parent


def _read(reference: str) -> tuple[str, str]:
    if reference in built_in():
        return reference, (resources.files("meshdemo.apps") / (reference + _SUFFIX)).read_text("utf-8")
    path = Path(reference)
    try:
        return reference, path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from error
    except FileNotFoundError:
        raise BadInput(
            f"no app '{reference}': neither a built-in one nor a file", f"built-in: {', '.join(built_in())}"
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read app {path}: {error.strerror or error}") from error


def _words(path: list[Any], error: Mapping[str, Any]) -> str:
    what = ".".join(str(step) for step in path) or "the app"
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key '{path[-1]}'"
        case "missing":
            return f"'{what}' is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_type" if isinstance(error["input"], int | float):
            return f"'{what}' must be text: write \"{error['input']}\" in quotes"
        case "string_pattern_mismatch":
            return f"'{error['input']}' is no name that may stand there (pattern {error['ctx']['pattern']})"
        case "model_type":
            return f"'{what}' must have keys and values"
        case _:
            message: str = error["msg"]
            return f"'{what}': {message[0].lower()}{message[1:]}"
