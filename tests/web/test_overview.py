"""The overview: what needs attention and what to do, the state of each definition, and the backlog of the lanes."""

import datetime as dt
import os

import pytest

from audience_sync import history
from audience_sync.audiences import runs
from audience_sync.cli.daemon import begin_commands
from audience_sync.db import engines
from audience_sync.history import paging
from audience_sync.queue import destination
from audience_sync.web.overview import overview
from audience_sync.web.site import dashboard
from tests.web.synced import SPEND, VIPS, Pages


@pytest.fixture
def pages(engine, url, tmp_path):
    return Pages(engine, tmp_path, url)


def row(pages, key):
    """The row of a definition, as text."""
    return (
        pages.text("/")
        .split("Audiences and traits")[1]
        .split(f" {key} ", 1)[1]
        .split(" No daemon has")[0]
        .split(" Delivery ")[0]
    )


def needs(pages):
    return pages.text("/").split("Needs attention")[1].split("Audiences and traits")[0].strip()


def test_an_empty_database_says_how_to_begin(pages):
    text = pages.text("/")
    assert "There are no definitions yet. To make the first:" in text
    assert f"[[traits]] in {pages.app.settings.path}" in text
    assert "Nothing is waiting to be sent." in text


def test_a_definition_without_a_run_shows_the_command(pages):
    pages.configure(VIPS)
    assert row(pages, "vips").startswith("VIPs ● enabled - never: audience-sync sync vips 2026-01-01 02:00")


def test_a_definition_has_its_size_its_sparkline_and_what_is_pending_of_all_its_runs(pages):
    pages.configure(VIPS)
    pages.people("ann", "bob")
    pages.sync()
    pages.people("ann", "bob", "cyd")
    run_id = pages.sync()
    assert row(pages, "vips") == "VIPs ● enabled 3 2026-01-01 00:02 ✓ succeeded 2026-01-01 02:00 3"
    page = pages.get("/").text
    assert 'aria-label="from 2 to 3 members in 2 runs"' in page
    assert f'href="/runs/{run_id}"' in page


def test_a_lane_shows_what_it_has_to_send_and_for_how_long(pages):
    pages.configure(VIPS, 'api_key = "k"\nidentify_per_minute = 6\nbulk = false')
    pages.people(*(f"u{number:02}" for number in range(30)))
    pages.sync()
    text = pages.text("/")
    assert "No process is sending at the moment: audience-sync deliver or the daemon" in text
    assert "identify 30 about 5 minutes after sending starts 0 6 normal" in text
    assert "bulk 0 - 0 0 switched off" in text


def test_a_failed_run_is_shown_with_its_reason_and_the_command(pages):
    pages.configure('[[audiences]]\nname = "Broken"\nsql = "SELECT user_id FROM nowhere_at_all"\n')
    run_id = pages.sync("broken")
    assert row(pages, "broken").startswith("Broken ✕ failed 0")
    text = needs(pages)
    assert f"✕ failed run {run_id} of broken : broken: its SQL does not work" in text
    assert "To try now: audience-sync sync broken" in text


def test_a_held_run_shows_readers_the_commands_and_operators_the_buttons(pages):
    pages.configure(VIPS)
    pages.people("ann")
    run_id = pages.sync(hold=True)
    text = needs(pages)
    assert f"▲ held run {run_id} of vips waits for a decision." in text
    assert f"audience-sync approve {run_id} commits exactly these changes" in text
    assert "<button" not in pages.get("/").text.partition("<main")[2]
    page = pages.as_operator(overview, "/")
    assert f'action="/runs/{run_id}/approve"' in page
    assert f'action="/runs/{run_id}/reject"' in page
    assert page.count('name="csrf" value="secret"') == 3  # and to sign out
    assert "<details><summary>Decide</summary>" in page
    assert ">Send 1 change</button>" in page
    assert row(pages, "vips").startswith("VIPs ▲ held 0")
    assert row(pages, "vips").endswith("1 held")
    assert "Nothing is waiting to be sent. 1 more is held." in pages.text("/")


def test_a_held_run_that_is_not_the_newest_shows_what_it_holds(pages):
    pages.configure(VIPS)
    pages.people("ann")
    run_id = pages.sync(hold=True)
    pages.execute(
        "INSERT INTO {our}runs (definition_id, mode, trigger, status, as_of, started_at, finished_at, error) "
        "SELECT definition_id, 'changes', 'manual', 'failed', as_of, started_at, started_at, 'no' FROM {our}runs"
    )
    assert row(pages, "vips").endswith("1 held")
    page = pages.as_operator(overview, "/")
    assert f'action="/runs/{run_id}/approve"' in page
    assert ">Send 1 change</button>" in page


