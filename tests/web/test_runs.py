"""The pages of runs: the list, what a run did with counts that add up, and who changed."""

from itertools import chain

import pytest

from audience_sync.audiences import decisions
from audience_sync.audiences.runs import take_lease
from audience_sync.db import engines
from audience_sync.web.runs import run as run_page
from tests.web.synced import SPEND, VIPS, Pages


@pytest.fixture
def pages(engine, url, tmp_path):
    return Pages(engine, tmp_path, url)


def test_a_run_is_shown_as_steps_whose_counts_add_up(pages):
    pages.configure(VIPS)
    pages.people("ann", "bob", "cyd", None)
    first = pages.sync()
    pages.execute("UPDATE {our}deliveries SET status = 'accepted', request_id = 1, settled_at = created_at")
    pages.people("bob", "dan")
    second = pages.sync()
    text = pages.text(f"/runs/{first}")
    assert text.startswith(
        f"Run {first} of vips ✓ succeeded · the first run, which sends every member · manual"
    )
    assert "set aside: 1 row: no user id" in text or "set aside: 1 row:" in text
    assert "Compared with nothing, because it is the first 0 before + 3 entered - 0 exited = 3 after" in text
    assert "Queued 3 deliveries, the last one settled 2026-01-01 00:01" in text
    assert "✓ accepted 3" in text
    text = pages.text(f"/runs/{second}")
    assert f"Compared with run {first} 3 before + 1 entered - 2 exited = 2 after" in text
    assert "Queued 3 deliveries: ◔ pending 3" in text
    assert text.endswith(
        "Entered: 1 User Sent? dan ◔ pending Exited: 2 User Sent? ann ◔ pending cyd ◔ pending"
    )
    page = pages.get(f"/runs/{second}").text
    assert f'href="/deliveries?run={second}&amp;status=pending"' in page
    assert f"<title>Run {second} of vips · audience-sync</title>" in page


def test_a_run_that_changed_nothing_says_so(pages):
    pages.configure(VIPS)
    pages.people("ann")
    pages.sync()
    text = pages.text(f"/runs/{pages.sync()}")
    assert "1 before + 0 entered - 0 exited = 1 after" in text
    assert "Queued nothing: there was nothing to send" in text


def test_a_failed_run_shows_the_error_and_what_to_do(pages):
    pages.configure('[[audiences]]\nname = "Broken"\nsql = "SELECT user_id FROM nowhere_at_all"\n')
    text = pages.text(f"/runs/{pages.sync('broken')}")
    assert "Why it failed broken: its SQL does not work" in text
    assert "It stored and sent nothing. When the cause is fixed: audience-sync sync broken" in text
    assert "Failed 2026-01-01 00:01" in text


def test_a_held_run_shows_its_changes_and_the_reason_beside_the_decision(pages):
    pages.configure(VIPS.replace("sql", "guard_above = 1\nsql"))
    pages.people("ann", "bob", "cyd")
    pages.sync()
    pages.people("cyd", "<dan>")
    run_id = pages.sync()
    text = pages.text(f"/runs/{run_id}")
    assert (
        "It waits for a decision The guard holds it: 2 of 3 members would leave, and max_exit_ratio is 0.5."
        in text
    )
    assert f"audience-sync approve {run_id} commits exactly these changes" in text
    assert "3 before + 1 entered - 2 exited = 2 would be members" in text
    assert "Prepared 3 deliveries: ▲ held 3" in text
    assert text.endswith(
        "Would enter: 1 User Sent? <dan> ▲ held Would exit: 2 User Sent? ann ▲ held bob ▲ held"
    )
    page = pages.as_operator(run_page, f"/runs/{run_id}", run_id=str(run_id))
    assert f'action="/runs/{run_id}/approve"' in page
    assert f'action="/runs/{run_id}/reject"' in page
    assert ">Send 3 changes</button>" in page
    assert f'name="back" value="/runs/{run_id}"' in page


