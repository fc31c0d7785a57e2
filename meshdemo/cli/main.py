"""The frame of the command line: which commands there are, the global options, and how errors end.

Command modules are loaded only when their command runs, and help and completion are answered from the
table below, so that `meshdemo stat` does not pay for gRPC, Kubernetes or Envoy's messages. A command
module has either `command(ctx, ...)`, a typed function, or `app`, a Typer with subcommands.

The global options are parameters of every command too: `meshdemo -o json stat` and
`meshdemo stat -o json` mean the same, and where both are given the later one wins.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from meshdemo import __version__
from meshdemo.cli._context import Context, Output
from meshdemo.cli._examples import below
from meshdemo.errors import BadInput, MeshdemoError

# name: (heading in the help, module under meshdemo.cli, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "check": ("Life cycle", "check", "What is installed, what is missing and how to get it."),
    "up": ("Life cycle", "up", "Bring the mesh up, or finish and change a running one."),
    "status": ("Life cycle", "status", "What runs."),
    "down": ("Life cycle", "down", "Remove everything that `up` made."),
    "demo": ("Life cycle", "demo", "The whole story in about a minute: up, break, heal, report, down."),
    "logs": ("Life cycle", "logs", "Logs of instances, sidecars and the control plane."),
    "render": ("Life cycle", "render", "Print what would be applied or pushed."),
    "fault": ("Break", "fault", "Break something on purpose; `fault list`, `fault clear`."),
    "stat": ("See", "stat", "Requests/s, success rate and latency, one row each."),
    "edges": ("See", "edges", "Who calls whom, and whether it is secured."),
    "tap": ("See", "tap", "Single requests, live."),
    "top": ("See", "top", "The live table of routes."),
    "dashboard": ("See", "dashboard", "The web page of the mesh."),
    "load": ("Shape traffic and access", "load", "Set the load that service-a makes."),
    "traffic": ("Shape traffic and access", "traffic", "Splits, timeouts, retries, circuit breakers."),
    "canary": ("Shape traffic and access", "canary", "Shift traffic step by step while objectives hold."),
    "access": ("Shape traffic and access", "access", "Who may call whom."),
    "identity": ("Shape traffic and access", "identity", "The certificates of the mesh, and their rotation."),
    "inject": ("Shape traffic and access", "inject", "Put a sidecar into every workload of manifests."),
    "uninject": ("Shape traffic and access", "uninject", "Take those sidecars out again."),
    "watch": ("Heal", "watch", "Judge, localise and heal by policy, with a live dashboard."),
    "policy": ("Heal", "policy", "Check a policy file, or test it on recorded signals."),
    "report": ("Heal", "report", "The incidents so far, and what they cost."),
    "bench": ("Measure", "bench", "What the mesh costs and how fast it heals, beside alternatives."),
}

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class LazyGroup(TyperGroup):
    """A group that knows its commands from `COMMANDS` and imports one only when it is run or completed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (heading, _, line) in COMMANDS.items():
            stub = TyperCommand(name, help=line, rich_help_panel=heading)
            self.add_command(stub)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The loaded command in place of its one line stub."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, load(name) if stub is not None and name is not None else None, rest


def load(name: str) -> Any:
    """Import a command's module and give the command, with the global options added."""
    _, module_name, line = COMMANDS[name]
    module = import_module(f"meshdemo.cli.{module_name}")
    if hasattr(module, "app"):
        command: Any = typer.main.get_group(module.app)
    else:
        app = typer.Typer(add_completion=False)
        app.command(name, help=module.command.__doc__ or line)(module.command)
        command = typer.main.get_command(app)
    command.name = name
    command.epilog = below(name)
    for child_name, child in getattr(command, "commands", {}).items():
        child.epilog = below(f"{name} {child_name}")
    _add_globals(command, typer.main.get_command(_globals).params)
    return command


def _add_globals(command: Any, options: list[Any]) -> None:
    command.params.extend(options)
    for child in getattr(command, "commands", {}).values():
        _add_globals(child, options)


def _set_name(ctx: typer.Context, value: str | None) -> str | None:
    if value is not None:
        if not _NAME.fullmatch(value):
            raise BadInput(
                f"--name {value!r} is not a name for a mesh",
                "use up to 40 of a-z, 0-9 and '-', starting with a letter, not ending with '-'",
            )
        ctx.ensure_object(Context).name = value
    return value


def _set_output(ctx: typer.Context, value: Output | None) -> Output | None:
    if value is not None:
        ctx.ensure_object(Context).output = value
    return value