def test_large_counts_end_with_a_plus(pages, monkeypatch):
    for module, name in ((paging, "MAX_COUNTED"), (history, "MAX_COUNTED"), (history, "MAX_COUNTED_OF_LANE")):
        monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(history.overview, "MAX_COUNTED_OF_LANE", 2)
    pages.configure(VIPS + SPEND, 'api_key = "k"\nidentify_per_minute = 6\nbulk = false')
    pages.people(*((f"u{number}", "1") for number in range(9)))
    pages.sync()
    assert " 2026-01-01 02:00 2+ spend " in row(pages, "vips")
    assert "identify 2+ more than 20 seconds after sending starts 0 6" in pages.text("/")
    pages.sync("spend", hold=True)
    assert row(pages, "spend").endswith("2+ held")
    assert "2+ more are held." in pages.text("/")
    assert ">Send 2+ changes</button>" in pages.as_operator(overview, "/")
    pages.execute("UPDATE {our}deliveries SET status = 'dead', error = 'no', settled_at = created_at")
    assert "2+ dead deliveries" in needs(pages)


@pytest.mark.parametrize("schedule", ["", "every 1 minute"])
def test_only_a_schedule_waits_for_a_decision(pages, schedule):
    pages.configure(VIPS.replace("sql", f'schedule = "{schedule}"\nsql'))
    pages.people("ann")
    pages.sync(hold=True)
    assert ("Not run by schedule until their held run is decided: vips." in needs(pages)) == bool(schedule)


def test_a_late_definition_shows_since_when(pages):
    pages.configure(VIPS.replace("sql", 'schedule = "every 1 minute"\nsql'))
    pages.people("ann")
    pages.sync()
    with engines.write(pages.engine) as connection:
        destination.record_heartbeat(connection, pages.clock.now())
    pages.clock.sleep(3_600)
    text = needs(pages)
    assert (
        "▲ late vips should have run at 2026-01-01 00:02 . They run as soon as the daemon is started: "
        "audience-sync daemon" in text
    )
    assert (
        "▲ not running The daemon is not running, so nothing runs by schedule. Start it: audience-sync daemon"
        in text
    )
    assert row(pages, "vips").startswith("VIPs ▲ late 1")


def test_a_run_that_left_out_most_of_its_rows_is_shown(pages):
    pages.configure(VIPS.replace("FROM people", "FROM people UNION ALL SELECT ' ' UNION ALL SELECT ''"))
    pages.people("ann")
    pages.sync()
    assert needs(pages).endswith(
        "run 1 of vips has 1 member, because it left out 2 rows that cannot be used (empty). Check its query."
    )


def test_dead_deliveries_lead_to_their_page(pages):
    pages.configure(VIPS)
    pages.people("ann", "bob")
    pages.sync()
    pages.execute("UPDATE {our}deliveries SET status = 'dead', error = 'no', settled_at = created_at")
    assert "✕ dead 2 dead deliveries : Userpilot refused them, or every attempt failed." in needs(pages)
    assert '<a href="/deliveries?status=dead">' in pages.get("/").text


def test_a_stopped_destination_shows_why(pages):
    with engines.write(pages.engine) as connection:
        destination.stop(
            connection, dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "Userpilot refused the API key: set another."
        )
    text = needs(pages)
    assert (
        text
        == "■ stopped Nothing has been sent since 2026-01-01 00:00 . Userpilot refused the API key: set another."
    )


def test_a_lane_that_fails_is_named_until_long_after_its_pause(pages):
    pages.configure(VIPS)
    pages.people("ann")
    pages.sync()
    until = pages.clock.now() + dt.timedelta(seconds=16)
    slow = {
        "factor": 1.0,
        "paused_until": until.isoformat(),
        "reason": "Connection refused",
        "pause_level": 5,
    }
    with engines.write(pages.engine) as connection:
        destination.set_slow_downs(connection, {"identify": slow})
    advice = (
        "Connection refused. audience-sync deliver tries again. Check [destination] endpoint and the network."
    )
    assert needs(pages) == f"✕ failing The lane identify pauses until 2026-01-01 00:01:20 : {advice}"
    assert "identify 1 not known while it sends nothing 0 600 Connection refused until 2026" in pages.text(
        "/"
    )
    with engines.write(pages.engine) as connection:
        since = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).isoformat()
        destination.set_slow_downs(connection, {"identify": slow | {"since": since}})
    assert "Connection refused since 2026-01-01 00:00:00 until 2026-01-01 00:01:20" in pages.text("/")
    pages.clock.sleep(60)
    assert needs(pages) == f"✕ failing The lane identify sends nothing: {advice}"
    with engines.write(pages.engine) as connection:
        destination.record_heartbeat(connection, pages.clock.now())
    assert "Connection refused. It is retried automatically. Check" in needs(pages)
    pages.clock.sleep(3_600)
    assert "Connection refused" not in pages.text("/")


