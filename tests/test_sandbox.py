"""Programs that mean harm are contained, end in time, and leave neither a process nor a file behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megacode import sandbox
from megacode.errors import UserError
from megacode.sandbox import Kind, Outcome, run_programs

ROOT = Path(__file__).parents[1]
KINDS: tuple[Kind, ...] = ("bubblewrap", "namespaces")
Run = Callable[..., Outcome]


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run_program` of an indented source, in each kind that this machine offers; then nothing of it is left."""
    kind: Kind = request.param
    try:
        assert sandbox._run(kind, "", 30.0, 512, "").ok
    except sandbox._NoSandboxError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(sandbox, "_kind", lambda: kind)
    descriptors = os.listdir("/proc/self/fd")
    files = {folder: set(os.listdir(folder)) for folder in ("/tmp", "/dev/shm", "/")}

    def run_indented(source: str, **options: object) -> Outcome:
        started = time.monotonic()
        outcome = sandbox.run_program(
            textwrap.dedent(source),
            **{"seconds": 20.0, **options},  # type: ignore[arg-type]
        )
        assert time.monotonic() - started < 40
        return outcome

    yield run_indented
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert not [
        path
        for folder in files
        for path in set(os.listdir(folder)) - files[folder]
        if "escaped" in path
    ]
    assert not left_over(), "processes of the sandbox"


def left_over() -> list[str]:
    """Living processes that are sandboxes of this process: children, or of their transient users."""
    for _ in range(50):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = dict(
                    line.split(":\t", 1)
                    for line in (folder / "status").read_text().splitlines()
                    if ":\t" in line
                )
                command = (folder / "cmdline").read_text()
            except (OSError, ValueError):
                continue
            is_ours = int(status["PPid"]) == os.getpid() and "_give_up_rights" in command
            if is_ours or int(status["Uid"].split()[0]) in sandbox._TRANSIENT_USERS:
                found.append(f"{folder.name} {status['Name']} {status['State']}")
        if not found:
            break
        time.sleep(0.1)
    return found


def test_a_good_program_is_ok_and_its_output_is_there(run: Run) -> None:
    source = """
        import asyncio, dataclasses, math, sys, threading, typing
        @dataclasses.dataclass
        class P:
            x: int
        assert P(3).x == 3 and __name__ == "__main__"
        open("/tmp/own", "w").write("mine")
        assert open("own").read() == "mine"
        thread = threading.Thread(target=open, args=("/tmp/thread", "w"))
        thread.start()
        thread.join()
        assert open("thread").read() == "" and asyncio.run(asyncio.sleep(0, 7)) == 7
        print(input(), "äöü", file=sys.stdout)
    """
    assert run(source, stdin="first line\nsecond") == Outcome(True, "", "first line äöü\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os; os._exit(0)\nassert False", "left before its last line, with exit code 0"),
        ("import os; os._exit(7)", "with exit code 7"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", ""),
        ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("class E(Exception):\n def __str__(self): raise SystemExit(0)\nraise E", "E"),
        ("import os; os.closerange(0, 4096)\nx = 1", "left before its last line"),
        ("import os\nfor file in range(3, 4096):\n try: os.fstat(file)\n except OSError: continue\n os.dup2(1, file)", ""),
        ("import os\nos.write = print\nos._exit = print\nraise ValueError(1)", "ValueError: 1"),
        ("\ud800", "UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_a_program_that_fails_or_leaves_early_is_not_ok(run: Run, source: str, reason: str) -> None:
    outcome = run(source)
    assert not outcome.ok and reason in outcome.reason


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, os\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except OSError: pass\nwhile True: pass",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "import os\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  while True: pass\nwhile True: pass",
    ],
)  # fmt: skip
def test_a_program_without_an_end_is_ended(run: Run, source: str) -> None:
    started = time.monotonic()
    outcome = run(source, seconds=1.0)
    assert (outcome.ok, outcome.reason) == (False, "did not end within 1 s")
    assert time.monotonic() - started < 15


