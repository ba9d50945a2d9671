"""One owner at a time of a run, a pack index or a preprocessing folder, across machines.

The file is created exclusively and names its owner. A thread renews its modification time every
`HEARTBEAT` seconds. A lock is left over in three cases: its process is gone from this machine; it
belongs to an earlier start of the same Slurm job; or it was not renewed for `STALE` seconds by the
file system's clock. Clocks of machines are never compared. An owner on another machine is watched
until it renews the lock or is stale.

The takeover is a rename, so only one process wins; it puts the file back if it renamed a newer lock
than it judged. An owner that finds its lock gone or another's ends at once without saving.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megacode.errors import UserError

HEARTBEAT = 20.0
STALE = 120.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. Empty strings and 0: not known.

    Attributes:
        boot: boot id and process namespace; where they equal ours, `pid` can be looked up.
        pid_started: start of the process in ticks since boot, which tells a reused pid.
        job: Slurm's CLUSTER/JOB.
        job_start: how often Slurm has started the job again.
    """

    token: str = ""
    host: str = "an unknown machine"
    boot: str = ""
    pid: int = 0
    pid_started: str = ""
    job: str = ""
    job_start: int = 0
    started: str = "an unknown time"

    def __str__(self) -> str:
        job = f"Slurm job {self.job.split('/')[-1]}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.started}"


class HeldError(Exception):
    """The lock belongs to a living `owner`."""

    def __init__(self, path: Path, owner: Owner) -> None:
        super().__init__(f"{path}: held by {owner}")
        self.owner = owner


class Lock:
    """A lock that is held; a context manager that releases it."""

    def __init__(
        self, path: Path, owner: Owner, on_lost: Callable[[str], None], heartbeat: float
    ) -> None:
        self.path, self.owner = path, owner
        self._on_lost, self._heartbeat = on_lost, heartbeat
        self._released = threading.Event()
        threading.Thread(target=self._renew, name=f"lock {path}", daemon=True).start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_mine(self) -> bool:
        """Whether the file names this owner. Waits a second where a taker has moved it away."""
        for _ in range(10):
            if (there := _read(self.path)) is not None:
                return there.token == self.owner.token
            time.sleep(0.1)
        return False

    def check(self) -> None:
        """Call before writing what another owner would trust.

        Raises:
            UserError: the lock is lost.
        """
        if not self._released.is_set() and not self.is_mine():
            raise UserError(self._lost())

    def release(self) -> None:
        """Give it back. Safe to call twice."""
        if not self._released.is_set():
            self._released.set()
            if self.is_mine():
                self.path.unlink(missing_ok=True)

    def _lost(self) -> str:
        other = _read(self.path)
        what = f"was taken over by {other}" if other else "is gone"
        return f"{self.path}: {what}; this process ends here and saves nothing"

    def _renew(self) -> None:
        while not self._released.wait(self._heartbeat):
            try:
                if mine := self.is_mine():
                    os.utime(self.path)
            except OSError:
                continue  # the file system is away; whoever takes over waits for longer
            if not mine and not self._released.is_set():
                self._on_lost(self._lost())
                return


def end_process(sentence: str) -> None:
    """End this process at once, with a sentence and code 2."""
    print(f"megacode: {sentence}", flush=True)
    os._exit(2)


def take(
    path: Path,
    wait: float = 0.0,
    *,
    say: Callable[[str], None] = print,
    on_lost: Callable[[str], None] = end_process,
    me: Owner | None = None,
    heartbeat: float = HEARTBEAT,
    stale: float = STALE,
) -> Lock:
    """Take a lock; its folder exists.

    Args:
        wait: seconds to wait for a living owner to release it.
        say: gets a line when a left-over lock is taken over or has to be watched.
        on_lost: called in another thread with a sentence when someone else has taken the lock.

    Raises:
        HeldError: its owner lives.
        OSError: the file cannot be written.
    """
    me = me or this_process()
    give_up = time.monotonic() + wait
    watched: tuple[str, float] | None = None  # token and age at the last look
    while not _create(path, me):
        owner, age = _read_whole(path), _age(path, me)
        if age is None:
            continue  # released meanwhile
        here = bool(owner.boot) and owner.boot == me.boot
        why = _gone(owner, me)
        if age > stale and not here:
            why = why or f"no sign of life for {age:.0f} s"
        if why:
            _remove(path, owner, me, say, why)
            continue
        renewed = watched is not None and watched[0] == owner.token and age < watched[1]
        if (here or renewed) and time.monotonic() >= give_up:
            raise HeldError(path, owner)
        if not here and watched is None and math.isfinite(wait):
            rest = f"{stale - age:.0f} s at most"
            say(f"{path}: held by {owner}; watching for {rest} whether it lives")
        watched = owner.token, age
        time.sleep(min(0.2, stale / 20))
    return Lock(path, me, on_lost, heartbeat)


def is_held(path: Path) -> bool:
    """Whether a living owner holds a lock, as far as that shows without waiting."""
    owner, me = _read(path), this_process()
    if owner is None or (age := _age(path, me)) is None or _gone(owner, me):
        return False
    return age <= STALE or (bool(owner.boot) and owner.boot == me.boot)


def this_process(environment: Mapping[str, str] = os.environ) -> Owner:
    """The owner that this process would be."""
    job = environment.get("SLURM_JOB_ID", "")
    return Owner(
        token=secrets.token_hex(8),
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        pid_started=_pid_started(os.getpid()),
        job=f"{environment.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
        job_start=int(environment.get("SLURM_RESTART_COUNT") or 0),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _pid_started(pid: int) -> str:
    """Empty: there is no such process (or a zombie), or this system has no /proc."""
    try:
        # After the command's name, which may hold spaces: state is field 3, start time field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _gone(owner: Owner, me: Owner) -> str | None:
    """Why an owner cannot be alive, without looking at the lock's age."""
    if owner.job and owner.job == me.job and owner.job_start < me.job_start:
        return "an earlier start of this Slurm job"
    if owner.boot and owner.boot == me.boot and _pid_started(owner.pid) != owner.pid_started:
        try:
            os.kill(owner.pid, 0)
        except PermissionError:
            return None  # another user's process, whose /proc entry is hidden
        except OSError:
            pass
        return "its process is gone"
    return None


def _create(path: Path, owner: Owner) -> bool:
    try:
        with open(path, "x") as file:
            file.write(json.dumps(asdict(owner), indent=1) + "\n")
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _read_whole(path: Path) -> Owner:
    """The owner, after a second at most if the file is being written; unknown if it is damaged."""
    for _ in range(10):
        if owner := _read(path):
            return owner
        time.sleep(0.1)
    return Owner()


def _age(path: Path, me: Owner) -> float | None:
    """Seconds since the lock was renewed, by the file system's clock; None if it is not there."""
    probe = path.with_name(f".{path.name}.{me.token}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, judged: Owner, me: Owner, say: Callable[[str], None], why: str) -> None:
    """Move the left-over lock of `judged` away; put it back if it is a newer one by now."""
    moved = path.with_name(f".{path.name}.{me.token}.old")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return
    if (_read(moved) or Owner()).token != judged.token:
        os.rename(moved, path)
        return
    moved.unlink()
    say(f"{path}: left over by {judged} ({why}); taken over")