def test_a_rejected_run_shows_why(pages):
    pages.configure(VIPS)
    pages.people("ann")
    run_id = pages.sync(hold=True)
    decisions.reject(pages.engine, run_id, pages.clock)
    text = pages.text(f"/runs/{run_id}")
    assert "Why it was rejected It was rejected by hand." in text
    assert "Held, and rejected later 2026-01-01 00:01" in text
    assert text.endswith("Would have entered: 1 User Sent? ann ○ cancelled 2026-01-01 00:01")
    assert "Prepared 1 delivery, the last one settled 2026-01-01 00:01" in text


@pytest.mark.parametrize("hold", [False, True])
def test_a_traits_changes_have_old_and_new_values(pages, hold):
    pages.configure(SPEND)
    pages.people(("ann", "1"), ("bob", "2"), ("cyd", "3"))
    pages.sync("spend")
    pages.people(("ann", '"1"'), ("bob", "2"), ("dan", "<4>"))
    run_id = pages.sync("spend", hold=hold)
    text = pages.text(f"/runs/{run_id}")
    assert "(1 changed their value)" in text
    titles = ("Would enter", "Would exit", "Would change") if hold else ("Entered", "Exited", "Changed")
    queued, cancelled = ("▲ held", "▲ held") if hold else ("◔ pending", "○ cancelled 2026-01-01 00:02")
    values = (
        f'{titles[0]}: 1 User New value Sent? dan "<4>" {queued} ',
        f'{titles[1]}: 1 User Old value Sent? cyd "3" {cancelled} ',
        f'{titles[2]}: 1 User Old value New value Sent? ann "1" "\\"1\\"" {queued}',
    )
    assert text.endswith("".join(values))


def test_the_users_of_a_run_show_whether_their_change_was_sent(pages):
    pages.configure(VIPS)
    pages.people("ann", "bob", "cyd")
    run_id = pages.sync()
    settled = "settled_at = created_at, request_id = 7"
    pages.execute(f"UPDATE {{our}}deliveries SET status = 'accepted', {settled} WHERE subject_id = 'ann'")
    pages.execute("DELETE FROM {our}deliveries WHERE subject_id = 'bob'")
    pages.people()
    pages.sync()  # has deliveries of the same users
    for path in (f"/runs/{run_id}", f"/runs/{run_id}/changes"):
        text = pages.text(path)
        assert "ann ✓ accepted 2026-01-01 00:01 , request 7 bob not stored cyd ○ cancelled" in text
    assert 'href="/requests/7"' in pages.get(f"/runs/{run_id}").text


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("sorted_rows", [0, 10_000])
def test_the_changes_of_a_run_are_shown_page_by_page(pages, hold, sorted_rows, monkeypatch):
    monkeypatch.setattr("audience_sync.history.changes.SORTED_ROWS", sorted_rows)
    pages.configure(SPEND)
    users = [f"u{number:03}" for number in range(180)]
    pages.people(*((user, "1") for user in users[:120]))
    pages.sync("spend")
    pages.people(*((user, "2" if number % 2 else "1") for number, user in enumerate(users) if number >= 60))
    run_id = pages.sync("spend", hold=hold)
    text = pages.text(f"/runs/{run_id}")
    for what, expected in {"entered": users[120:], "exited": users[:60], "changed": users[61:120:2]}.items():
        found = pages.users(f"/runs/{run_id}/changes?what={what}")
        assert list(chain(*found)) == expected
        assert [len(page) for page in found] == ([50, 10] if len(expected) == 60 else [30])
        assert f"All {len(expected)} who {what}" in text
    assert "There are no more." in pages.text(f"/runs/{run_id}/changes?what=exited&after=zzz")
    if not hold:  # and long afterwards
        pages.people()
        pages.sync("spend")
        for what, expected in {
            "entered": users[120:],
            "exited": users[:60],
            "changed": users[61:120:2],
        }.items():
            assert list(chain(*pages.users(f"/runs/{run_id}/changes?what={what}"))) == expected


def test_hostile_ids_change_as_others_do(pages):
    pages.configure(VIPS)
    hostile = ["<script>alert(1)</script>", "x" * 255, "\u202e\u05d0\u05d1", "🦊", "a&b?c=d#e", "'\""]
    pages.people(*hostile)
    run_id = pages.sync()
    assert sorted(chain(*pages.users(f"/runs/{run_id}/changes?what=entered"))) == sorted(hostile)
    assert "<script>alert" not in pages.get(f"/runs/{run_id}").text


