"""Upgrade a database in processes that are killed, each at a later statement.

Arguments: the database's URL (on SQLite with {} for the number of the kill, which makes a file for each), the revision
to start from, and the number of statements between two kills. Another process checks the database after each kill. The
last upgrade is not killed, and its number is printed.
"""

import os
import signal
import sys

import sqlalchemy as sa

from audience_sync.db import dialects, engines, migrate

ROW = (
    "INSERT INTO {our}definitions (key, name, kind, created_at) "
    "VALUES ('vips', 'VIPs', 'audience', '2026-01-01 00:00:00.000000')"
)


def opened(url):
    return engines.open_own(url, "audience_sync")


def in_process(work):
    """Do the work in a child process; return the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in {0, -signal.SIGKILL}, code
    return -code


def upgrade_until(url, last):
    """Die before the statement of this number; if there are fewer, before the commit."""
    engine, seen = opened(url), []

    def count(*_):
        seen.append(1)
        if len(seen) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sa.event.listen(engine, "before_cursor_execute", count)
    sa.event.listen(engine, "commit", count)
    migrate.upgrade(engine)


def prepare(url, start):
    engine = opened(url)
    if start != "base":
        migrate.upgrade(engine, start)
        with engines.write(engine) as connection:
            dialects.sql(connection, ROW)
    engine.dispose()


def assert_as_before(url, start):
    engine = opened(url)
    assert migrate.current(engine) == (None if start == "base" else start)
    if start != "base":
        with engines.read(engine) as connection:
            assert dialects.sql(connection, "SELECT key FROM {our}definitions").scalars().all() == ["vips"]
    engine.dispose()


def main(url, start, step):
    number = 1
    while True:
        here = url.format(number)
        if here != url or number == 1:
            in_process(lambda here=here: prepare(here, start))
        if not in_process(lambda here=here, number=number: upgrade_until(here, number)):
            break
        in_process(lambda here=here: assert_as_before(here, start))
        number += step
    print(number)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
