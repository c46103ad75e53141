"""Tables of numbers for people to read, as plain text and as HTML; long ones are folded by the names of their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

MOST_ROWS = 40
"""A table with more is folded."""
_MOST_NAMES = 4  # in a remark, before the rest is counted
_EXACT = 1_000_000  # counts below are written in full
_UNITS = ("M", "G", "T", "P")

Cell = tuple[float, ...] | None
"""(before, after) or (number,); None where the row has nothing of the kind, or it is not known."""
Style = Literal["counts", "share", "value"]


@dataclass(frozen=True)
class Row:
    """One line: the name of a module, a cell for every column, and a remark."""

    name: str
    cells: tuple[Cell, ...]
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Numbers by module, in total, and what is to be said besides.

    Attributes:
        title: one line above the table.
        columns: title and style of every column of cells: "counts" are written before → after, "share" is after in
            percent of before, and a "value", of which there are no sums, has four digits.
        rows: in the order of the network.
        total: cells of the last line; None for no such line.
        sections: title → the lines below it; empty ones are left out.
        most_rows: how many are shown before they are folded.
    """

    title: str
    columns: tuple[tuple[str, Style], ...]
    rows: tuple[Row, ...]
    total: tuple[Cell, ...] | None = None
    sections: Mapping[str, Sequence[str]] | None = None
    most_rows: int = MOST_ROWS

    def __str__(self) -> str:
        """Aligned columns, without any control sequences."""
        parts = [self.title]
        if self.rows:
            lines = self._lines()
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            rule = "  ".join("─" * width for width in widths)
            texts = [_aligned(line, widths) for line in lines]
            parts += ["", texts[0], rule, *texts[1:]]
            if self.total is not None:
                parts.insert(-1, rule)
        for title, remarks in self._sections():
            parts += ["", f"{title}:", *(f"  {remark}" for remark in remarks)]
        return "\n".join(parts)

    def to_html(self) -> str:
        """As HTML, with all names escaped."""
        parts = [f"<p><b>{escape(self.title)}</b></p>"]
        if self.rows:
            head, *body = self._lines()
            parts += ["<table><thead>", _html_line(head, "th"), "</thead><tbody>"]
            parts += [_html_line(line, "td") for line in body]
            parts += ["</tbody></table>"]
        for title, remarks in self._sections():
            items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
            parts.append(f"<p>{escape(title)}:</p><ul>{items}</ul>")
        return "".join(parts)

    def _lines(self) -> list[list[str]]:
        """The texts: titles, rows, total; columns without a number are left out; the remarks come last, if any."""
        rows = folded(self.rows, self.most_rows) + ([] if self.total is None else [Row("all", self.total)])
        single = {row.name for row in self.rows}

        def cells(place: int, style: Style) -> list[Cell]:
            return [row.cells[place] if style != "value" or row.name in single else None for row in rows]

        columns = [
            (title, _column(cells(place, style), style))
            for place, (title, style) in enumerate(self.columns)
            if any(row.cells[place] is not None for row in rows)
        ]
        lines = [["layer", *(title for title, _ in columns)]]
        lines += [[row.name, *texts] for row, *texts in zip(rows, *(own for _, own in columns), strict=True)]
        if any(row.remark for row in rows):
            remarks = ["", *(row.remark for row in rows)]
            lines = [[*line, remark] for line, remark in zip(lines, remarks, strict=True)]
        return lines

    def _sections(self) -> list[tuple[str, Sequence[str]]]:
        shown = len(folded(self.rows, self.most_rows))
        note = f"{len(self.rows)} layers in {shown} lines: a.* (n) has the sums of n layers whose names begin alike"
        sections = {"folded": [note] if shown < len(self.rows) else [], **(self.sections or {})}
        return [(title, remarks) for title, remarks in sections.items() if remarks]


class Shown(ABC):
    """Is shown as a table: as text, as HTML in notebooks, and by the title of the table among other objects.

    A dataclass needs `repr=False` for the last.
    """

    @abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._table().title}>"

    def _repr_html_(self) -> str:
        return self._table().to_html()


def folded(rows: Sequence[Row], most: int = MOST_ROWS) -> list[Row]:
    """Rows whose names begin alike as one row with their sums: by as many levels of the names as give few enough rows.

    Args:
        rows: with dotted names; sums leave None out.
        most: how many are few enough.
    """
    if len(rows) <= most:
        return list(rows)
    groups = {row.name: [row] for row in rows}
    for levels in range(max(row.name.count(".") for row in rows), 0, -1):
        groups = {}
        for row in rows:
            groups.setdefault(".".join(row.name.split(".")[:levels]), []).append(row)
        if len(groups) <= most:
            break
    return [
        found[0] if len(found) == 1 else Row(f"{name}.* ({len(found)})", _sums(found)) for name, found in groups.items()
    ]


def grouped(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """(name, reason) pairs as one line for every reason, with the names that it holds of."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [f"{reason}: {listing(found)}" for reason, found in names.items()]


def listing(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _MOST_NAMES
    shown = ", ".join(name or "the module itself" for name in names[: len(names) if rest <= 1 else _MOST_NAMES])
    return shown if rest <= 1 else f"{shown} and {rest} more"


def readable(count: float) -> str:
    """A count with separators of thousands, from a million on with four digits and a unit."""
    if abs(count) < _EXACT:
        return f"{count:,}"
    value = float(count)
    for unit in _UNITS:
        value /= 1e6 if unit == "M" else 1e3
        if abs(value) < 1000 or unit == _UNITS[-1]:
            break
    return f"{value:.4g} {unit}"


def percent(part: float, whole: float) -> str:
    """A share in percent; a dash if there is no whole."""
    return f"{100 * part / whole:.2f} %" if whole else "–"


def _sums(rows: Sequence[Row]) -> tuple[Cell, ...]:
    columns = zip(*(row.cells for row in rows), strict=True)
    known = [[cell for cell in column if cell is not None] for column in columns]
    return tuple(tuple(map(sum, zip(*cells, strict=True))) if cells else None for cells in known)


def _column(cells: Sequence[Cell], style: Style) -> list[str]:
    """Texts of the cells of one column, in which numbers stand below each other."""
    if style == "share":
        return ["–" if cell is None else percent(cell[-1], cell[0]) for cell in cells]
    if style == "value":
        return ["–" if cell is None else f"{cell[0]:.4g}" for cell in cells]
    changed = [cell for cell in cells if cell is not None and cell[0] != cell[-1]]
    width = max((len(readable(cell[-1])) for cell in changed), default=0)

    def text(cell: Cell) -> str:
        if cell is None:
            return "–"
        after = f" → {readable(cell[-1]):>{width}}" if cell[0] != cell[-1] else ""
        return readable(cell[0]) + (after or " " * (width and width + len(" → ")))

    return [text(cell) for cell in cells]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """The name to the left, all else to the right."""
    cells = [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _html_line(line: Sequence[str], tag: str) -> str:
    sides = ["left", *["right"] * (len(line) - 1)]
    cells = (f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>' for side, text in zip(sides, line, strict=True))
    return f"<tr>{''.join(cells)}</tr>"
