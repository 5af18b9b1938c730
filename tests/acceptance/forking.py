"""Fast starts of `audience-sync`: a server that has imported everything forks a process for each start.

The process has its own pid, environment, pipes and signals, and can be stopped and killed like any other.
`Started` represents it, as subprocess.Popen would.
"""

import array
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import traceback
import uuid
from functools import partial
from pathlib import Path

IMPORTED = (  # what the commands import when they run
    "audience_sync.app", "audience_sync.daemon", "audience_sync.intake", "audience_sync.history",
    "audience_sync.intake.files", "audience_sync.userpilot.client", "audience_sync.intake.server",
    "audience_sync.intake.http", "audience_sync.audiences.query.review", "audience_sync.audiences.query.catalog",
    "audience_sync.audiences.query.english", "audience_sync.audiences.decisions", "audience_sync.db.checks",
    "sqlglot", "sqlglot.dialects.sqlite", "sqlglot.dialects.postgres", "sqlalchemy.dialects.sqlite",
    "sqlalchemy.dialects.postgresql.psycopg", "psycopg", "rich.progress",
)  # fmt: skip


class Forker:
    """The tests' side of the server."""

    def __init__(self, first=None):
        """Start a server, as a fork of the server of `first` if that is given."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._codes, self._process = {}, None
        with theirs:
            if first is not None:
                socket.send_fds(first._socket, [b"{}"], [theirs.fileno()])
                first._await_start()
            else:
                command = [sys.executable, __file__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def start(self, arguments, environ, cwd=None, **streams):
        """Start a process with these arguments; `streams` as for subprocess.Popen."""
        pipes = {name: os.pipe() for name in ("stdout", "stderr") if streams.get(name) == subprocess.PIPE}
        ends = [pipes[name][1] if name in pipes else streams[name].fileno() for name in ("stdout", "stderr")]
        order = json.dumps(
            {"arguments": arguments, "environ": dict(environ), "cwd": str(cwd or Path.cwd())}
        ).encode()
        self._socket.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ends))])
        for _, end in pipes.values():
            os.close(end)
        pid = self._await_start()
        opened = {name: os.fdopen(end, "r", encoding="utf-8") for name, (end, _) in pipes.items()}
        return Started(self, pid, opened)

    def _await_start(self):
        while "started" not in (message := json.loads(self._socket.recv(1000))):
            self._codes[message["pid"]] = message["code"]
        self._codes.pop(message["started"], None)  # of a process that had this pid before
        return message["started"]

    def code(self, pid, timeout):
        """Exit code of a process, negative for the signal that ended it; None while it runs."""
        self._socket.settimeout(timeout)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while pid not in self._codes:
                message = json.loads(self._socket.recv(1000))
                self._codes[message["pid"]] = message["code"]
        self._socket.settimeout(None)
        return self._codes.get(pid)

    def close(self):
        self._socket.close()
        if self._process is not None:
            self._process.wait(30)


class Started:
    """A started process."""

    def __init__(self, forker, pid, streams):
        self._forker, self.pid, self._streams = forker, pid, streams
        self.stdout, self.stderr = streams.get("stdout"), streams.get("stderr")
        self.returncode = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in self._streams.values():
            stream.close()
        self.wait()

    def poll(self):
        if self.returncode is None:
            self.returncode = self._forker.code(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = self._forker.code(self.pid, timeout)
            if self.returncode is None:
                raise subprocess.TimeoutExpired("audience-sync", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Return its output, (stdout, stderr); None if there is no pipe."""
        output = dict.fromkeys(self._streams, b"")
        with selectors.DefaultSelector() as selector:
            for name, stream in self._streams.items():
                selector.register(stream.fileno(), selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(timeout)
                if not ready:
                    raise subprocess.TimeoutExpired("audience-sync", timeout)
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    output[key.data] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
        self.wait(timeout)
        return tuple(output[name].decode() if name in output else None for name in ("stdout", "stderr"))


def prepare():
    """Import what the commands need, and build what they build once in a process; return their entry point."""
    from audience_sync.audiences.query import parser  # noqa: PLC0415
    from audience_sync.cli.main import app, main  # noqa: PLC0415

    for name in IMPORTED:
        importlib.import_module(name)
    parser.parse_query("trait('plan') = 'pro'")
    with contextlib.redirect_stdout(io.StringIO()):
        app(["sync", "--help"], standalone_mode=False)  # typer imports more when it reads options
    gc.collect()
    gc.freeze()  # the processes need not go through it, which would copy its memory
    return main


def serve(number, main):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test run
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with socket.socket(fileno=number) as orders, selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == wake:
                    os.read(wake, 65536)
                    report(orders)
                elif not take(orders, main):
                    return


def report(orders):
    """Send the exit codes of the processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            orders.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def take(orders, main):
    """Start the next process; return False when the tests have ended."""
    order, ends, _, _ = socket.recv_fds(orders, 1_000_000, 2)
    if not order:
        return False
    pid = os.fork()
    if pid == 0:
        orders.close()
        if order == b"{}":
            serve(*ends, main)
            os._exit(0)
        become(json.loads(order), ends, main)
    for end in ends:
        os.close(end)
    orders.send(json.dumps({"started": pid}).encode())
    return True


def become(order, ends, main):
    """Run the program in the forked process; $TEST_WINDOW_SECONDS shortens its minute."""
    from audience_sync import crash  # noqa: PLC0415
    from audience_sync.db import leases  # noqa: PLC0415
    from audience_sync.queue import worker  # noqa: PLC0415

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, end in zip((1, 2), ends, strict=True):
            os.dup2(end, number)
            os.close(end)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environ"])
        faulthandler.enable()  # on SIGABRT it prints the stacks of its threads
        importlib.reload(crash)
        leases._PROCESS = uuid.uuid4().hex
        if seconds := os.environ.get("TEST_WINDOW_SECONDS"):
            worker.DeliverySettings = partial(worker.DeliverySettings, window_seconds=float(seconds))
        sys.argv = ["audience-sync", *order["arguments"]]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  (as the interpreter would)
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]), prepare())
