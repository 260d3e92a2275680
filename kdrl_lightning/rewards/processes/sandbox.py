"""Runs untrusted Python in bubblewrap: no network, no files, no other processes.

The kernel enforces the limits: by namespaces (bubblewrap), resource limits, and a seccomp filter,
because the limit on processes does not apply if the training runs as root.
"""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from secrets import token_hex
from shutil import which

from kdrl_lightning.errors import ConfigurationError

INSTALL = "Run `apt-get install bubblewrap`, or your distribution's command."
# System calls that no answer needs: they start processes and threads, create namespaces, or take
# memory that no limit counts. For each machine: the kernel's number of the architecture, and its
# numbers of clone, clone3, unshare, setns, mount, ptrace, shmget, msgget, memfd_create,
# io_uring_setup, socket, socketpair (and fork, vfork on x86_64).
FORBIDDEN_ON = {
    "x86_64": (
        0xC000003E,
        (56, 435, 272, 308, 165, 101, 29, 68, 319, 425, 41, 53, 57, 58),
    ),
    "aarch64": (0xC00000B7, (220, 435, 97, 268, 40, 117, 194, 186, 279, 425, 198, 199)),
}
# Runs in the sandbox: sets the limits (set outside, they would also apply to bubblewrap), runs the
# program, and then prints a random word, which the program does not know, as proof of its end.
HARNESS = """
import resource, sys
_, memory, seconds, size, word = sys.argv
for name, value in (("AS", memory), ("CPU", seconds), ("FSIZE", size), ("NOFILE", 32), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
sys.argv = ["program.py"]
exec(compile(open("/program.py", "rb").read(), "program.py", "exec"), {"__name__": "__main__"})
print(word, end="", flush=True)
"""


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs in bubblewrap with these limits.

    Attributes:
        seconds: wall-clock time of a run.
        memory_mb: address space of the interpreter, in MiB.
        output_kb: size of the standard output in KiB; a program cannot write anywhere else.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    output_kb: int = 256

    def run(self, program: str, text: str = "") -> str | None:
        """Run a program with a text as its standard input.

        Returns:
            The program's output; None if it did not reach its end because it raised, exited, or
            exceeded a limit.

        Raises:
            ConfigurationError: bubblewrap is not installed, or cannot create namespaces.
        """
        require_sandbox()
        status, output, _ = self._run(program, text, word := token_hex(16))
        return output.removesuffix(word) if status == 0 and output.endswith(word) else None

    def _run(self, program: str, text: str, word: str) -> tuple[int | None, str, str]:
        limits = [self.memory_mb << 20, int(self.seconds) + 1, (self.output_kb << 10) + len(word)]
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(5)]
            source, given, rules, output, errors = files
            contents = (_bytes(program), _bytes(text), _filter())
            for file, content in zip(files[:3], contents, strict=True):
                file.write(content)
                file.seek(0)
            command = [
                *_bubblewrap(),
                *("--ro-bind-data", str(source.fileno()), "/program.py", "--remount-ro", "/"),
                *("--seccomp", str(rules.fileno())),
                *(str(Path(sys.executable).resolve()), "-I", "-S", "-X", "utf8"),
                *("-c", HARNESS, *map(str, limits), word),
            ]
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=output,
                stderr=errors,
                pass_fds=[source.fileno(), rules.fileno()],
                env={},
                cwd="/",
            )
            status: int | None = None
            try:
                status = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()  # by --die-with-parent this also kills all that it has started
                process.wait()
            output.seek(0)
            errors.seek(0)
            printed = output.read().decode("utf-8", "replace")
            return status, printed, errors.read(10_000).decode("utf-8", "replace")


@cache
def require_sandbox() -> None:
    """Check once that the sandbox works.

    Raises:
        ConfigurationError: bubblewrap is not installed, or cannot create namespaces.
    """
    if which("bwrap") is None:
        raise ConfigurationError(f"`bwrap` must be installed to run code: got none. {INSTALL}")
    if platform.machine() not in FORBIDDEN_ON:
        raise ConfigurationError(
            f"the sandbox must run on one of {', '.join(FORBIDDEN_ON)}: got {platform.machine()}. "
            "Train on such a machine, or choose a task without code."
        )
    status, output, errors = Sandbox(seconds=60.0)._run("", "", "ok")
    if (status, output) != (0, "ok"):
        reason = (errors.strip().splitlines() or [f"status {status}"])[-1]
        raise ConfigurationError(
            f"`bwrap` must be able to create a sandbox: got {reason[:300]}. {INSTALL} In a "
            "container, allow unprivileged user namespaces (Docker: `--security-opt "
            "seccomp=unconfined`)."
        )


@cache
def _bubblewrap() -> tuple[str, ...]:
    base = Path(sys.executable).resolve().parents[1]
    shown = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", str(base)]
    binds = [argument for path in shown for argument in ("--ro-bind-try", path, path)]
    return (
        *(str(which("bwrap")), "--unshare-all", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox", "--chdir", "/"),
        *(*binds, "--dev", "/dev", "--remount-ro", "/dev"),
    )


@cache
def _filter() -> bytes:
    """Return the seccomp program: forbidden calls get EPERM, calls of another ABI are killed."""
    architecture, numbers = FORBIDDEN_ON[platform.machine()]
    load, equal, least, answer = 0x20, 0x15, 0x35, 0x06
    denied, allowed, killed = 0x00050001, 0x7FFF0000, 0x80000000
    rules = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (answer, 0, 0, killed),
        (load, 0, 0, 0),  # the call's number
        (least, len(numbers) + 1, 0, 0x40000000),  # x86_64's second set of numbers (x32)
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (answer, 0, 0, allowed),
        (answer, 0, 0, denied),
    ]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
