"""Disks that fill up or fail. Needs root for small file systems, and strace for writes that fail."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.acceptance.conftest import clean
from tests.acceptance.faults import IN_FLIGHT, SQLITE, OwnServer, users_in
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="needs strace (apt-get install strace), to make writes fail"
)
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT 'u' || i AS user_id FROM n"
FEW, MANY = 40, 30_000


@contextlib.contextmanager
def small_disk(size, owner=0):
    folder = Path(tempfile.mkdtemp(prefix="audience-sync-disk-"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755,uid={owner}", "tmpfs", folder], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def on(command, url, there):
    command.path.write_text(command.path.read_text().replace(url, there))
    return command


@needs_root
@SQLITE
def test_a_full_disk_loses_nothing_and_work_continues_when_there_is_room(start, url, sandbox):
    with small_disk("2m") as disk:
        there = f"sqlite:///{disk}/own.db"
        few = on(start({"In": NUMBERS.format(FEW)}), url, there)
        assert few("sync")[0] == 0
        known = few.document("history")
        (disk / "other").write_bytes(b"x" * 500_000)
        many = on(start({"In": NUMBERS.format(MANY)}), url, there)
        code, output = many("sync")
        assert code in {1, 2}, output
        assert "free some space on the disk" in output
        assert len(users_in(sandbox)) == FEW
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert many("sync", "--no-deliver")[0] == 0
        history = many.document("history")
        assert history[-1] == known[0]
        assert (history[0]["member_count"], history[0]["entered_count"]) == (MANY, MANY - FEW)
        with contextlib.closing(sa.create_engine(there).connect()) as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            connection.engine.dispose()


@needs_root
@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_server_with_a_full_disk_loses_nothing_and_work_continues_when_there_is_room(start, url, sandbox):
    with small_disk("150m") as disk:
        folder = disk / "data"
        folder.mkdir()
        server = OwnServer(str(folder))
        try:
            there = server.postgres.url(server.postgres.create())
            few = on(start({"In": NUMBERS.format(FEW)}), url, there)
            assert few("sync")[0] == 0
            left = shutil.disk_usage(disk).free
            (disk / "other").write_bytes(b"x" * (left - 6_000_000))
            many = on(start({"In": NUMBERS.format(10 * MANY)}), url, there)
            code, output = many("sync", "--no-deliver")
            assert code in {1, 2}, output
            assert len(users_in(sandbox)) == FEW
            (disk / "other").unlink()
            subprocess.run(["mount", "-o", "remount,size=900m", disk], check=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                server.control("start")  # it stops if its log is full as well
            assert many("sync", "--no-deliver")[0] == 0
            runs = many.document("history")
            assert (runs[0]["member_count"], runs[0]["entered_count"]) == (10 * MANY, 10 * MANY - FEW)
        finally:
            server.control("stop")


@needs_strace
@SQLITE
@pytest.mark.parametrize("failing", ["fdatasync:error=EIO", "pwrite64:error=ENOSPC"])
def test_no_failing_write_loses_anything(start, tmp_path, sandbox, failing):
    """Each write fails in turn: no delivery is wrongly accepted, and the next command sends the rest."""
    command = start({"In": NUMBERS.format(FEW)})
    own, pristine, trace = tmp_path / "own.db", tmp_path / "pristine", tmp_path / "trace"
    shutil.copy(own, pristine)
    program = [sys.executable, "-m", "audience_sync", "--config", str(command.path), "sync"]
    refused = 0
    for number in (*range(1, 40), *range(40, 2_000, 7)):
        sandbox.state.reset()
        for left in tmp_path.glob("own.db*"):
            left.unlink()
        shutil.copy(pristine, own)
        name = failing.partition(":")[0]
        traced = ["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={name}"]
        traced += ["-e", f"inject={failing}:when={number}"]
        process = subprocess.run(
            [*traced, *program], env=clean(), capture_output=True, text=True, check=False
        )
        output = process.stdout + process.stderr
        if "INJECTED" not in trace.read_text():
            break
        assert "Traceback" not in output
        assert process.returncode in {0, 1, 2}, (number, output)
        if process.returncode:  # SQLite does without the directory's fdatasync
            refused += 1
            assert "Nothing was lost" in output, (number, output)
        deliveries = command.document("deliveries", "--status", "accepted")
        assert {delivery["subject_id"] for delivery in deliveries} <= users_in(sandbox), number
        code, output = command("sync")
        assert code == 0, (number, output)
        assert len(users_in(sandbox)) == FEW, number
        assert len(sandbox.state.requests) <= FEW + IN_FLIGHT, number
    else:
        pytest.fail("a write failed in every attempt: raise the range")
    assert refused > 10


@needs_root
@needs_strace
@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_server_whose_log_cannot_be_written_loses_nothing(start, url, sandbox, tmp_path):
    """In each attempt a later sync of the WAL fails, in every process: the server stops and recovers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        data = Path(folder, "data")
        data.mkdir()
        server = OwnServer(str(data))
        trace, failed = tmp_path / "trace", 0
        try:
            for number in range(2, 16):
                sandbox.state.reset()
                there = server.postgres.url(server.postgres.create())
                command = on(start({"In": NUMBERS.format(FEW)}), url, there)
                assert command("db", "upgrade")[0] == 0
                pid = (data / "postmaster.pid").read_text().split()[0]
                traced = ["strace", "-f", "-qq", "-o", trace, "-p", pid, "-e", "trace=fdatasync"]
                with subprocess.Popen(
                    [*traced, "-e", f"inject=fdatasync:error=EIO:when={number}"], stderr=subprocess.PIPE
                ) as tracer:
                    time.sleep(0.5)  # for strace to attach to all of the server's processes
                    code, output = command("sync")
                    tracer.terminate()
                assert "Traceback" not in output
                assert code in {0, 1, 2}, (number, output)
                failed += "INJECTED" in trace.read_text()
                until(lambda command=command: command("status")[0] == 0)  # it recovers
                deliveries = command.document("deliveries", "--status", "accepted")
                assert {delivery["subject_id"] for delivery in deliveries} <= users_in(sandbox), number
                code, output = command("sync")
                assert code == 0, (number, output)
                assert len(users_in(sandbox)) == FEW, number
                assert len(sandbox.state.requests) <= FEW + 4 * IN_FLIGHT, number
        finally:
            server.control("stop")
        assert failed > 5
