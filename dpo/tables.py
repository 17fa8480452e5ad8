"""Tables of text: aligned for the terminal, and Markdown."""

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return `rows` of cells as a table: the first column flush left, the others flush right."""
    rows = [*rows]
    left, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ("  ".join([row[0].ljust(left), *map(str.rjust, row[1:], widths)]) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
