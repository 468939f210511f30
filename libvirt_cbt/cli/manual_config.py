"""libvirt-cbt.toml(5), of the keys that the configuration knows."""

from __future__ import annotations

from typing import Annotated, Any, Dict, Final, List, Literal, Tuple, Type, Union, get_args, get_origin

from libvirt_cbt import config
from libvirt_cbt.cli import manual_words, roff

ABOUT: Final = """\
TOML (https://toml.io). It is looked for in /etc/libvirt-cbt.toml and in ~/.config/libvirt-cbt.toml; the second holds
where both say something, and its policies and hosts are tried first. --config names another one, and then these two
are not read. They must belong to root or the user, and nobody else may be able to write to them. An unknown key is an
error. What stands on the command line or in the environment holds before what is here.

A duration is a number of seconds, or has a unit: "90s", "30min", "26h", "2d", "4w". A size is a number of bytes, or has
a unit: "64K", "8M", "1G", powers of 1024. `libvirt-cbt config` shows what the files say, and which policy holds for
which domain.
"""
TABLES: Final[Tuple[Tuple[str, str, Type[config.Model]], ...]] = (
    ("Top level", "Before the first table.", config.File),
    ("[defaults]", "What holds for every domain where its policy says nothing else.", config.Rules),
    ("[policy.NAME]", "Any key of [defaults], and these. A domain that no policy matches is left out of `run`.", config.Policy),
    ("[host.NAME]", "One libvirt host of several, for a machine that pulls from all of them.", config.Host),
    ("[check]", "Thresholds of `check` that are the repository's.", config.Check),
)
KINDS: Final[Dict[Any, str]] = {
    config.Seconds: "duration",
    config.Size: "size",
    config.Count: "number",
    config.Percent: "percent",
    config.Text: "string",
    config.Ports: "string",
    bool: "true or false",
    int: "number",
}


def lines() -> List[str]:
    found = [".SH NAME", "libvirt\\-cbt.toml \\- configuration of libvirt\\-cbt", ".SH DESCRIPTION", *roff.paragraphs(ABOUT)]
    for title, about, model in TABLES:
        found += [f".SH {title.upper() if title.startswith('T') else title}", *roff.prose(about)]
        for key, kind, text in keys(model):
            found += roff.term(f"{roff.bold(key)} ({roff.literal(kind)})", text)
    return [*found, ".SH EXAMPLES", *roff.verbatim(manual_words.EXAMPLE.splitlines())]


def keys(model: Type[config.Model]) -> List[Tuple[str, str, str]]:
    """(key, kind, what it means) of a table's own values, in the order of the code."""
    inherited = set(config.Rules.model_fields) if model is config.Policy else set()
    found = []
    for key, field in model.model_fields.items():
        kind = kind_of(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
        if key not in inherited and kind:
            found.append((key, kind, f"{field.description}{_default(field.default)}"))
    return found


def kind_of(annotation: Any) -> str:
    """In words; empty for a table, which has a section of its own."""
    for known, words in KINDS.items():
        if annotation == known:
            return words
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f'"{one}"' for one in inner)
    if origin is list:
        return f"list of {kind_of(inner[0])}s"
    if origin is Union:
        return kind_of(inner[0])
    if origin is Annotated:
        return kind_of(inner[0])
    return ""


def _default(value: Any) -> str:
    if value in (None, []) or not isinstance(value, (bool, int, float, str)):
        return ""
    if isinstance(value, bool):
        return f" [{str(value).lower()}]"
    if isinstance(value, float):
        return f" [{_duration(value)}]"
    return f" [{value}]"


def _duration(value: float) -> str:
    for unit, length in (("d", config.UNITS["d"]), ("h", config.UNITS["h"])):
        if value and value % length == 0 and (unit == "h" or value >= 7 * length):
            return f"{value / length:.0f}{unit}"
    return f"{value:.0f}"
