"""What `megacode.sandbox` runs in a process of its own, as `python -I -S -c`: it enters the sandbox
and runs the program. Standard library only; nothing of megacode is there to import.

    outer      (kind `namespaces` only) makes the namespaces, and waits
      monitor  process 1 of the sandbox: watches the clock; when it ends, the kernel ends the rest
        program  gives up every right, then runs the source
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import struct
import sys

INSIDE = 65534
"""User and group of the program inside a user namespace."""
DISK_BYTES = 64 << 20
PROCESSES = 8
"""Processes and threads of a program at a time."""
_FILE_BYTES, _OPEN_FILES = 16 << 20, 64
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW(NS|CGROUP|UTS|IPC|USER|PID|NET)
_BIND, _REC, _PRIVATE, _NOSUID, _NODEV, _DETACH = 4096, 16384, 1 << 18, 2, 4, 2
_SIGINT, _SIGKILL = 2, 9  # `signal` and `typing` take longer to import than all the rest
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
# By machine: AUDIT_ARCH, column of _DENIED, capset, pivot_root, clone.
_MACHINES = {"x86_64": (0xC000003E, 0, 126, 155, 56), "aarch64": (0xC00000B7, 1, 91, 41, 220)}
_PIDFD_OPEN, _CLONE3, _MOUNT_SETATTR = 434, 435, 442
# Numbers on x86-64 and aarch64.
_DENIED = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "syslog": (103, 116), "personality": (135, 92), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Memory that no limit of a process counts.
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def main(order: dict, state_file: int, result_file: int) -> None:
    """Follow the order. `state_file` tells how far it came: empty, `started`, and how it ended."""
    _prctl(_PDEATHSIG, _SIGKILL)
    if order["parent"] not in (None, os.getppid()):  # it ended before the signal was asked for
        os._exit(1)
    if order["visible"] is not None:
        _outer(order["visible"], order["uid"])
    _libc.signal(_SIGINT, None)  # a signal that process 1 has no handler for does not reach it
    filter_ = _seccomp_filter()
    os.write(state_file, b"started\n")
    if not (program := os.fork()):
        os.close(state_file)
        try:
            _give_up_rights(order, filter_)
            _run(order["source"], order["token"], result_file)
        finally:
            os._exit(1)
    os.write(state_file, _watched(program, order["seconds"]))
    os._exit(0)


def _watched(program: int, seconds: float) -> bytes:
    """How the program ends: `exit N`, `signal N` or `time`."""
    end = select.poll()
    end.register(_syscall("pidfd_open", _PIDFD_OPEN, program, 0), select.POLLIN)
    if not end.poll(seconds * 1000):
        return b"time"
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    return b"exit %d" % code if code >= 0 else b"signal %d" % -code


# ------------------------------------------------------------------------------------- namespaces


def _outer(visible: dict[str, str | None], uid: int | None) -> None:
    """Go on as process 1 of new namespaces, in a file system of what is `visible`, read-only: path
    -> None, or the target of a link. This process waits for it and ends."""
    _enter_user_namespace(uid)
    if monitor := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(monitor, 0)[1]) and 1)
    _prctl(_PDEATHSIG, _SIGKILL)
    os.setsid()
    sources = {path: os.open(path, os.O_PATH) for path, link in visible.items() if link is None}
    null = os.open("/dev/null", os.O_PATH)
    root = "/tmp"
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, link in visible.items():
        if link is None:
            os.makedirs(root + path, exist_ok=True)
            _mount(f"/proc/self/fd/{sources[path]}", root + path, None, _BIND | _REC)
            os.close(sources[path])
        else:
            os.symlink(link, root + path)
    for folder in ("/tmp", "/dev"):
        os.makedirs(root + folder, exist_ok=True)
    os.close(os.open(f"{root}/dev/null", os.O_CREAT))
    read_only = struct.pack("4Q", 1 | _NOSUID | _NODEV, 0, 0, 0)
    _syscall("mount_setattr", _MOUNT_SETATTR, -100, root.encode(), 0x8000, read_only, 32)
    _mount(f"/proc/self/fd/{null}", f"{root}/dev/null", None, _BIND)
    os.close(null)
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={DISK_BYTES},mode=1777")
    os.chdir(root)
    _syscall("pivot_root", _machine()[3], b".", b".")
    _checked("umount2", _libc.umount2(b".", _DETACH))
    os.chdir("/tmp")


def _enter_user_namespace(uid: int | None) -> None:
    """New namespaces of every kind. `uid`: the user outside who the program is, if this is root."""
    me, group = os.geteuid(), os.getegid()
    ids = f"0 {{}} 1\n{INSIDE} {uid} 1\n" if uid else f"{INSIDE} {{}} 1\n"
    ready, go = os.pipe()
    if not (helper := os.fork()):  # has the rights that this process loses
        os.close(go)
        if not os.read(ready, 1):
            os._exit(1)
        folder = f"/proc/{os.getppid()}"
        for name, text in (
            *([] if uid else [("setgroups", "deny")]),
            ("uid_map", ids.format(me)),
            ("gid_map", ids.format(group)),
        ):
            with open(f"{folder}/{name}", "w") as file:
                file.write(text)
        os._exit(0)
    _checked("unshare", _libc.unshare(_NEW_NAMESPACES))
    os.write(go, b"x")
    os.close(ready)
    os.close(go)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the user namespace got no user")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text and text.encode() for text in (source, target, kind)]
    _checked(f"mount {target}", _libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None))


# ------------------------------------------------------------------------------------ the program


def _give_up_rights(order: dict, filter_: bytes) -> None:
    """The program's user, limits and system calls."""
    os.setsid()
    if order["uid"]:
        user = INSIDE if order["visible"] is not None else order["uid"]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _syscall("capset", _machine()[2], struct.pack("Ii", 0x20080522, 0), bytes(24))
    seconds = int(order["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    _prctl(_DUMPABLE, 0)
    _prctl(_NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(filter_)
    program = struct.pack("HxxxxxxQ", len(filter_) // 8, ctypes.addressof(code))
    address = ctypes.create_string_buffer(program)
    _prctl(_SECCOMP, 2, ctypes.addressof(address))


def _run(source: str, token: str, result_file: int) -> None:
    """Run the source as `__main__`, and write the token behind its last line, or the error."""
    write, leave, flush = os.write, os._exit, sys.stdout.flush  # the program may replace them
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        result = token
    except BaseException as error:
        result = _described(error)
    try:
        flush()
    except BaseException as error:
        result = _described(error)
    write(result_file, result.encode(errors="backslashreplace"))
    leave(0)


def _described(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"[:300]
    except BaseException:  # of the program's own __str__
        return name


def _seccomp_filter() -> bytes:
    """Berkeley packet filter: `_DENIED` fail with EPERM; clone without new namespaces alone."""
    architecture, column, *_, clone = _machine()
    allow, refuse, missing, kill = (
        0x7FFF0000,
        0x50000 | errno.EPERM,
        0x50000 | errno.ENOSYS,
        1 << 31,
    )
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 1 << 30), (answer, 0, 0, refuse)]  # x32
    # glibc then uses clone, whose flags are in a register.
    lines += [(equal, 0, 1, _CLONE3), (answer, 0, 0, missing)]
    for numbers in _DENIED.values():
        lines += [(equal, 0, 1, numbers[column]), (answer, 0, 0, refuse)]
    lines += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, _NEW_NAMESPACES)]
    lines += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _machine() -> tuple[int, int, int, int, int]:
    name = os.uname().machine
    if name not in _MACHINES:
        raise OSError(f"the filter of system calls is for x86-64 and aarch64, not {name}")
    return _MACHINES[name]


def _prctl(option: int, *values: int) -> None:
    _checked("prctl", _libc.prctl(option, *map(ctypes.c_ulong, (*values, *[0] * 4)[:4])))


def _syscall(name: str, number: int, *arguments: int | bytes) -> int:
    longs = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *longs))


def _checked(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
