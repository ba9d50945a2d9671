"""Never two jobs in one run folder: `RUN/lock`, which a dead job leaves behind and the next one takes over.

The file says who trains here. It comes into being by a hard link, which exists or not and never half, also on network file
systems. Its holder renews its time stamp every `HEARTBEAT` seconds. All times are the file system's own, so clocks of
machines are never compared.

A lock is left over if its process is gone from this machine, if it belongs to an earlier start of the same Slurm job, or if
its time stamp has not moved for `STALE` seconds. Where the holder lives elsewhere, `take` watches for that long at most: a
living one shows itself within a heartbeat. Who takes over moves the old file away first and looks at what it moved: of
two takers one gets the old lock, and the other either loses or puts the new one back. A holder that finds its lock gone
or another's ends at once without saving.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megacode.errors import UserError

FILE = "lock"
HEARTBEAT = 20.0
STALE = 120.0
_LOOKS = 8
"""Times a taker judges anew after another one was faster."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. Empty strings and 0: not known."""

    token: str
    host: str
    boot: str
    """Boot id and process namespace: where these are equal, `pid` can be looked up."""
    pid: int
    pid_started: str
    """The process's start in ticks since boot: a number that comes back is another process."""
    job: str
    """Slurm's `CLUSTER/JOB`."""
    job_start: int
    """How often Slurm has started the job again."""
    started: str

    def __str__(self) -> str:
        job = f"Slurm job {self.job.split('/')[-1]}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.started}"


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
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
    except OSError:
        return ""


def _pid_started(pid: int) -> str:
    """Empty: there is no such process (a zombie counts as none), or this system has no /proc."""
    try:
        # After the command's name, which may hold spaces and brackets: state is field 3, start time field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _gone(owner: Owner, me: Owner) -> str | None:
    """Why a lock's owner cannot be training any more, without looking at its time stamp."""
    if owner.job and owner.job == me.job and owner.job_start < me.job_start:
        return "an earlier start of this Slurm job"
    if (
        owner.boot
        and owner.boot == me.boot
        and _pid_started(owner.pid) != owner.pid_started
        and not _hidden(owner.pid)
    ):
        return "its process is gone"
    return None


def _hidden(pid: int) -> bool:
    """Whether another user's process is there that this one may not look at."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


@dataclass
class Lock:
    """A lock that is held. `release` gives it back; a thread renews it until then."""

    path: Path
    owner: Owner
    on_lost: Callable[[str], None]
    heartbeat: float = HEARTBEAT
    _released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def is_mine(self) -> bool:
        """Whether the file still names this holder. A moment's absence (another process looks at it) is waited out."""
        for _ in range(10):
            there = _read(self.path)
            if there is not None:
                return there.token == self.owner.token
            time.sleep(0.1)
        return False

    def check(self) -> None:
        """Before anything is written that another holder would trust.

        Raises:
            UserError: the lock is no longer this holder's.
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
        taken = f"was taken over by {other}" if other else "is gone"
        return f"{self.path}: {taken}, so this start ends here and saves nothing; the last checkpoint is as it was"

    def _renew(self) -> None:
        while not self._released.wait(self.heartbeat):
            try:
                mine = self.is_mine()
                if mine:
                    os.utime(self.path)
            except OSError:
                continue  # the file system is away for a moment; whoever takes over watches for longer
            if not mine and not self._released.is_set():
                self.on_lost(self._lost())
                return


def end_process(sentence: str) -> None:
    """What a lost lock means for a training process: out, at once, without saving."""
    print(f"megacode train: {sentence}", flush=True)
    os._exit(2)


def take(
    run: Path,
    say: Callable[[str], None] = print,
    on_lost: Callable[[str], None] = end_process,
    me: Owner | None = None,
    heartbeat: float = HEARTBEAT,
    stale: float = STALE,
) -> Lock:
    """Take a run folder's lock, after `stale` seconds at most.

    Args:
        say: gets a line when a left-over lock is taken over or has to be watched.
        on_lost: called in another thread with a sentence when someone else has taken the lock.

    Raises:
        UserError: another process trains in this folder, or it cannot be made or written to.
    """
    me = me or this_process()
    path = run / FILE
    mine = run / f".lock.{me.token}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps(asdict(me), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--run {run}: is no folder that can be made and written to ({error.strerror}: {error.filename}); choose another, or "
            "free this one"
        ) from error
    try:
        for _ in range(_LOOKS):
            if _link(mine, path):
                return Lock(path, me, on_lost, heartbeat)
            _remove_left_over(path, me, say, stale)
        raise UserError(
            f"{path}: others keep taking it; is the same run started several times? Start it once"
        )
    finally:
        mine.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Whether `source` now stands under `target` too."""
    try:
        os.link(source, target)
    except FileExistsError:
        # A network file system may have done it and lost the answer.
        return source.stat().st_nlink > 1
    except OSError:
        # No hard links here: an exclusive creation, with the content a moment later.
        try:
            handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(source.read_text())
    return True


def _remove_left_over(path: Path, me: Owner, say: Callable[[str], None], stale: float) -> None:
    """Move a left-over lock out of the way; returns too if it is gone by itself.

    Raises:
        UserError: its holder lives.
    """
    there = _read(path)
    if there is None:
        if not path.exists():
            return
        time.sleep(1.0)  # being written, or damaged
        there = _read(path) or Owner("", "an unknown machine", "", 0, "", "", 0, "an unknown time")
    why = _gone(there, me) or _watched(path, there, me, say, stale)
    if why is None:
        return
    moved = path.with_name(f".lock.{me.token}.old")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return
    got = _read(moved)
    if (got.token if got else "") == there.token:
        say(f"{path}: left over by {there} ({why}); taken over")
    else:
        _link(moved, path)  # another taker was faster, and this is its lock
    moved.unlink(missing_ok=True)


def _watched(
    path: Path, owner: Owner, me: Owner, say: Callable[[str], None], stale: float
) -> str | None:
    """Why the lock is left over, after watching its time stamp; None if it is another's by now.

    Raises:
        UserError: the time stamp moved, or the process is there.
    """
    lives = UserError(
        f"{path}: this run is being trained by {owner}; wait for it, stop it (scancel, Ctrl-C), or choose another --run"
    )
    if owner.boot and owner.boot == me.boot:
        raise lives  # its process is there, else `_gone` had said so
    first = _age(path, me)
    said = False
    while (age := _age(path, me)) is not None and first is not None:
        if age > stale:
            return f"no sign of life for {age:.0f} s"
        there = _read(path)
        if there is not None and there.token != owner.token:
            return None
        if age < first:
            raise lives
        if not said:
            said = True
            say(
                f"{path}: held by {owner}; watching for {stale - age:.0f} s at most whether it lives"
            )
        first = age
        time.sleep(min(1.0, stale / 20))
    return None


def _age(path: Path, me: Owner) -> float | None:
    """Seconds since the lock was renewed, by the file system's clock; None if it is not there."""
    probe = path.with_name(f".lock.{me.token}")
    try:
        os.utime(probe)
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
