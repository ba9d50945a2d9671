"""Run Python programs that nobody has read, such as those that a model writes.

A program gets process, network and mount namespaces of its own, an unprivileged user, limits, and
a filter of system calls. It sees the interpreter's own files, read-only, and an empty /tmp that is
its working folder: no network, no environment, no other process, no home folder. What it starts
and writes is gone when it ends. The namespaces are made by bubblewrap where it works, else by
`megacode.sandboxed`; where neither can be had, nothing is run.
"""

from __future__ import annotations

import functools
import marshal
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Literal

from megacode.errors import UserError
from megacode.sandboxed import DISK_BYTES, INSIDE

Kind = Literal["bubblewrap", "namespaces"]
_TRANSIENT_USERS = range(61184, 65520)
"""systemd gives these to services that have no user; no file is theirs."""
_MOST_OUTPUT = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        ok: its last line was reached, without an error, within the limits. A program that leaves
            before (`sys.exit(0)`, `os._exit(0)`) is not ok.
        reason: why it is not: the error, the signal, or the limit; empty if it is ok.
        stdout: what it printed, the first MiB; bytes that are no UTF-8 are replaced.
    """

    ok: bool
    reason: str
    stdout: str


class _NoSandboxError(Exception):
    """The sandbox was not entered; says why."""


def run_program(
    source: str, *, seconds: float = 5.0, memory_mb: int = 512, stdin: str = ""
) -> Outcome:
    """Run a program in the sandbox.

    Args:
        seconds: limit of its wall time, and of the CPU time of each of its processes.
        memory_mb: limit of the address space of each of its processes; it may have `PROCESSES`.

    Raises:
        UserError: this machine offers no sandbox.
    """
    try:
        return _run(_kind(), source, seconds, memory_mb, stdin)
    except _NoSandboxError as error:
        raise UserError(f"the sandbox cannot be entered any more: {error}; try again") from None


def run_programs(
    sources: Sequence[str], workers: int, *, seconds: float = 5.0, memory_mb: int = 512
) -> list[Outcome]:
    """Run programs, `workers` at a time; outcomes in the order of `sources`."""
    run = functools.partial(run_program, seconds=seconds, memory_mb=memory_mb)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, sources))


@functools.cache
def _kind() -> Kind:
    """The first kind of sandbox that runs an empty program here."""
    if sys.platform != "linux":
        raise UserError(f"programs are run in a sandbox of Linux's, not on {sys.platform}")
    said = []
    kinds: tuple[Kind, ...] = ("bubblewrap", "namespaces")
    for kind in kinds:
        try:
            if (outcome := _run(kind, "", 30.0, 512, "")).ok:
                return kind
            said.append(f"{kind}: {outcome.reason}")
        except _NoSandboxError as error:
            said.append(f"{kind}: {error}")
    raise UserError(
        f"no sandbox to run programs in ({'; '.join(said)}): install bubblewrap 0.7 or later, or "
        "allow user namespaces (sysctl user.max_user_namespaces, Linux 5.12 or later)"
    )


def _run(kind: Kind, source: str, seconds: float, memory_mb: int, stdin: str) -> Outcome:
    token = secrets.token_hex(16)
    user = secrets.choice(_TRANSIENT_USERS) if os.geteuid() == 0 else None
    order = {
        "source": source,
        "token": token,
        "seconds": seconds,
        "memory": memory_mb << 20,
        "uid": user,
        "visible": _visible() if kind == "namespaces" else None,
        "parent": os.getpid() if kind == "namespaces" else None,
    }
    # Files in memory: the program cannot fill a pipe that nobody reads.
    names = ("stdin", "stdout", "stderr", "order", "state", "result")
    files = {name: os.memfd_create(name) for name in names}
    try:
        orders = marshal.dumps((_compiled(_inside()), order))
        for name, data in (("stdin", stdin.encode()), ("order", orders)):
            _write(files[name], data)
        inner = [files[name] for name in ("order", "state", "result")]
        code = "import marshal, os\n"
        code += f"code, order = marshal.loads(os.pread({inner[0]}, {len(orders)}, 0))\n"
        code += f"os.close({inner[0]})\nexec(code)\nmain(order, {inner[1]}, {inner[2]})"
        command = [*(_bubblewrap() if kind == "bubblewrap" else []), *_python(), code]
        process = subprocess.Popen(
            command,
            stdin=files["stdin"],
            stdout=files["stdout"],
            stderr=files["stderr"],
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=inner,
        )
        try:
            process.wait(seconds + 60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
        started, _, ended = _read(files["state"]).partition("\n")
        if not started:
            error = _read(files["stderr"]).strip().splitlines()[-1:] or ["it ended at once"]
            raise _NoSandboxError(error[0][:200])
        reason = _reason(ended, _read(files["result"]), token, seconds)
        return Outcome(not reason, reason, _read(files["stdout"]))
    finally:
        for file in files.values():
            os.close(file)


def _reason(ended: str, result: str, token: str, seconds: float) -> str:
    """Why a program is not ok; empty if it is."""
    how, _, number = ended.partition(" ")
    if not ended:
        return "was ended from outside; out of memory?"
    if ended in ("time", f"signal {signal.SIGXCPU:d}"):
        return f"did not end within {seconds:g} s"
    if how == "signal":
        return f"ended by signal {number} ({signal.strsignal(int(number))})"
    if number == "0" and secrets.compare_digest(result.encode(), token.encode()):
        return ""
    if not result or number != "0":
        return f"left before its last line, with exit code {number}"
    return result


def _write(file: int, data: bytes) -> None:
    with open(file, "wb", closefd=False) as out:
        out.write(data)
    os.lseek(file, 0, os.SEEK_SET)


def _read(file: int) -> str:
    return os.pread(file, _MOST_OUTPUT, 0).decode(errors="replace")


@functools.cache
def _inside() -> str:
    return Path(__file__).with_name("sandboxed.py").read_text(encoding="utf-8")


@functools.cache
def _compiled(text: str) -> CodeType:
    """Code for the sandboxed interpreter, which is this one; compiling would take half its time."""
    return compile(text, "sandboxed.py", "exec", dont_inherit=True)


def _python() -> list[str]:
    """The interpreter without the virtual environment that it may be run from."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [str(Path(sys.base_prefix, "bin", version)), "-I", "-S", "-c"]


