"""A PgBouncer before the tests' PostgreSQL server."""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.tools import required

SECONDS = 60  # to start, at a high load


@contextmanager
def pgbouncer(server_url, mode, **more):
    """Run PgBouncer in a pool mode; yield a function that returns the URL of a database through it."""
    program = required("pgbouncer", "apt-get install pgbouncer, on Debian")
    url = sa.make_url(server_url)
    socket = Path(url.query["host"])
    folder = Path(tempfile.mkdtemp(prefix="pgb-"))
    folder.chmod(0o777)
    lines = ["[databases]", f"* = host={socket} port={url.port or 5432} user={url.username}", "[pgbouncer]"]
    lines += ["listen_addr =", f"unix_socket_dir = {folder}", "listen_port = 6432", "auth_type = any"]
    # Few connections of the server, so that those who take turns get each other's.
    size = {"session": 40, "transaction": 4}[mode]
    lines += [f"pool_mode = {mode}", f"default_pool_size = {size}", f"logfile = {folder}/log"]
    lines += [f"{name} = {value}" for name, value in more.items()]
    (folder / "ini").write_text("\n".join(lines))
    # PgBouncer does not run as root, and must be able to open the socket.
    user = ["-u", socket.owner()] if os.geteuid() == 0 else []
    with subprocess.Popen([program, "-q", *user, str(folder / "ini")], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not (folder / ".s.PGSQL.6432").exists():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "PgBouncer did not start"
                time.sleep(0.05)
            yield lambda database: f"postgresql+psycopg://{url.username}@/{database}?host={folder}&port=6432"
        finally:
            process.terminate()
    shutil.rmtree(folder, ignore_errors=True)