def test_a_lane_that_was_slow_and_has_nothing_to_send_needs_nothing(pages):
    pages.configure(VIPS)
    slow = {"factor": 0.5, "paused_until": pages.clock.now().isoformat(), "reason": "no", "pause_level": 1}
    with engines.write(pages.engine) as connection:
        destination.set_slow_downs(connection, {"track": slow})
    assert needs(pages) == "✓ Nothing needs attention."


def test_a_changed_destination_shows_what_to_do(pages):
    pages.configure(VIPS + SPEND)
    pages.people(("ann", "1"))
    pages.sync()
    pages.configure(VIPS + SPEND, 'api_key = "another"')
    text = needs(pages)
    assert (
        "▲ held The members of vips were made for another destination than the one that is configured now"
        in text
    )
    assert "audience-sync sync vips --full" in text
    assert 'action="/destination/accept"' in pages.as_operator(overview, "/")


def test_commands_begin_as_this_dashboard_was_started(pages):
    pages.configure('[[audiences]]\nname = "Broken"\nsql = "SELECT user_id FROM nowhere_at_all"\n')
    usual = pages.asgi
    pages.asgi = dashboard(pages.app, "audience-sync --config /demo.toml")
    pages.sync("broken")
    assert "To try now: audience-sync --config /demo.toml sync broken" in needs(pages)
    with engines.write(pages.engine) as connection:
        destination.stop(connection, pages.clock.now(), "The key is wrong: run `audience-sync deliver`.")
    assert "run audience-sync --config /demo.toml deliver ." in needs(pages)
    pages.asgi = usual
    assert "run audience-sync deliver ." in needs(pages)


def test_pages_say_that_the_configuration_has_changed_since(pages):
    pages.configure(VIPS)
    notice = "The configuration has changed since this dashboard was started"
    assert notice not in pages.text("/")
    os.utime(pages.app.settings.path, ns=(1, 1))
    for path in ("/", "/runs", "/query"):
        assert notice in pages.text(path)
    pages.app.settings.path.unlink()
    assert notice in pages.text("/")


def test_commands_name_a_configuration_that_is_not_where_they_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUDIENCE_SYNC_CONFIG", raising=False)
    usual, other = tmp_path / "audience_sync.toml", tmp_path / "a b.toml"
    assert begin_commands(usual) == f"audience-sync --config {usual}"  # it was removed
    usual.touch()
    assert begin_commands(usual) == "audience-sync"
    assert begin_commands(other) == f"audience-sync --config '{other}'"
    monkeypatch.setenv("AUDIENCE_SYNC_CONFIG", str(other))
    assert begin_commands(other) == "audience-sync"


def test_nothing_needs_attention_without_schedules(pages):
    pages.configure(VIPS.replace("sql", 'schedule = ""\nsql'))
    assert needs(pages) == "✓ Nothing needs attention."


def test_a_daemon_that_no_longer_runs_needs_attention(pages):
    pages.configure(VIPS)
    assert needs(pages) == "✓ Nothing needs attention."  # cron may run `sync`
    assert "No daemon has run on this database." in pages.get("/").text
    with engines.write(pages.engine) as connection:
        destination.record_heartbeat(connection, pages.app.clock.now() - dt.timedelta(hours=1))
    assert needs(pages).startswith("▲ not running The daemon is not running, so nothing runs by schedule.")


def test_the_page_is_live_only_while_something_runs(pages):
    pages.configure(VIPS)
    pages.people("ann")
    run_id = pages.sync()
    assert "hx-get" not in pages.get("/").text
    pages.execute(
        "UPDATE {our}runs SET status = 'running', finished_at = NULL WHERE run_id = :run_id", run_id=run_id
    )
    with engines.write(pages.engine) as connection:
        runs.take_lease(connection, "vips", 600)
    page = pages.get("/").text
    assert 'hx-get="/" hx-trigger="every 3s"' in page