def test_a_grandchild_ends_with_the_program(run: Run) -> None:
    source = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(1000)
            os._exit(0)
    """
    assert run(source).ok  # the fixture looks for the grandchild


def test_there_are_few_processes_and_little_memory_in_all(run: Run) -> None:
    source = """
        import os
        children = 0
        try:
            while children < 1000:
                if os.fork() == 0:
                    os.read(os.pipe()[0], 1)
                children += 1
        except OSError:
            print(children)
    """
    assert int(run(source).stdout) < 10
    segments = """
        import ctypes
        libc = ctypes.CDLL(None)
        print(libc.shmget(0, 1 << 20, 0o1600), libc.memfd_create(b"x", 0))
    """
    assert run(segments).stdout == "-1 -1\n"


def test_there_is_no_network(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[object] = []
        threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True).start()
        source = f"""
            import socket, _socket
            def udp(): _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
            def unix(): _socket.socket(_socket.AF_UNIX)
            def netlink(): _socket.socket(16, 3)
            for attempt in (lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2),
                            lambda: socket.getaddrinfo("localhost.example", 80), udp, unix, netlink):
                try:
                    attempt()
                except OSError:
                    continue
                print("connected", attempt)
        """
        assert run(source) == Outcome(True, "", "")
        assert not accepted


def test_the_network_is_another_even_without_the_filter(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfiltered = sandbox._inside().replace('"socket": (41, 198), ', "")
    assert unfiltered != sandbox._inside()
    monkeypatch.setattr(sandbox, "_inside", lambda: unfiltered)
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
            import socket
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2)
            except OSError as error:
                print(type(error).__name__, [name for _, name in socket.if_nameindex()])
        """
        assert run(source).stdout in ("ConnectionRefusedError ['lo']\n", "OSError ['lo']\n")


def test_nothing_of_the_disk_is_seen_or_written(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    home = Path.home() / ".profile"
    source = f"""
        import os, sys
        for path in ({str(secret)!r}, {str(home)!r}, {str(ROOT / "README.md")!r}, "/etc/passwd", "/etc/hostname", "/proc/1/environ",
                     "/proc/self/mem", "/sys/kernel", "/dev/vda", "/dev/shm", "/var", "/run", "/home", "/work"):
            if os.path.exists(path):
                print("seen", path)
        writable = []
        for folder, folders, files in os.walk("/"):
            try:
                open(folder + "/escaped", "w").close()
                writable.append(folder)
            except OSError:
                pass
            if folder.count("/") > 2:
                folders.clear()
        print(writable)
        for path in ("/", "/usr", os.path.dirname(os.__file__), os.path.dirname(sys.executable)):
            if not os.statvfs(path).f_flag & os.ST_RDONLY:
                print("not read-only", path)
        if os.path.exists("/../etc") or os.listdir("/..") != os.listdir("/"):
            print("the old root is there")
        stdlib = os.path.dirname(os.__file__)
        for path in (stdlib + "/os.py", sys.executable):
            try:
                open(path, "r+b")
                print("writable", path)
            except OSError:
                pass
    """
    assert run(source) == Outcome(True, "", "['/tmp']\n")
    assert (
        run("import os; print(os.environ.keys() - {'LC_CTYPE', 'PWD'}, os.listdir('.'))").stdout
        == "set() []\n"
    )


def test_the_disk_cannot_be_filled(run: Run) -> None:
    source = """
        import os
        total = 0
        try:
            for i in range(1000):
                with open(f"/tmp/{i}", "wb", buffering=0) as file:
                    for _ in range(10):
                        total += file.write(bytes(1 << 20))
        except OSError as error:
            print(total >> 20, error.strerror)
    """
    assert run(source).stdout == "64 No space left on device\n"


def test_endless_output_ends(run: Run) -> None:
    outcome = run("while True: print('x' * 100_000)")
    assert not outcome.ok and "File too large" in outcome.reason and len(outcome.stdout) == 1 << 20


def test_output_of_any_bytes_is_text(run: Run) -> None:
    outcome = run("import sys; sys.stdout.buffer.write(b'\\xff\\x00a')")
    assert outcome == Outcome(True, "", "\ufffd\0a")


def test_other_processes_are_out_of_reach(run: Run) -> None:
    source = f"""
        import ctypes, os, signal
        libc = ctypes.CDLL(None, use_errno=True)
        for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}):
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
                try:
                    os.kill(pid, number)
                except OSError:
                    pass
        os.kill(0, 0)
        for other in (lambda: libc.ptrace(16, 1, 0, 0), lambda: libc.unshare(0x10000000), lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0),
                      lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), lambda: libc.chroot(b"/tmp"), lambda: libc.setuid(0)):
            assert other() == -1, other
        assert libc.prctl(39, 0, 0, 0, 0) == 1 and libc.prctl(21, 0, 0, 0, 0) == 2
        assert os.getuid() not in (0, {os.getuid()})
    """
    assert run(source) == Outcome(True, "", "")


def test_a_shell_is_in_the_sandbox_too(run: Run) -> None:
    source = """
        import os, subprocess
        done = subprocess.run(["/bin/sh", "-c", "echo /home /root/.profile /proc/*; id -u; echo x > /escaped; exec 3<>/dev/tcp/127.0.0.1/22"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.returncode != 0, "/proc/*" in done.stdout)
        os.execv("/bin/sh", ["sh", "-c", "exit 0"])
    """
    outcome = run(source)
    assert outcome.reason == "left before its last line, with exit code 0" and not outcome.ok


def test_a_written_result_is_no_token(run: Run) -> None:
    """What a program writes to all files that it has does not make it ok."""
    source = """
        import os
        for file in range(3, 64):
            try:
                os.write(file, b"exit 0" + b"0" * 26)
            except OSError:
                pass
        os._exit(0)
    """
    assert not run(source).ok


def test_many_run_at_a_time_in_order(run: Run) -> None:
    outcomes = run_programs([f"print({i}); assert {i} % 3" for i in range(12)], 3, seconds=20.0)
    assert [outcome.ok for outcome in outcomes] == [bool(i % 3) for i in range(12)]
    assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(12)]


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 1.0])
def test_it_ends_with_the_process_that_started_it(run: Run, seconds: float) -> None:
    """Also when that one ends while the sandbox starts."""
    kind = sandbox._kind()
    code = f"from megacode import sandbox; sandbox._run({kind!r}, 'import time; time.sleep(1000)', 1000.0, 512, '')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (inside := of_parent(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    parent.kill()
    parent.wait()
    assert inside
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]


