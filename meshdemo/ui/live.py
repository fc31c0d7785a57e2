"""The screen of `meshdemo watch`, drawn from one `WatchView` and nothing else.

`lines` is pure: a view and a size in, exactly fitting lines out. Nothing wraps and nothing overflows: a row
that is too long is cut with an ellipsis, a section with too many rows shows those that matter most and says
how many it left out. Up to 139 columns the sections are stacked, from 140 on they stand side by side.
Every state is a symbol and a word, so that nothing hangs on colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from rich.cells import cell_len
from rich.text import Text

from meshdemo.ui import columns
from meshdemo.ui import format as fmt
from meshdemo.ui.columns import Figures

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

    from meshdemo.remediation.view import (
        IncidentView,
        LogLine,
        Numbers,
        ObjectiveView,
        ServiceView,
        Trend,
        WatchView,
    )

SIDE_BY_SIDE = 140
_RIGHT_SHARE = 0.42
_TOP_SHARE = 0.6
_NARROW = 76

# state -> symbol, word, style
STATES: dict[str, tuple[str, str, str]] = {
    "ok": ("✓", "ok", "green"),
    "unknown": ("?", "unknown", "yellow"),
    "violated": ("✗", "violated", "bold red"),
    "healing": ("↻", "healing", "bold yellow"),
    "serving": ("●", "serving", "green"),
    "ejected": ("⊘", "ejected", "magenta"),
    "silent": ("?", "silent", "yellow"),
    "starting": ("◌", "starting", "cyan"),
    "bad": ("✗", "bad", "bold red"),
    "localising": ("✗", "localising", "bold red"),
    "blocked": ("✗", "blocked", "bold red"),
    "acting": ("↻", "acting", "bold yellow"),
    "verifying": ("↻", "verifying", "bold yellow"),
    "waiting": ("↻", "waiting", "bold yellow"),
    "gave_up": ("✗", "gave up", "bold red"),
    "healed": ("✓", "healed", "green"),
}
_EVENT_STYLES = {
    "violated": "red", "gave_up": "bold red", "error": "red", "blocked": "yellow", "acted": "cyan",
    "escalated": "yellow", "healed": "green", "verified": "green",
}  # fmt: skip
_MOST_URGENT_FIRST = ("violated", "healing", "ok")
_ASCII = str.maketrans("✓✗●◌⊘↻·…→│─█░▁▂▃▄▅▆▇", "+x*o#~-~>|-#._.-=+*#")


class Screen:
    """A view as rich draws it, at whatever size the terminal has at that moment."""

    def __init__(self, view: WatchView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        drawn = lines(self._view, options.max_width, height)
        for number, line in enumerate(drawn, start=1):
            if options.ascii_only:
                line.plain = line.plain.translate(_ASCII)
            line.end = "" if number == len(drawn) else "\n"
            yield line


class Display(Protocol):
    """Where `watch` shows its views: the live screen, or lines."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, view: WatchView) -> None:
        """Show a newer view."""
        ...