def test_runs_are_listed_newest_first_by_key_and_state(pages):
    assert "There are no runs yet: audience-sync sync makes the first." in pages.text("/runs")
    pages.configure(VIPS + SPEND)
    pages.people(("ann", "1"))
    vips, spend = pages.sync(), pages.sync("spend")
    held = pages.sync(hold=True)

    def listed(path):
        page = pages.get(path).text
        return [run_id for run_id in (held, spend, vips) if f'<a href="/runs/{run_id}"' in page]

    assert listed("/runs") == [held, spend, vips]
    assert listed("/runs?key=vips") == [held, vips]
    assert listed("/runs?status=held") == [held]
    assert listed("/runs?key=spend&status=held") == []
    assert "key contains a NUL character" in pages.text("/runs?key=%00", 400)
    assert "No run matches." in pages.text("/runs?key=nobody")
    assert "status must be one of running, held," in pages.text("/runs?status=odd", 400)


def test_older_runs_are_on_the_next_page(pages):
    pages.configure(VIPS)
    pages.people("ann")
    first = pages.sync()
    for _ in range(7):  # 2, 4, 8 …, 128 runs
        pages.execute(
            'INSERT INTO {our}runs (definition_id, mode, "trigger", status, as_of, started_at, finished_at, '
            'member_count) SELECT definition_id, mode, "trigger", status, as_of, started_at, finished_at, 1 FROM {our}runs'
        )
    page = pages.get("/runs?key=vips").text
    assert page.count('aria-label="Run ') == 50
    assert f"/runs?key=vips&amp;before={first + 78}" in page
    last = pages.get(f"/runs?key=vips&before={first + 28}").text
    assert last.count('aria-label="Run ') == 28
    assert 'rel="next"' not in last
    assert '<a href="/runs?key=vips">Newest</a>' in last


@pytest.mark.parametrize(
    "path", ["/runs/0", "/runs/99", "/runs/9999999999999999999/changes", "/runs/99/changes", "/runs/x"]
)
def test_an_unknown_run_is_not_found(pages, path):
    answer = pages.get(path, 400 if "x" in path or len(path) > 20 else 404)
    assert "There is no run" in answer.text or "must be a whole number" in answer.text


def test_an_unknown_kind_of_change_is_refused(pages):
    pages.configure(VIPS)
    run_id = pages.sync()
    assert "what must be one of entered, exited, changed, not '<b>'." in pages.text(
        f"/runs/{run_id}/changes?what=<b>", 400
    )


def test_a_run_whose_process_is_gone_is_abandoned_and_its_pages_are_not_live(pages):
    pages.configure(VIPS)
    run_id = pages.sync()
    pages.execute("UPDATE {our}runs SET status = 'running', finished_at = NULL")
    for path in (f"/runs/{run_id}", "/runs", "/schedule"):
        assert "✕ abandoned" in pages.text(path)
        assert "hx-get" not in pages.get(path).text
    assert "Why it was abandoned Its process ended before it was done." in pages.text(f"/runs/{run_id}")
    with engines.write(pages.engine) as connection:
        take_lease(connection, "vips", 600)
    for path in (f"/runs/{run_id}", "/runs", "/schedule"):
        assert "◐ running" in pages.text(path)
        assert "hx-get" in pages.get(path).text


def test_runs_have_the_time_that_they_are_of_and_a_choice_of_keys(pages):
    pages.configure(VIPS)
    pages.sync()
    pages.configure(SPEND)
    text = pages.text("/runs?key=vips")
    assert "Key all spend vips State" in text
    assert "Run Key As of Started State" in text
    assert "<option selected>vips" in pages.get("/runs?key=vips").text
    assert "vips 2026-01-01 00:01 2026-01-01 00:01" in text


def test_a_page_that_is_not_there_leads_on_and_is_no_page_of_the_list(pages):
    page = pages.get("/runs/99", 404).text
    assert '<a href="/runs">Show all runs</a>' in page
    assert "aria-current" not in page