@functools.cache
def _visible() -> dict[str, str | None]:
    """What a program can read: path -> None, or the target if it is a link."""
    folders = [Path("/usr"), *(Path("/", name) for name in ("bin", "lib", "lib64"))]
    found = {str(path): os.readlink(path) if path.is_symlink() else None
             for path in folders if path.exists()}  # fmt: skip
    prefix = Path(os.path.realpath(sys.base_prefix))
    if not prefix.is_relative_to("/usr"):
        found |= {str(prefix / name): None for name in ("bin", "lib") if (prefix / name).exists()}
    return found


@functools.cache
def _bubblewrap() -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise _NoSandboxError("bwrap is not installed")
    binds: list[str] = []
    for path, link in _visible().items():
        for parent in list(Path(path).parents)[-2::-1]:  # else with the rights that it has outside
            binds += ["--perms", "0755", "--dir", str(parent)]
        binds += ["--symlink", link, path] if link else ["--ro-bind", path, path]
    root = os.geteuid() == 0
    user = f"--unshare-user --uid {INSIDE} --gid {INSIDE}"
    rights = "--cap-add CAP_SETUID --cap-add CAP_SETGID" if root else user
    namespaces = f"--unshare-pid --unshare-net --unshare-ipc --unshare-uts {rights}"
    ends = f"--dev-bind /dev/null /dev/null --perms 1777 --size {DISK_BYTES} --tmpfs /tmp"
    return [
        program,
        *f"{namespaces} --die-with-parent --new-session --as-pid-1".split(),
        *binds,
        *f"{ends} --chdir /tmp --remount-ro /".split(),
    ]
