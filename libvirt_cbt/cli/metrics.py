"""`libvirt-cbt metrics`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import click

from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results
    from libvirt_cbt.actions.session import Session

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups metrics
  libvirt-cbt -r /backups metrics --textfile /var/lib/prometheus/node-exporter/libvirt_cbt.prom
"""


@click.command(epilog=EXAMPLES)
@click.option("--textfile", metavar="FILE", help="Replace this file, in one step, for node_exporter to read.")
@click.pass_obj
def command(settings: output.Settings, textfile: Optional[str]) -> None:
    """Print how the backups of every domain fare, for Prometheus."""

    def ask(session: Session) -> results.Metrics:
        from libvirt_cbt.actions import metrics

        found = metrics.metrics(session)
        if textfile:
            metrics.write(textfile, found.text)
        return found

    def show(found: results.Metrics) -> None:
        if not textfile:
            for line in found.text.splitlines():
                output.say(line)

    output.run(settings, [ask], show)
