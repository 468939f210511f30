"""`libvirt-cbt completion`"""

from __future__ import annotations

import click

EXAMPLES = """\b
Examples:
  eval "$(libvirt-cbt completion bash)"              # this shell only; or in ~/.bashrc
  libvirt-cbt completion bash > /etc/bash_completion.d/libvirt-cbt
  libvirt-cbt completion zsh > /usr/local/share/zsh/site-functions/_libvirt-cbt
  libvirt-cbt completion fish > ~/.config/fish/completions/libvirt-cbt.fish
"""


@click.command(epilog=EXAMPLES)
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what teaches a shell to complete commands, options, domains, disks and generations by TAB."""
    from click import shell_completion

    if ctx.obj.json:
        raise click.UsageError("a shell does not read JSON; leave --json out")
    kind = shell_completion.get_completion_class(shell)
    assert kind
    click.echo(kind(ctx.find_root().command, {}, "libvirt-cbt", "_LIBVIRT_CBT_COMPLETE").source())
