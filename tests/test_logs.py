import ast
import json
import logging
import re

import pytest
import sqlalchemy as sa

from audience_sync import logs
from audience_sync.errors import DatabaseError


@pytest.fixture(autouse=True)
def _as_it_was():
    names = (None, *logs.QUIET)
    levels = [logging.getLogger(name).level for name in names]
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest's own are not for `configure` to close
    yield
    root.handlers = handlers
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def record(**changes):
    fields = {"name": "audience_sync.x", "levelno": 20, "levelname": "INFO", "msg": "%d sent", "args": (3,)}
    logging.getLogger().handle(logging.makeLogRecord(fields | {"created": 1_795_687_200.9} | changes))


def test_a_line_of_text(capsys):
    logs.configure()
    record()
    assert capsys.readouterr() == ("", "2026-11-26T10:00:00Z INFO 3 sent\n")


def test_a_line_of_json(capsys):
    logs.configure("json")
    record(msg='a "b"\nc d', args=())
    assert json.loads(capsys.readouterr().err) == {
        "at": "2026-11-26T10:00:00Z", "level": "info", "logger": "audience_sync.x", "message": 'a "b"\nc d',
    }  # fmt: skip


def test_the_level_and_the_last_call_take_effect(capsys):
    logs.configure("text", "debug")
    logs.configure("json", "warning")
    logging.getLogger("audience_sync").info("dropped")
    logging.getLogger("audience_sync").warning("logged")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "logged"


@pytest.mark.parametrize(
    "name", ["httpx", "httpcore", "sqlalchemy.engine", "alembic.runtime", "apscheduler.x"]
)
def test_libraries_log_warnings_and_errors_only(capsys, name):
    logs.configure("text", "debug")
    logging.getLogger(name).info("dropped")
    logging.getLogger(name).warning("logged")
    assert capsys.readouterr().err.endswith("Z WARNING logged\n")
    logs.configure("text", "error")
    logging.getLogger(name).warning("dropped")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_shows_where_it_arose_but_no_values(capsys, form):
    logs.configure(form)
    engine = sa.create_engine("sqlite://")
    try:
        try:
            with engine.connect() as connection:
                connection.execute(
                    sa.text("SELECT :user_id FROM 'a table of u-17850'"), {"user_id": "u-17850"}
                )
        except sa.exc.OperationalError as error:
            raise DatabaseError("the database is not there: start it") from error
    except DatabaseError:
        logging.getLogger("audience_sync").exception("the run failed")
    printed = capsys.readouterr().err
    for expected in (
        "ERROR" if form == "text" else "error",
        "the run failed",
        "DatabaseError: the database is not",
    ):
        assert expected in printed
    assert "OperationalError" in printed
    assert "test_an_exception_shows_where_it_arose_but_no_values" in printed
    assert "u-17850" not in printed
    engine.dispose()


def calls_of_event(repository):
    """The event and the fields of each call of `logs.event` that writes the event as a string."""
    for path in (repository / "audience_sync").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logs.event":
                name = node.args[2]
                if isinstance(name, ast.Constant):
                    yield name.value, {keyword.arg for keyword in node.keywords}


def test_the_page_of_log_events_is_complete(repository):
    page = (repository / "docs/reference/log-events.md").read_text(encoding="utf-8")
    table = {
        name: set(re.findall(r"`(\w+)`", fields))
        for names, fields in re.findall(r"^\| (`.*?`) \| \w+ \| (.*?)\| ", page, re.MULTILINE)
        for name in re.findall("`(.*?)`", names)
    }
    events = dict(calls_of_event(repository))
    assert len(events) > 10
    assert {name: table.get(name) for name in events} == events