def _set_verbose(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.ensure_object(Context).verbose = True
    return value


def _print_version(value: bool) -> bool:
    if value:
        print(f"meshdemo {__version__}")
        raise typer.Exit
    return value


_NameOption = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="Which mesh (default: mesh-demo).", callback=_set_name,
        expose_value=False, show_default=False, rich_help_panel="Global options",
    ),
]  # fmt: skip
_OutputOption = Annotated[
    Output | None,
    typer.Option(
        "--output", "-o", help="Form of the output (default: text).", callback=_set_output,
        expose_value=False, show_default=False, rich_help_panel="Global options",
    ),
]  # fmt: skip
_VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Say more; show tracebacks.", callback=_set_verbose,
        expose_value=False, show_default=False, rich_help_panel="Global options",
    ),
]  # fmt: skip

_globals = typer.Typer(add_completion=False)


@_globals.command()
def _global_options(
    name: _NameOption = None, output: _OutputOption = None, verbose: _VerboseOption = False
) -> None:
    """Never run: it carries the options that every command has."""


app = typer.Typer(
    name="meshdemo",
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def meshdemo(
    name: _NameOption = None,
    output: _OutputOption = None,
    verbose: _VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Bring up a small but real service mesh, break it on purpose, see it and heal it."""


def run(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the `meshdemo` script: run the command and exit with its status."""
    context = Context()
    if sys.stdout is None:  # started with `>&-`
        _complain("stdout is closed", "send it somewhere, or to /dev/null", context, None)
        sys.exit(1)
    try:
        status = typer.main.get_command(app).main(
            args=argv, prog_name="meshdemo", standalone_mode=False, obj=context
        )
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        status = 1
    except KeyboardInterrupt:
        status = 130
    except BadInput as error:
        _complain(str(error), "", context, error)  # on one line: what was typed and what is allowed
        status = error.exit_status
    except MeshdemoError as error:
        _complain(error.message, error.remedy, context, error)
        status = error.exit_status
    except typer.Abort:
        status = 1
    except typer.TyperException as error:
        # A usage error of the command line itself; those of Typer's help (no arguments) carry no message.
        if message := plainly(error.format_message()):
            where = getattr(getattr(error, "ctx", None), "command_path", "meshdemo")
            _complain(f"{message.rstrip('.')} (see `{where} --help`)", "", context, None)
        status = getattr(error, "exit_code", 2)
    except OSError as error:
        # What happens to a file carries its name; what is left is what was printed.
        if error.filename is None and error.errno in _FULL:
            _complain(f"cannot write to stdout: {error.strerror}", "", context, error)
            _close_stdout()
        else:
            _complain_internal(error, context)
        status = 1
    except Exception as error:
        _complain_internal(error, context)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


_INVALID = re.compile(
    r"Invalid value for '(?P<option>[^']+)'(?: / '[^']+')?: (?P<value>.*?) is not (?P<wrong>.*)"
)
_RANGE = re.compile(r"in the range (?:(?P<low>\S+)<=)?x(?:(?P<sign>[<>]=)(?P<limit>\S+))?")


def plainly(message: str) -> str:
    """A complaint of the parser in the words of all others: the option, the value, what is allowed."""
    if (found := _INVALID.fullmatch(message.rstrip("."))) is None:
        return message
    option, value, wrong = found["option"], found["value"], found["wrong"]
    if wrong.startswith("a valid"):
        allowed = "give a whole number" if "int" in wrong else "give a number"
    elif wrong.startswith("one of"):
        allowed = f"allowed is {wrong.removeprefix('one of ').replace(chr(39), '')}"
    elif (span := _RANGE.fullmatch(wrong)) is not None:
        if span["low"]:
            allowed = f"allowed is {span['low']} to {span['limit']}"
        else:
            allowed = f"allowed is {span['limit']} or {'more' if span['sign'] == '>=' else 'less'}"
    else:
        return message
    return f"{option} {value}: {allowed}"


def _complain_internal(error: Exception, context: Context) -> None:
    _complain(
        f"internal error: {type(error).__name__}: {error}",
        "" if context.verbose else "run it again with --verbose for the traceback, and report it",
        context,
        error,
    )


def _complain(message: str, remedy: str, context: Context, error: BaseException | None) -> None:
    if context.verbose and error is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print(f"meshdemo: {context.naming(message)}", file=sys.stderr)
    if remedy:
        print(f"  {context.naming(remedy)}", file=sys.stderr)


def _close_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain about the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