def of_parent(pid: int) -> list[str]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return done.stdout.split()


def test_without_any_kind_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(kind: Kind, *_: object) -> Outcome:
        raise sandbox._NoSandboxError(f"{kind} fails")

    monkeypatch.setattr(sandbox, "_run", none)
    sandbox._kind.cache_clear()
    with pytest.raises(UserError) as told:
        sandbox.run_program("print(1)")
    assert "bubblewrap: bubblewrap fails; namespaces: namespaces fails" in str(told.value)
    assert "install bubblewrap" in str(told.value) and "max_user_namespaces" in str(told.value)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="not on darwin"):
        sandbox.run_program("print(1)")


def test_where_namespaces_are_forbidden_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    code = sandbox._inside().replace("_libc.unshare(_NEW_NAMESPACES)", "_libc.unshare(1)")
    monkeypatch.setattr(sandbox, "_inside", lambda: code)
    with pytest.raises(sandbox._NoSandboxError, match="unshare: Invalid argument"):
        sandbox._run("namespaces", "print(1)", 5.0, 512, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_without_rights_has_it_too(kind: Kind) -> None:
    """As another user, with an interpreter that this user may read."""
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists():
        pytest.skip("needs root, to become another user, and /usr/bin/python3")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        package = Path(folder, "megacode")
        package.mkdir()
        for name in ("errors", "sandbox", "sandboxed"):
            shutil.copy(ROOT / f"megacode/{name}.py", package)
        code = f"""
            from megacode import sandbox
            source = "import ctypes, os, struct; rights = ctypes.create_string_buffer(b'x' * 24, 24)\\n"
            source += "ctypes.CDLL(None).capget(struct.pack('Ii', 0x20080522, 0), rights)\\n"
            source += "os.listdir('/usr'); print(os.getuid(), os.path.exists({folder!r}), rights.raw == bytes(24))"
            try:
                print(sandbox._run({kind!r}, source, 20.0, 512, ""))
                print(sandbox._run({kind!r}, "import os\\nwhile 1: os.fork()", 2.0, 512, "").ok)
            except sandbox._NoSandboxError as error:
                print("none:", error)
        """
        done = subprocess.run(
            [python, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, user=12345, group=12345, extra_groups=[],
        )  # fmt: skip
        if done.stdout.startswith("none:"):
            pytest.skip(done.stdout)
        assert (
            done.stdout == "Outcome(ok=True, reason='', stdout='65534 False True\\n')\nFalse\n"
        ), done.stderr
