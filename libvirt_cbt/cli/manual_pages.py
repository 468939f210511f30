"""The man page of each command, made of what it says of itself."""

from __future__ import annotations

import importlib
import os
import re
import textwrap
import time
from typing import Dict, Final, Iterator, List, Tuple

import click

import libvirt_cbt
from libvirt_cbt import cli
from libvirt_cbt.cli import manual_config, manual_words, roff

MARK: Final = '.\\" Made by `libvirt-cbt manual`.'
UNBROKEN: Final = ".nh"  # no hyphens that are not in a name
MAIN: Final = "libvirt-cbt"
CONFIG: Final = "libvirt-cbt.toml"
OTHERS: Final = {MAIN: (f"{MAIN}-run", CONFIG, "virsh", "qemu-img"), CONFIG: (MAIN, f"{MAIN}-config", f"{MAIN}-run")}


def names() -> Dict[str, int]:
    """Every page and its section."""
    return {MAIN: 1, **{f"{MAIN}-{name}": 1 for name in cli.COMMANDS}, CONFIG: 5}


def page(name: str) -> str:
    """The source of a page.  Errors: KeyError."""
    section = names()[name]
    if name == CONFIG:
        lines = manual_config.lines()
    elif name == MAIN:
        lines = _whole()
    else:
        lines = _single(name[len(MAIN) + 1 :])
    # https://reproducible-builds.org/specs/source-date-epoch/
    when = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    title = f'.TH {roff.literal(name.upper())} {section} {when} "{MAIN} {libvirt_cbt.__version__}" "{MAIN}"'
    return "\n".join([MARK, title, UNBROKEN, *lines, *_see(*OTHERS.get(name, (MAIN, CONFIG))), ""])


def _whole() -> List[str]:
    context = click.Context(cli.group, info_name=MAIN)
    lines = [".SH NAME", f"{roff.literal(MAIN)} \\- {manual_words.NAME}", ".SH SYNOPSIS", *_synopsis(context)]
    lines += [".SH DESCRIPTION", *roff.paragraphs(manual_words.DESCRIPTION), ".SH OPTIONS", *_options(context), ".SH COMMANDS"]
    for name, does in cli.COMMANDS.items():
        lines += roff.term(f"{roff.bold(f'{MAIN}-{name}')}(1)", does)
    lists = {"EXIT STATUS": manual_words.CODES, "ENVIRONMENT": manual_words.ENVIRONMENT, "FILES": manual_words.FILES}
    for title, words in lists.items():
        lines += [f".SH {title}"]
        for head, text in words.items():
            lines += roff.term(roff.bold(head), text)
    return [*lines, *_examples(cli.group)]


def _single(name: str) -> List[str]:
    command: click.Command = importlib.import_module(f"libvirt_cbt.cli.{name}").command
    context = click.Context(command, info_name=name, parent=click.Context(cli.group, info_name=MAIN))
    below = list(_below(context))
    lines = [".SH NAME", f"{roff.literal(f'{MAIN}-{name}')} \\- {cli.COMMANDS[name]}", ".SH SYNOPSIS"]
    for number, one in enumerate(below or [context]):
        lines += [*([".br"] if number else []), *_synopsis(one)]
    lines += [".SH DESCRIPTION", *roff.paragraphs(command.help or ""), ".PP"]
    lines += roff.prose("The exit status, and the options that stand before a command, are in `libvirt-cbt`(1).")
    options = _options(context)
    lines += [".SH OPTIONS", *options] if options else []
    lines += [".SH COMMANDS"] if below else []
    for one in below:
        lines += [f".SS {one.info_name}", *roff.paragraphs(one.command.help or ""), *_options(one)]
    return [*lines, *_examples(command)]


def _below(context: click.Context) -> Iterator[click.Context]:
    if isinstance(context.command, click.Group):
        for name, one in context.command.commands.items():
            yield click.Context(one, info_name=name, parent=context)


def _synopsis(context: click.Context) -> List[str]:
    words = context.command.collect_usage_pieces(context)
    return [roff.bold(context.command_path), *map(roff.literal, words)]


def _options(context: click.Context) -> List[str]:
    lines: List[str] = []
    for param in context.command.params:
        record = param.get_help_record(context)
        if record:
            lines += roff.term(_declared(record), record[1])
    return lines


def _declared(record: Tuple[str, str]) -> str:
    """`-r, --repository REPO`: what is typed is bold, what stands for something is not."""
    words = re.split(r"(?<![\w-])(--?[a-z][a-z-]*)", record[0])
    return "".join(roff.bold(word) if place % 2 else roff.literal(word) for place, word in enumerate(words))


def _examples(command: click.Command) -> List[str]:
    text = re.split("Examples?:\n", command.epilog or "")[-1].rstrip()
    return [".SH EXAMPLES", *roff.verbatim(textwrap.dedent(text).split("\n"))] if text else []


def _see(*others: str) -> List[str]:
    sections = names()
    found = [f"{roff.bold(name)}({sections.get(name, 1)})" for name in others]
    return [".SH SEE ALSO", *(f"{one}," for one in found[:-1]), found[-1]]