class LiveDisplay:
    """The whole terminal, drawn anew with each view; what was there before comes back at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.live import Live

        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: WatchView) -> None:
        """Show a newer view."""
        if self._live is not None:
            self._live.update(Screen(view), refresh=True)


class PlainDisplay:
    """One line for each event, for logs and for terminals that cannot do better."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._last: LogLine | None = None
        self._connected = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put back."""

    def show(self, view: WatchView) -> None:
        """Print what the view has in its log that the one before had not."""
        if view.connected != self._connected:
            self._connected = view.connected
            words = "answers again" if view.connected else "does not answer"
            self._write(f"{fmt.clock(view.now)} the control plane {words}")
        log = list(view.log)
        known = log.index(self._last) + 1 if self._last in log else 0
        for line in log[known:]:
            self._write(event_line(line))
        if log:
            self._last = log[-1]


def event_line(line: LogLine) -> str:
    """One event of watch on one line."""
    return f"{fmt.clock(line.time)} {line.event:<10} {line.text}"


def lines(view: WatchView, width: int, height: int) -> list[Text]:
    """The screen as at most `height` lines of at most `width` cells."""
    head = _head(view, width, height)
    body = _wide(view, width, height - len(head)) if width >= SIDE_BY_SIDE else None
    if body is None:
        sections = [_services(view, width), _objectives(view, width), _incidents(view, width)]
        body = _stack([*sections, _log(view, width)], height - len(head))
    drawn = [*head, *body][:height]
    for line in drawn:
        line.truncate(width, overflow="ellipsis")
    return drawn


def _wide(view: WatchView, width: int, height: int) -> list[Text]:
    """The body on a wide screen: services above the rest while they are few, beside it when they are many."""
    services = _services(view, width)
    top = len(services.rows) + 2
    if top <= height * _TOP_SHARE:
        left_width = (width - 3) // 2
        right_width = width - 3 - left_width
        room = height - top
        left = _stack([_objectives(view, left_width), _incidents(view, left_width)], room)
        below = _beside(left, left_width, _stack([_log(view, right_width)], room), room)
        return [*_stack([services], top - 1), Text(), *below]
    right_width = int(width * _RIGHT_SHARE)
    left_width = width - right_width - 3
    sections = [_objectives(view, right_width), _incidents(view, right_width), _log(view, right_width)]
    return _beside(
        _stack([_services(view, left_width)], height), left_width, _stack(sections, height), height
    )


# -- the head: what watch is doing, and why ----------------------------------------------------------------


def _head(view: WatchView, width: int, height: int) -> list[Text]:
    policy = view.policy if width >= SIDE_BY_SIDE else view.policy.rpartition("/")[2]
    title = Text.assemble(
        (" meshdemo watch ", "bold reverse"), " ", (view.mesh, "bold"), f" · {view.runtime} · {policy}"
    )
    if view.dry_run:
        title.append(" · dry run", "bold yellow")
    clock = Text(f"actions {view.actions_used}/{view.actions_allowed} · {fmt.clock(view.now)}", "dim")
    head = [_ends(title, clock, width)]
    if view.connected:
        worst = _worst(view.services)
        symbol, word, style = STATES[worst]
        head.append(Text.assemble((f" {symbol} {word}: ", style), view.doing))
    else:
        head.append(Text(" ✗ the control plane does not answer; what follows is old", "bold red"))
    head.append(Text(f"   why: {view.why}" if view.why else "", "dim"))
    if view.faults and height >= 20:
        head.append(Text(f"   faults in force: {'; '.join(view.faults)}", "yellow"))
    return head


def _worst(services: Sequence[ServiceView]) -> str:
    """How the whole stands. A service that nobody calls is unknown, and casts no doubt on the others."""
    states = {service.health for service in services}
    return next((state for state in _MOST_URGENT_FIRST if state in states), "unknown")


# -- sections: a heading and rows, each with a weight that says which to keep ------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    draw: Callable[[], Text]  # called for rows that are shown only: of 500 instances those are few
    weight: int = 0  # larger: left out later


@dataclass(frozen=True, slots=True)
class _Section:
    heading: Text
    rows: Sequence[_Row]
    least: int  # rows to keep even when there is little room
    empty: str = ""  # said instead of rows
    newest_last: bool = False


def _stack(sections: Sequence[_Section], height: int) -> list[Text]:
    """Sections below each other in `height` lines; room that one does not need goes to those below."""
    wants = [max(1, len(section.rows)) for section in sections]
    room = height - len(sections)
    given = [min(want, section.least) for want, section in zip(wants, sections, strict=True)]
    for index, want in enumerate(wants):
        given[index] += max(0, min(want - given[index], room - sum(given)))
    drawn: list[Text] = []
    for section, count in zip(sections, given, strict=True):
        left = height - len(drawn)
        if left < 2 and drawn:
            break
        drawn.append(section.heading)
        drawn += _cut(section, min(count, left - 1))
    return drawn


def _cut(section: _Section, count: int) -> list[Text]:
    rows = section.rows
    if count <= 0:
        return []
    if not rows:
        return [Text(f"   {section.empty}", "dim")]
    if len(rows) <= count:
        return [row.draw() for row in rows]
    if section.newest_last:
        return [row.draw() for row in rows[-count:]]
    kept = sorted(range(len(rows)), key=lambda index: (-rows[index].weight, index))[: count - 1]
    more = Text(f"   … and {len(rows) - len(kept)} more", "dim")
    return [*(rows[index].draw() for index in sorted(kept)), more]


def _beside(left: Sequence[Text], left_width: int, right: Sequence[Text], height: int) -> list[Text]:
    joined = []
    for index in range(min(height, max(len(left), len(right)))):
        line = left[index].copy() if index < len(left) else Text()
        line.truncate(left_width, overflow="ellipsis", pad=True)
        line.append(" │ ", "dim")
        if index < len(right):
            line.append_text(right[index])
        joined.append(line)
    return joined


# -- cells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    width: int
    style: str = ""
    right: bool = False


def _cells(*cells: _Cell) -> Text:
    """Cells beside each other, each cut or padded to its width."""
    line = Text(no_wrap=True)
    for number, cell in enumerate(cells):
        part = Text(cell.text, cell.style)
        part.truncate(cell.width, overflow="ellipsis")
        gap = Text(" " * (cell.width - cell_len(part.plain)))
        line.append(" " if number else "")
        line.append_text(gap + part if cell.right else part + gap)
    return line


def _ends(left: Text, right: Text, width: int) -> Text:
    """`left` at the left end and `right` at the right one; `left` is cut where they meet."""
    line = left.copy()
    line.truncate(max(0, width - cell_len(right.plain) - 1), overflow="ellipsis", pad=True)
    line.append(" ")
    line.append_text(right)
    return line


def _heading(text: str) -> Text:
    return Text(text, "bold underline")


# -- services and instances --------------------------------------------------------------------------------

_STATE_WIDTH = 8
_SPARKS: tuple[tuple[str, Callable[[Trend], Sequence[float | None]], float | None], ...] = (
    ("BAD", lambda trend: trend.bad_share, None),
    ("RPS", lambda trend: trend.rps, None),
    ("P95", lambda trend: trend.p95_ms, None),
)
_LEAST_SPARK = 10
_MOST_SPARK = 60
_LEAST_TOP = 0.1  # of the bad share, so that a single bad request is no tower


def _services(view: WatchView, width: int) -> _Section:
    ids = [len(one.id) + 2 for service in view.services for one in service.instances]
    longest = max([len(_title(service)) for service in view.services] + ids, default=10)
    every = (*columns.RATES, *columns.LATENCIES)
    shown = [column for column in every if column.always or width >= _NARROW]
    rest = width - 2 - _STATE_WIDTH - 1 - sum(column.width + 1 for column in shown)
    name_width = max(8, min(longest, rest - _LEAST_SPARK - 2))
    rest -= name_width + 1
    count = max(1, min(len(_SPARKS), (rest + 1) // (_LEAST_SPARK + 4)))
    spark = max(0, min(_MOST_SPARK, (rest + 1) // count - 1))
    sparks = _SPARKS[:count]
    # The name of the column says what the bars are: bad (failed or too slow) of the last seconds.
    heading = _cells(
        _Cell("", 1),
        _Cell("SERVICE", name_width),
        _Cell("STATE", _STATE_WIDTH),
        *(_Cell(column.heading, column.width, right=True) for column in shown),
        *(_Cell(f"{name}, {spark} s", spark) for name, _, _ in sparks),
    )
    heading.stylize("bold underline")

    def row(name: str, state: str, numbers: Numbers, trend: Trend, bold: bool) -> Text:
        symbol, word, style = STATES[state]
        figures = Figures.of_numbers(numbers)
        cells = [(column.cell(figures), column.width) for column in shown]
        return _cells(
            _Cell(symbol, 1, style),
            _Cell(name, name_width, "bold" if bold else ""),
            _Cell(word, _STATE_WIDTH, style),
            *(_Cell(cell.plain, room, str(cell.style), right=True) for cell, room in cells),
            *(_spark(name, of(trend), spark) for name, of, _ in sparks),
        )

    rows: list[_Row] = []
    for service in view.services:
        urgent = service.health != "ok"
        weight = 3 if urgent else 1
        title, numbers, trend = _title(service), service.numbers, service.trend
        rows.append(_Row(partial(row, title, service.health, numbers, trend, True), weight))
        ejected = sum(one.state == "ejected" for one in service.instances)
        if note := columns.note(Figures.of_numbers(numbers), ejected):
            rows.append(_Row(partial(Text.assemble, "    ", note), weight))
        for one in service.instances:
            weight = 2 if one.state != "serving" else 0
            rows.append(_Row(partial(row, f"  {one.id}", one.state, one.numbers, one.trend, False), weight))
    return _Section(heading, rows, least=5, empty="no service yet")


def _title(service: ServiceView) -> str:
    split = " ".join(f"{version}:{weight}%" for version, weight in service.split)
    return f"{service.name} {split}".rstrip()


def _spark(name: str, values: Sequence[float | None], width: int) -> _Cell:
    known = [value for value in values[-width:] if value is not None]
    top = max(known, default=0.0)
    bad = name == "BAD"
    bars = fmt.sparkline(values, width, max(top, _LEAST_TOP) if bad else None)
    return _Cell(bars, width, "red" if bad and top > 0 else "cyan")


# -- objectives --------------------------------------------------------------------------------------------

_METER = 8


def _objectives(view: WatchView, width: int) -> _Section:
    pairs = [(service, objective) for service in view.services for objective in service.objectives]
    service_width = min(16, max([len(service.name) for service, _ in pairs], default=7))
    fixed = 2 + _STATE_WIDTH + 1 + service_width + 1 + 8 + _METER + 1 + 6
    text_width = max(4, width - fixed - 1)
    heading = _cells(
        _Cell("", 1),
        _Cell("OBJECTIVE", service_width + 1 + text_width),
        _Cell("STATE", _STATE_WIDTH),
        _Cell("GOOD", 7, right=True),
        _Cell("BUDGET LEFT", _METER + 7),
    )
    heading.stylize("bold underline")

    def row(service: ServiceView, objective: ObjectiveView) -> Text:
        symbol, word, style = STATES[objective.health]
        left = objective.budget_left
        drained = "red" if left <= 0 else "yellow" if left < 0.25 else "green"
        return _cells(
            _Cell(symbol, 1, style),
            _Cell(service.name, service_width, "bold"),
            _Cell(objective.text, text_width),
            _Cell(word, _STATE_WIDTH, style),
            _Cell(fmt.percent(objective.good_share), 7, right=True),
            _Cell(fmt.meter(left, _METER), _METER, drained),
            _Cell(_whole_percent(left), 6, drained if left < 0.25 else "", right=True),
        )

    def weight(service: ServiceView, objective: ObjectiveView) -> int:
        if objective.health == "unknown":  # where nobody calls there is nothing to see
            return 2 if service.numbers.rps else 0
        return 1 if objective.health == "ok" else 3

    rows = [
        _Row(partial(row, service, objective), weight=weight(service, objective))
        for service, objective in pairs
    ]
    empty = "the policy has no objective for these services" if view.services else "no service yet"
    return _Section(heading, rows, least=3, empty=empty)


def _whole_percent(share: float) -> str:
    return f"{max(share, -9.99) * 100:.0f}%"


# -- incidents and events ----------------------------------------------------------------------------------


def _incidents(view: WatchView, width: int) -> _Section:
    open_ = sum(incident.closed_at is None for incident in view.incidents)
    heading = _heading(f"  INCIDENTS  {open_} open, {len(view.incidents) - open_} past")
    rows = [_Row(partial(_incident, one, width), weight=0 if one.closed_at else 1) for one in view.incidents]
    return _Section(heading, rows, least=2, empty="none so far")


def _incident(incident: IncidentView, width: int) -> Text:
    symbol, word, style = STATES[incident.state]
    times = []
    if incident.detect_s is not None:
        times.append(f"found {fmt.duration(incident.detect_s)}")
    if incident.recover_s is not None:
        times.append(f"well {fmt.duration(incident.recover_s)}")
    line = Text.assemble((symbol, style), " ", (f"{word:<10} ", style), f"{fmt.clock(incident.opened_at)} ")
    line.append(f"{incident.service} {incident.objective}")
    if incident.target and incident.target != incident.service:
        line.append(f" at {incident.target}")
    if incident.remedies:
        line.append(f": {' → '.join(incident.remedies)}", "cyan")
    elif incident.why:
        line.append(f": {incident.why}", "dim")
    return _ends(line, Text(" ".join(times)), width) if times else line


def _log(view: WatchView, width: int) -> _Section:
    def row(line: LogLine) -> Text:
        text = Text.assemble(
            (f"  {fmt.clock(line.time)} ", "dim"),
            (f"{line.event.replace('_', ' '):<10} ", _EVENT_STYLES.get(line.event, "")),
            line.text,
        )
        text.truncate(width, overflow="ellipsis")
        return text

    rows = [_Row(partial(row, line)) for line in view.log]
    return _Section(_heading("  EVENTS"), rows, least=4, empty="none so far", newest_last=True)
