"""`libvirt-cbt check`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, List, Optional, Tuple

import click

from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results
    from libvirt_cbt.actions.session import Session

EXAMPLES = """\b
Examples:
  libvirt-cbt check
  libvirt-cbt -r /backups check --offline --critical-age 3d
  libvirt-cbt check web1 --warning-age 2h --critical-age 6h
"""
UNKNOWN: Final = 3
MOST: Final = 50  # problems of which a line is printed


class _Plugin(click.Command):
    """A command line that makes no sense is "unknown" to monitoring, which reads standard output; 2 would be critical."""

    usage_code = UNKNOWN

    def misused(self, sentence: str) -> None:
        output.say(f"LIBVIRT-CBT UNKNOWN: {_clean(sentence)}")


class Duration(click.ParamType):
    """Seconds, as the configuration has them."""

    name = "duration"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> float:
        from libvirt_cbt import config

        try:
            return config.seconds(float(value) if str(value).isdecimal() else value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


@click.command(epilog=EXAMPLES, cls=_Plugin)
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--warning-age", metavar="AGE", type=Duration(), help="Of the newest backup, such as 26h or 2d [26h].")
@click.option("--critical-age", metavar="AGE", type=Duration(), help="The same [50h].")
@click.option("--warning-verified", metavar="AGE", type=Duration(), help="Since any stored backup was re-read [90d].")
@click.option("--critical-verified", metavar="AGE", type=Duration(), help="The same [never].")
@click.option("--warning-free", metavar="PERCENT", type=click.FloatRange(0, 100), help="Room in the repository [10].")
@click.option("--critical-free", metavar="PERCENT", type=click.FloatRange(0, 100), help="The same [5].")
@click.option("--offline", is_flag=True, help="Do not ask libvirt which domains there are.")
@click.pass_obj
def command(settings: output.Settings, /, domains: Tuple[str, ...], offline: bool, **limits: Optional[float]) -> None:
    """Check the backups as a monitoring plugin does: exits 0 (ok), 1 (warning), 2 (critical) or 3 (unknown)."""
    from libvirt_cbt.actions import check

    ended: List[results.Checked] = []

    def ask(session: Session) -> results.Checked:
        connect = None if offline else lambda place: settings.session(place=place)
        return check.check(session, settings.config, domains, limits=limits, places=settings.places(), connect=connect)

    def show(found: results.Checked) -> None:
        ended.append(found)
        if not settings.json:
            _show(found)

    try:
        settings.config  # noqa: B018 -- what is wrong with it is unknown, not critical
    except errors.CbtError as e:
        output.say(output.dumped(output.document([], e)) if settings.json else f"LIBVIRT-CBT UNKNOWN: {_clean(str(e))}")
        raise SystemExit(UNKNOWN) from None
    output.run(settings, [ask], show, always=True)
    raise SystemExit(ended[0].code)


def _show(found: results.Checked) -> None:
    """https://www.monitoring-plugins.org/doc/guidelines.html: one line with the figures, then more text."""
    told = [_told(problem) for problem in found.problems]
    more = f"; {len(told) - 1} more" if len(told) > 1 else ""
    oldest = max((one.age_seconds or 0.0 for one in found.domains), default=0.0)
    good = f"{len(found.domains)} domains, the newest backup of each at most {oldest / 3600:.1f} h old"
    figures = " ".join(_figure(figure) for figure in found.figures)
    output.say(f"LIBVIRT-CBT {found.state.upper()}: {told[0] + more if told else good}" + (f" | {figures}" if figures else ""))
    for problem, line in list(zip(found.problems, told))[1 : MOST + 1]:
        output.say(f"{problem.state}: {line}")


def _told(problem: results.Problem) -> str:
    whose = f"{problem.domain}: " if problem.domain else ""
    return _clean(whose + problem.sentence)


def _clean(text: str) -> str:
    """Behind a bar monitoring reads figures."""
    return text.replace("|", "/")


def _figure(figure: results.Threshold) -> str:
    """'label'=value[unit];[warning];[critical];[least];[most]; "10:" alarms below 10."""
    label = figure.name.replace("'", "''").replace("=", "_").replace("|", "_")
    after = ":" if figure.low else ""
    limits = [f"{limit:.12g}{after}" if limit is not None else "" for limit in (figure.warning, figure.critical)]
    return f"'{label}'={figure.value}{figure.unit};{limits[0]};{limits[1]};0"
