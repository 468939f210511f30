"""One connection of the OpenSSH client: a shell on the far host that does what `far.sh` knows, and its sockets here.

The client is the user's: what ~/.ssh/config, the agent and known_hosts say holds.  Nobody is asked anything, so a host
whose key is unknown or has changed is refused.  It ends with us, however hard we are killed: its standard input does.
https://man.openbsd.org/ssh, https://man.openbsd.org/ssh_config
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import threading
import time
from importlib import resources
from typing import Any, Final, List, Optional, Sequence

from libvirt_cbt import names, tools
from libvirt_cbt.hypervisor.address import Address

CONNECT_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0
MOST_NOISE: Final = 1 << 20  # bytes that a login shell may print before our own words
MOST_ANSWER: Final = 4 << 20  # bytes of one line, unless more is asked for
BARE: Final = "libvirt-cbt-bare"
READY: Final = "libvirt-cbt-ready"
# One session, whatever the user's configuration says for people: no agent, no display, no forwardings but ours.
OPTIONS: Final = (
    "-T", "-a", "-x",
    "-o", "BatchMode=yes",
    "-o", "ClearAllForwardings=yes",
    "-o", "ControlMaster=yes",
    "-o", "ControlPersist=no",
    "-o", "ForkAfterAuthentication=no",
    "-o", "StdinNull=no",
    "-o", "SessionType=default",
    "-o", "RemoteCommand=none",
    "-o", "LogLevel=ERROR",
    "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=3",
)  # fmt: skip
# Of a client that only speaks to that one: should it be gone, this one must not connect anywhere itself.
SECOND: Final = ("-F", "none", "-T", "-o", "BatchMode=yes", "-o", "ProxyCommand=false", "-o", "LogLevel=ERROR")


class Lost(Exception):
    """The connection has gone, or does not answer."""


class Refused(Exception):
    """The far end says no: a `kind` and its words, or a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Ssh:
    """One client process; a context manager.  Nothing else is left behind: not here, not there.

    It begins to connect, and nobody waits for that before `begin`.  `folder` is one of ours, for the socket by which its
    sockets are made.  Errors of its methods: Lost, Refused.
    """

    def __init__(self, address: Address, folder: str) -> None:
        self._address = address
        self._control = os.path.join(folder, "ssh")
        self._asking = threading.Lock()
        self._pending = b""
        self._begun = False
        self._complaints: Any = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                start_new_session=True,  # Ctrl-C in a terminal is ours
            )
        except OSError as e:
            self._complaints.close()
            raise Lost(f"{self._program}: {e.strerror}") from None

    def __enter__(self) -> Ssh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _program(self) -> str:
        return self._address.parameters.get("command") or tools.find("ssh")

    def _command(self) -> List[str]:
        address, argv = self._address, [self._program, *OPTIONS, "-S", self._control]
        for option, value in (
            ("-p", str(address.port) if address.port else None),
            ("-l", address.user),
            ("-i", address.parameters.get("keyfile")),
            ("-oUserKnownHostsFile=", address.parameters.get("known_hosts")),
        ):
            if value:
                argv += [option + value] if option.endswith("=") else [option, value]
        return [*argv, "--", address.host, f"echo {BARE}; exec sh -s"]

    def begin(self) -> None:
        """Waits until the far end listens; before that nothing may be asked."""
        if self._begun:
            return
        try:
            self._hear_first_word()
        except BaseException:
            self.close()
            raise
        self._begun = True

    def _hear_first_word(self) -> None:
        """Up to the shell's first own word.  Where the key has the far end as its command, it is there already."""
        deadline, noise = time.monotonic() + CONNECT_SECONDS, 0
        while True:
            try:
                said = self._line(deadline)
            except TimeoutError:
                raise Lost(f"no answer within {CONNECT_SECONDS:.0f} s") from None
            noise += len(said)
            if said == BARE:
                self._send(resources.files("libvirt_cbt.hypervisor").joinpath("far.sh").read_bytes())
            elif said == READY:
                return
            elif noise > MOST_NOISE:
                raise Lost("the login shell of the far user does not end its greeting")

    def ask(self, *words: str, seconds: float = ANSWER_SECONDS, most: int = MOST_ANSWER) -> List[str]:
        """The words of the answer to one request, of `most` bytes."""
        with self._asking:
            self._send(" ".join(_encoded(word) for word in words).encode() + b"\n")
            try:
                return self._answer(self._line(time.monotonic() + seconds, most))
            except TimeoutError:
                self._process.kill()  # what it may yet say would answer another question
                raise Lost(f"no answer within {seconds:.0f} s") from None

    def tell(self, *words: str) -> None:
        """Words that nobody answers."""
        with self._asking:
            self._send(" ".join(_encoded(word) for word in words).encode() + b"\n")

    def hear(self, seconds: float) -> Optional[List[str]]:
        """What is said unasked, within `seconds`; None when it is nothing."""
        try:
            return self._line(time.monotonic() + seconds).split()
        except TimeoutError:
            return None

    @staticmethod
    def _answer(line: str) -> List[str]:
        kind, _, rest = line.partition(" ")
        if kind == "ok":
            return rest.split()
        words = rest.split()
        if kind != "no" or not words:
            raise Lost(f"the far end says {names.printable(line)!r}")
        said = str(number(words[1:])) if words[0] == "space" else text("".join(words[1:]))
        raise Refused(words[0], said or names.printable(words[0], 100))

    def _send(self, data: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            raise self._lost() from None

    def _line(self, deadline: float, most: int = MOST_ANSWER) -> str:
        assert self._process.stdout
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if len(self._pending) > most:
                self._process.kill()
                raise Lost(f"the far end says more than {most} bytes without an end")
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise self._lost()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")

    def _lost(self) -> Lost:
        """What the client says why it ended."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return Lost("it was closed")
        return Lost(self.complaint() or "it was closed")

    def complaint(self) -> str:
        """What the client has said on stderr, or a program on the far side."""
        self._complaints.seek(0)
        return str(self._complaints.read(65536).decode(errors="replace").strip())

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def forward(self, near: str, far: str) -> None:
        """What connects to the socket `near` from now on speaks to the socket `far`."""
        self._control_command("forward", near, far)

    def cancel(self, near: str, far: str) -> None:
        """Ends that; connections that are open stay."""
        self._control_command("cancel", near, far)

    def _control_command(self, what: str, near: str, far: str) -> None:
        argv = [self._program, *SECOND, "-S", self._control, "-O", what, "-L", f"{_escaped(near)}:{_escaped(far)}"]
        try:
            done = subprocess.run(
                [*argv, "--", "far"],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ANSWER_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise Lost("it does not answer") from None
        if done.returncode:
            if not self.alive:
                raise self._lost()
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise Refused("forward", names.printable(said[-1], 300) if said else "")

    def close(self) -> None:
        """Says goodbye and waits for the end; a client that does not end, or still tries to connect, is killed."""
        process = self._process
        if not self._begun:
            process.kill()
        for stream in (process.stdin, process.stdout):
            assert stream
            try:
                stream.close()
            except OSError:
                pass  # it was gone
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._complaints.close()
        try:
            os.unlink(self._control)
        except OSError:
            pass


def _encoded(word: str) -> str:
    """As printf's %b reads it: what is not plain is an octal number."""
    assert word, "the far end cannot read an empty word"
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or chr(byte) in "_./:=,+@-{}" else f"\\0{byte:03o}"
        for byte in os.fsencode(word)
    )


def _escaped(path: str) -> str:
    """A path in a forwarding's specification: a colon would end it, and a percent sign begins a token."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")


def text(digits: str) -> str:
    """A word in hexadecimal digits, as a path or for people."""
    return os.fsdecode(binary(digits))


def binary(digits: str) -> bytes:
    """The same, as it is."""
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise Lost("the far end says what is no text") from None


def number(words: Sequence[str]) -> int:
    """The first word, as a count of bytes."""
    if not words or not re.fullmatch(r"[0-9]{1,19}", words[0]):
        raise Lost("the far end says what is no number")
    return int(words[0])
