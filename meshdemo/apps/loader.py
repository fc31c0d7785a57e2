"""From what a user names (a built-in app, or a file) to an App, or to every problem and where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from meshdemo import positions
from meshdemo.apps.model import NAME_PATTERN, PATH_PATTERN, App, Route, Service, Workload
from meshdemo.errors import BadInput
from meshdemo.positions import one_of

_SUFFIX = ".yaml"
_PATTERNS = {
    NAME_PATTERN: "use up to 40 of a-z, 0-9 and '-', starting with a letter, not ending with '-'",
    PATH_PATTERN: "a path starts with '/'",
}


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
    document = positions.parse(text)
    problems = list(document.problems)
    if not problems:
        try:
            app = App.model_validate(document.data)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path = [step for step in detail["loc"] if step != "[key]"]
                path += getattr(detail.get("ctx", {}).get("error"), "path", ())
                at_key = detail["type"] == "extra_forbidden" or "[key]" in detail["loc"]
                place = document.key_at(path) if at_key else document.value_at(path)
                problems.append(positions.Problem(*place, _words(path, dict(detail))))
        else:
            problems += [
                positions.Problem(*document.value_at(path), message) for path, message in _unknown(app)
            ]
            if not problems:
                return app
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


def _unknown(app: App) -> Iterator[tuple[list[str | int], str]]:
    """The programs that meshdemo does not carry: where they stand, and words."""
    workloads = resources.files("meshdemo.workloads")
    for name, service in app.services.items():
        for version, workload in service.versions.items():
            program = workload.program
            if program is not None and not (workloads / f"{program.replace('.', '/')}.py").is_file():
                yield (
                    ["services", name, "versions", version, "program"],
                    f"no program '{program}' comes with meshdemo; a program of your own is a `command`",
                )


def _allowed(path: Sequence[Any]) -> list[str]:
    """The keys that may stand where the last step of `path` does."""
    model: type[BaseModel] = App
    if len(path) > 2:
        model = Service
    if len(path) > 4:
        model = Workload if path[2] == "versions" else Route
    return list(model.model_fields)


def _words(path: list[Any], error: Mapping[str, Any]) -> str:
    what = ".".join(str(step) for step in path) or "the app"
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key '{path[-1]}'; {one_of(str(path[-1]), _allowed(path))}"
        case "missing":
            return f"'{what}' is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_type" if isinstance(error["input"], int | float):
            return f"'{what}' must be text: write \"{error['input']}\" in quotes"
        case "string_pattern_mismatch":
            pattern = error["ctx"]["pattern"]
            return f"'{what}' is {error['input']!r}: {_PATTERNS.get(pattern, f'it must match {pattern}')}"
        case "model_type":
            return f"'{what}' must have keys and values"
        case _:
            message: str = error["msg"].replace("Input should", "it should")
            given = error["input"]
            is_ = f" is {given!r}" if isinstance(given, str | int | float) else ""
            return f"'{what}'{is_}: {message[0].lower()}{message[1:]}"
