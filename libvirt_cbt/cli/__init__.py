"""The command line: one file per command, no logic."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from typing import Any, Dict, Final, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors, tls
from libvirt_cbt.cli import logs, output

COMMANDS: Final[Dict[str, str]] = {
    "init": "make a repository",
    "doctor": "look at what usually goes wrong, change nothing",
    "backup": "back up domains by their changed blocks",
    "mark": "record a write generation without copying data",
    "start": "open a fleecing point for other software to read",
    "stop": "close it and commit its generation",
    "status": "tracked or not, dirty bytes, age of the newest backup",
    "list": "the generations of a repository",
    "show": "one generation in full",
    "changed": "which blocks changed between two generations",
    "heatmap": "which regions of a disk change how often",
    "restore": "write a backup's disks as images",
    "boot": "run a domain at once from a backup",
    "serve": "show a backup over NBD, with what changed since an older one",
    "verify": "re-read and re-hash what is stored",
    "report": "what is kept and how it fares, as one page",
    "prune": "remove old backups by rules; the others stay as they are",
    "protect": "keep a backup whatever the rules say",
    "unprotect": "let the rules hold for it again",
    "recover": "put right what a crash left; safe to repeat",
    "untrack": "take our checkpoints off a domain",
    "run": "back up, thin out and verify by policy",
    "systemd": "a timer and a service for run",
    "hooks": "what libvirt, oVirt and others call, and what calls them",
    "check": "for monitoring: are the backups as they should be",
    "metrics": "for Prometheus: how the backups fare",
    "config": "what the configuration says, and for which domain",
    "completion": "what teaches bash, zsh or fish to complete",
    "manual": "the man pages",
}
COLLECT_AFTER: Final = 200_000  # objects: some 20 MB at most, if all of them were garbage

# numpy's BLAS, which nothing here uses, starts a thread for each processor (30 ms, and memory for each); pydantic reads
# the metadata of every package that is installed to find plugins (25 ms).  docs/performance.md
CHEAP_IMPORTS: Final = {"OPENBLAS_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
# What libvirt's client has to say is in our errors; it would print its warnings about certificates beside them.
SILENT: Final = {"LIBVIRT_LOG_OUTPUTS": "4:file:/dev/null"}


def _completing() -> Any:
    from libvirt_cbt.cli import completing  # a shell that asks for words is a rare caller

    return completing


class _Lazy(click.Group):
    """Imports a command when it is asked for: numpy and the bindings are dear."""

    def list_commands(self, ctx: click.Context) -> List[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> Optional[click.Command]:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"libvirt_cbt.cli.{name}").command
        if ctx.resilient_parsing:
            _completing().offer(command)
        return command

    def make_context(self, *args: Any, resilient_parsing: bool = False, **more: Any) -> click.Context:
        if resilient_parsing:
            _completing().offer(self)
        return super().make_context(*args, resilient_parsing=resilient_parsing, **more)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> List[Any]:
        """Nothing is imported for the names of commands."""
        items = _completing().CompletionItem
        named = [items(name, help=does) for name, does in COMMANDS.items() if name.startswith(incomplete)]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _ports(_context: click.Context, _option: click.Parameter, value: Optional[str]) -> Optional[str]:
    try:
        if value is not None:
            tls.ports(value)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None
    return value


EXAMPLES: Final = """\b
Examples:
  libvirt-cbt -r /backups init
  libvirt-cbt -r /backups backup web1
  libvirt-cbt -r /backups restore web1 --output /tmp/web1
"""


@click.group(cls=_Lazy, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(libvirt_cbt.__version__, prog_name="libvirt-cbt")
@click.option("-c", "--connect", "uri", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="libvirt URI, as for virsh.")
@click.option(
    "-r", "--repository", metavar="REPO", envvar="LIBVIRT_CBT_REPO", help="Directory of the backups [LIBVIRT_CBT_REPO]."
)
@click.option(
    "--config", "config_file", metavar="FILE", envvar="LIBVIRT_CBT_CONFIG",
    help="Configuration, in place of /etc/libvirt-cbt.toml and ~/.config/libvirt-cbt.toml [LIBVIRT_CBT_CONFIG].",
)
@click.option(
    "--nbd-ports", metavar="LOW-HIGH", envvar="LIBVIRT_CBT_NBD_PORTS", callback=_ports,
    help="Hosts by TLS: the ports on which their QEMU may listen [10809-10872].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")
@click.option(
    "--log", type=click.Choice(logs.MODES), envvar="LIBVIRT_CBT_LOG",
    help="Where messages go; auto: to the journal if stderr is connected to it, otherwise to stderr [auto].",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, no notes.")
@click.option("-v", "--verbose", is_flag=True, help="Notes of every step.")
@click.pass_context
def group(
    ctx: click.Context, /, as_json: bool, **options: Any
) -> None:
    """Incremental backups of KVM guests by changed-block tracking."""
    ctx.obj = settings = output.Settings(json=as_json, **options)
    logs.configure(settings.log_mode)


def _misused(error: click.ClickException, argv: List[str]) -> int:
    """A command line that makes no sense: one sentence, and with --json the document."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "libvirt-cbt"
    sentence = " ".join(error.format_message().split()).rstrip(".")  # click lays choices out over lines
    found = errors.Usage(reason=f"{sentence}; `{where} --help` shows examples")
    code = _failed(found, argv)
    if "--json" not in argv and context and hasattr(context.command, "misused"):
        context.command.misused(str(found))
    return getattr(context.command, "usage_code", code) if context else code


def _failed(error: errors.CbtError, argv: List[str]) -> int:
    """One sentence, and with --json the document; what to exit with."""
    logs.error(error)
    if "--json" in argv:
        print(output.dumped(output.document([], error)))
    return error.code


def main(argv: Optional[List[str]] = None) -> Any:
    """Runs one command and exits with its code; docs/exit-codes.md is the table."""
    # Imports make hundreds of thousands of objects and no garbage: looked through once instead of 500 times.
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    # What we may not read back ourselves is of no use, nor is a socket of a child's that we may not enter.
    os.umask(os.umask(0o077) & 0o077)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no bug
    code = exit_code(argv)
    gc.freeze()  # nor once more at the end
    raise SystemExit(code)


def exit_code(argv: Optional[List[str]] = None) -> int:
    """As `main`, but the code is returned."""
    # Before numpy and pydantic are imported; the processes of ours that start later inherit it.
    for variable, value in {**CHEAP_IMPORTS, **SILENT}.items():
        os.environ.setdefault(variable, value)
    words = sys.argv[1:] if argv is None else argv
    try:
        group.main(args=argv, prog_name="libvirt-cbt", standalone_mode=False)
    except click.exceptions.Exit as e:
        return int(e.exit_code)
    except click.Abort:  # Ctrl-C before the verb began: from then on it is a flag
        return _failed(errors.Interrupted(number=signal.SIGINT.value, signal=signal.SIGINT.name), words)
    except click.ClickException as e:
        return _misused(e, words)
    except SystemExit as e:
        return int(e.code or 0)
    except BrokenPipeError:
        return 0
    except errors.CbtError as e:  # of what a command looks at before its verb: the configuration, for example
        return _failed(e, words)
    return 0
