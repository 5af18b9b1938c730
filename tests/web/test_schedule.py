"""The page of the schedule."""

import pytest

from audience_sync.db import tables
from tests.queue.conftest import START
from tests.web.pages import HOUR, open_pages

CONFIGURATION = """
[[audiences]]
name = "Daily"
sql = "SELECT 1"
schedule = "0 6 * * *"
full_schedule = "30 20 * * *"

[[audiences]]
name = "Often"
sql = "SELECT 1"
schedule = "every 5 minutes"

[[audiences]]
name = "Never"
sql = "SELECT 1"
schedule = ""

[[audiences]]
name = "Default"
sql = "SELECT 1"
"""


@pytest.fixture
def pages(url, tmp_path):
    opened = open_pages(url, tmp_path, CONFIGURATION)
    opened.app.clock.seconds = 86_400
    yield opened
    opened.app.close()


def test_the_next_day_is_in_order_and_frequent_slots_are_one_line(pages):
    text = pages.text("/schedule").partition("Last 24 hours")[0]
    lines = [
        "2026-01-02 00:05 often next of many: every 5 minutes",
        "2026-01-02 02:00 default next of many: 0 */2 * * *",
        "2026-01-02 06:00 daily changes",
        "2026-01-02 20:30 daily in full: every member is sent again",
    ]
    places = [text.index(line) for line in lines]
    assert places == sorted(places)
    assert (" never " in text, text.count("often")) == (False, 1)
    assert "No daemon has run on this database" in text


def test_the_last_day_has_runs_with_their_slots_and_late_ones(pages):
    pages.add_definition("daily")
    slot_at = START + 2 * HOUR
    pages.add_run(1, at=START - HOUR)
    pages.add_run(2, at=slot_at + HOUR)
    pages.add_run(3, at=START + 5 * HOUR, status="failed", error="broken <b>SQL</b>", trigger="manual")
    slot = {"definition_id": 1, "slot_at": slot_at, "taken_at": slot_at, "run_id": 2}
    pages.add(tables.schedule_slots, slot)
    text = pages.text("/schedule").partition("Last 24 hours")[2]
    assert "2026-01-01 05:00 daily 3 ✕ failed broken <b>SQL</b> manual" in text
    assert "2026-01-01 03:00 daily 2 ✓ succeeded 2026-01-01 02:00 ▲ late" in text
    assert "2025-12-31" not in text


def test_many_runs_of_a_definition_are_one_line(pages):
    pages.add_definition("often")
    for number in range(1, 20):
        pages.add_run(number, at=START + number * HOUR, status="failed" if number == 18 else "succeeded")
    text = pages.text("/schedule").partition("Last 24 hours")[2]
    assert "the newest of many runs; the last 6: 5 succeeded, 1 failed (all)" in text
    assert text.count("often") == 1
    assert "/runs?key=often" in pages.addresses("/schedule")


def test_a_late_definition_and_one_that_waits_say_so(pages):
    pages.add_definition("daily", 1)
    pages.add_definition("often", 2)
    pages.add_run(1, 1, status="held", held_by="hold")
    pages.add(tables.schedule_slots, {"definition_id": 2, "slot_at": START, "taken_at": START})
    text = pages.text("/schedule").partition("Last 24 hours")[0]
    assert "daily ▲ held after its held run is approved or rejected" in text
    assert "▲ late since 2026-01-01 00:05" in text
