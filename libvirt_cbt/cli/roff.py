"""Text as man(7) has it: https://man.openbsd.org/man.7"""

from __future__ import annotations

import re
import textwrap
from typing import Final, Iterable, List

WIDTH: Final = 66  # an escape makes a line longer, and mandoc counts to 80
ESCAPES: Final = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}


def literal(text: str) -> str:
    """To be typed as it is: no hyphen, quote or backslash becomes anything else."""
    return _safe("".join(ESCAPES.get(letter, letter) for letter in text))


def bold(text: str) -> str:
    return f"\\fB{literal(text)}\\fR"


def prose(text: str) -> List[str]:
    """A paragraph; `this` is bold, and so is an option."""
    return [_marked(line) for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)]


def _marked(line: str) -> str:
    """A word in backquotes may go over the end of a line: then the quotes stay."""
    pieces = re.split(r"(`[^`]*`|(?<![\w-])--?[a-z][a-z-]*)", line)
    return _safe("".join(bold(piece.strip("`")) if place % 2 else _plain(piece) for place, piece in enumerate(pieces)))


def _plain(text: str) -> str:
    return text.replace("\\", "\\e").replace("`", "\\(ga")


def _safe(line: str) -> str:
    """A dot or a quote at the beginning would make it a request."""
    return f"\\&{line}" if line.startswith((".", "'")) else line


def term(head: str, text: str) -> List[str]:
    """An entry of a list; `head` is roff already."""
    return [".TP", head, *(prose(text) or ["\\&"])]


def verbatim(lines: Iterable[str]) -> List[str]:
    return [".nf", *(literal(line) or "\\&" for line in lines), ".fi"]


def paragraphs(text: str) -> List[str]:
    """Help as click has it: blank lines between, and what begins with a backspace is not filled."""
    found: List[str] = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip()):
        found += [".PP", *(verbatim(block.split("\n")[1:]) if block.startswith("\b") else prose(block))]
    return found[1:]
