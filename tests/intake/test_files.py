"""`import`: lines become calls, each of them once."""

import bz2
import gzip
import io
import json
import os
import subprocess
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from audience_sync.db import dialects, engines
from audience_sync.intake import files
from tests.waiting import until

SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here


def identify(user, **members):
    return json.dumps({"type": "identify", "userId": user, **members}).encode()


ANN, BOB, CLEO = identify("ann"), identify("bob"), identify("cleo")


@pytest.fixture
def command(start):
    return start({})


@pytest.fixture
def import_file(command, tmp_path):
    """Imports a file of these bytes; returns the exit code and the output."""

    def import_file(content, *options):
        path = tmp_path / "calls"
        path.write_bytes(content)
        return command("import", str(path), *options)

    return import_file


@pytest.fixture
def users(engine):
    """The users of the stored calls, in order."""

    def read():
        with engines.read(engine) as connection:
            found = dialects.sql(connection, "SELECT user_id FROM {our}calls ORDER BY call_id")
            return list(found.scalars())

    return read


@pytest.mark.parametrize(
    "content",
    [
        ANN + b"\n" + BOB + b"\n",
        ANN + b"\n" + BOB,
        ANN + b"\r\n" + BOB + b"\r\n",
        b"\n \n" + ANN + b"\n\t\n\r\n" + BOB + b"\n\n",
        b"\xef\xbb\xbf" + ANN + b"\n" + BOB,
        gzip.compress(ANN + b"\n" + BOB, mtime=0),
        gzip.compress(ANN + b"\n", mtime=0) + gzip.compress(BOB, mtime=0),
        (ANN + b"\r\n" + BOB + b"\r\n").decode().encode("utf-16"),
        b"\xfe\xff" + (ANN + b"\n" + BOB).decode().encode("utf-16-be"),
        (ANN + b"\n" + BOB).decode().encode("utf-16-le"),
        gzip.compress((ANN + b"\n" + BOB).decode().encode("utf-16"), mtime=0),
        gzip.compress(b"\xef\xbb\xbf" + ANN + b"\n\xef\xbb\xbf" + BOB, mtime=0),
        ANN + b"\r" + BOB,
        gzip.compress(b"\xef\xbb\xbf" + ANN + b"\r\r" + BOB + b"\r", mtime=0),
        (ANN + b"\r" + BOB).decode().encode("utf-16"),
        (b"\n" + ANN + b"\n" + BOB).decode().encode("utf-16-be"),
        (ANN + b"\r\n" + BOB).decode().encode("utf-32-le"),
    ],
    ids=[
        "lines",
        "no end",
        "CRLF",
        "blank lines",
        "BOM",
        "gzip",
        "two members",
        "UTF-16",
        "UTF-16 BE",
        "UTF-16 LE without BOM",
        "gzip of UTF-16",
        "gzip of files with BOM",
        "CR",
        "gzip with BOM and CR",
        "UTF-16 with CR",
        "UTF-16 BE that begins with a blank line",
        "UTF-32 LE without BOM",
    ],
)
def test_each_line_is_a_call(import_file, users, content):
    code, said = import_file(content)
    assert (code, said.splitlines()[0]) == (0, "2 lines: 2 accepted.")
    assert sorted(users()) == ["ann", "bob"]


@pytest.mark.parametrize(
    "encoded",
    [
        b"\xef\xbb\xbf" + ANN + b"\n" + BOB,
        (ANN + b"\n" + BOB).decode().encode("utf-16"),
        gzip.compress(b"\xef\xbb\xbf" + ANN + b"\r\n" + BOB, mtime=0),
        ANN + b"\r" + BOB,
    ],
    ids=["BOM", "UTF-16", "gzip with BOM", "CR"],
)
def test_a_line_is_the_same_call_in_each_encoding(import_file, users, encoded):
    assert import_file(ANN + b"\n" + BOB)[0] == 0
    assert import_file(encoded)[1].splitlines()[0] == "2 lines: 0 accepted, 2 known already."
    assert sorted(users()) == ["ann", "bob"]


LIST = json.dumps([json.loads(ANN), json.loads(BOB)])
ONE_A_LINE = "import reads one JSON object a line (NDJSON), plain or gzip"
ARRAY = f"The file is a JSON array, but {ONE_A_LINE}. Convert it: jq -c '.[]' FILE. Nothing is imported."
BATCH = f"The file is a batch, but {ONE_A_LINE}. Convert it: jq -c '.batch[]' FILE. Nothing is imported."
SPREAD = (
    f"The file has JSON objects that span several lines, but {ONE_A_LINE}. Convert it: jq -c . FILE. "
    "Nothing is imported."
)
SEVERAL = f"The file has several JSON objects in a line, but {ONE_A_LINE}. Convert it: jq -c . FILE. Nothing is imported."
COMMAS = (
    f"The file has commas between JSON objects, but {ONE_A_LINE}. Convert it: sed 's/,[[:space:]]*$//' FILE. "
    "Nothing is imported."
)


def tar(content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("calls.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@SQLITE
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LIST.encode(), ARRAY),
        (json.dumps(json.loads(LIST), indent=2).encode(), ARRAY),
        (b"\n " + LIST.encode(), ARRAY),
        (b"\xef\xbb\xbf" + LIST.encode(), ARRAY),
        (LIST.encode("utf-16"), ARRAY),
        (gzip.compress(LIST.encode(), mtime=0), ARRAY),
        (json.dumps({"batch": json.loads(LIST)}).encode(), BATCH),
        (json.dumps({"batch": json.loads(LIST)}, indent=1).replace("{\n", "{").encode(), BATCH),
        (json.dumps(json.loads(ANN), indent=2).encode(), SPREAD),
        (json.dumps(json.loads(ANN), indent=2).replace("\n", "\r").encode(), SPREAD),
        (b'{ "type": "identify",\r\n  "userId": "ann" }\r\n', SPREAD),
        (b"{\n}\n", SPREAD),
        (gzip.compress(json.dumps(json.loads(ANN), indent=4).encode("utf-16"), mtime=0), SPREAD),
        (b'{"sentAt": "2024-05-01", "batch": [' + ANN + b'], "context": {"ip": "::1"}}', BATCH),
        (b'{"context": {"ip": "::1"}, "batch": [' + ANN + b"]}\n" + ANN, BATCH),
        (b'{\n "sentAt": "2024-05-01", "batch": [' + ANN + b"]}", BATCH),
        (b'{"type": "identify", "userId": "ann", "traits": {"tags": [\n1,\n2]}}', SPREAD),
        (b'{"type": "identify", "userId": "ann"\n, "traits": {}}', SPREAD),
        (ANN + BOB, SEVERAL),
        (ANN + b" " + BOB + b"\n" + CLEO, SEVERAL),
        (ANN + b" ,\r\n" + BOB, COMMAS),
        (
            b"PK\3\4....",
            f"The file is a ZIP archive, but {ONE_A_LINE}: convert it first. Nothing is imported.",
        ),
        (
            bz2.compress(ANN),
            f"The file is compressed with bzip2, but {ONE_A_LINE}: convert it first. Nothing is imported.",
        ),
        (
            gzip.compress(gzip.compress(ANN, mtime=0), mtime=0),
            f"The file is compressed with gzip twice, but {ONE_A_LINE}: convert it first. Nothing is imported.",
        ),
        (
            gzip.compress(tar(ANN), mtime=0),
            f"The file is a tar archive, but {ONE_A_LINE}: convert it first. Nothing is imported.",
        ),
    ],
)
def test_a_file_without_one_object_a_line_is_refused_with_advice(import_file, users, content, message):
    code, said = import_file(content)
    assert (code, said, users()) == (2, f"audience-sync: {message}\n", [])


@pytest.mark.parametrize("packed", [False, True])
def test_from_standard_input(command, users, packed):
    content = gzip.compress(ANN, mtime=0) if packed else ANN
    with command.popen("import", "-", stdin=subprocess.PIPE, preexec_fn=lambda: None) as process:
        process.stdin.buffer.write(content)
        assert process.communicate(timeout=100)[1] == ""
    assert (process.returncode, users()) == (0, ["ann"])


@SQLITE
@pytest.mark.parametrize(
    "content", [b"", b"\n\n", gzip.compress(b"", mtime=0)], ids=["nothing", "blank", "gzip"]
)
def test_an_empty_file_has_no_calls(import_file, users, content):
    code, said = import_file(content)
    assert (code, said.splitlines()[0], users()) == (0, "0 lines: 0 accepted.", [])


@SQLITE
@pytest.mark.parametrize("path", ["missing", "."])
def test_a_missing_file_or_a_folder_is_an_error(command, path):
    code, said = command("import", path)
    assert code == 2
    assert said.startswith(f"audience-sync: {path} cannot be read: ")


@SQLITE
def test_a_byte_that_is_not_utf_8_spoils_its_line_only(import_file, users):
    code, said = import_file(ANN + b'\r{"userId": "\xff"}\r' + BOB)
    assert (code, said.splitlines()[0]) == (0, "3 lines: 2 accepted, 1 set aside.")
    assert sorted(users()) == ["ann", "bob"]


def test_lines_before_a_truncation_of_gzip_are_imported(import_file, users):
    lines = [identify(f"u{number}", traits={"n": number}) for number in range(20_000)]
    content = gzip.compress(b"\n".join(lines), mtime=0)
    code, said = import_file(content[: len(content) // 2])
    assert code == 2
    assert said.startswith("audience-sync: The file cannot be read after line ")
    assert said.endswith("The lines before are imported.\n")
    count = int(said.split("after line ")[1].split(":")[0])
    assert 5_000 < count < 15_000
    assert sorted(users()) == sorted(f"u{number}" for number in range(count))
    assert import_file(content)[1].splitlines()[0] == (
        f"20,000 lines: {20_000 - count:,} accepted, {count:,} known already."
    )


@SQLITE
@pytest.mark.parametrize("length", [2, 9, 10, 11])
def test_gzip_that_ends_in_its_header_is_an_error(import_file, users, length):
    code, said = import_file(gzip.compress(ANN, mtime=0)[:length])
    assert (code, users()) == (2, [])
    assert said.startswith("audience-sync: The file cannot be read: ")
    assert said.endswith(" Nothing is imported.\n")


@SQLITE
def test_a_call_may_have_a_batch_among_its_traits(import_file, users):
    content = identify("ann", batch=[]) + b"\n" + identify("bob", traits={"batch": [{"a": 1}]})
    assert import_file(content)[1].splitlines()[0] == "2 lines: 2 accepted."
    assert users() == ["ann", "bob"]


@SQLITE
def test_nuls_before_the_first_line_spoil_that_line_only(import_file, users):
    code, said = import_file(bytes(8) + ANN + b"\n" + BOB)
    assert (code, said.splitlines()[0], users()) == (0, "2 lines: 1 accepted, 1 set aside.", ["bob"])


@SQLITE
@pytest.mark.parametrize(
    "end", [b"\x1f\x8bnonsense", b"nonsense", bytes(8)], ids=["a bad member", "no member", "a wrong sum"]
)
def test_damage_at_the_end_of_gzip_is_an_error(import_file, users, end):
    content = gzip.compress(ANN + b"\n", mtime=0)
    code, said = import_file((content[:-8] if end == bytes(8) else content) + end)
    assert code == 2
    assert said.startswith("audience-sync: The file cannot be read after line 1: ")
    assert users() == ["ann"]


BAD = [
    ANN,
    b"{",
    b"",
    b"[]",
    b'{"type": "track", "userId": "ann"}',
    b"\xff\xfe",
    b'{"type": "identify"}',
    identify("long", traits={"a": "x" * 32_768}),
    b'"' + b"x" * 200_000 + b'"',
    b'{"type": "identify", "userId": "\\ud800"}',
    b"[" * 60_000,
    b'{"type": "identify", "userId": "ann", "traits": {"city": "K\xf6ln"}}',  # Latin-1
    BOB,
]
REASONS = {
    2: "not valid JSON",
    4: "a call must be a JSON object",
    5: "event must be a non-empty string in a track call",
    6: "not valid JSON",
    7: "userId or anonymousId is required",
    8: "the call is larger than 32 KB",
    9: "the call is larger than 32 KB",
    10: "text with a lone surrogate is not valid Unicode",
    11: "not valid JSON",
    12: "not valid JSON",
}


@SQLITE
def test_invalid_lines_are_reported_and_set_aside(import_file, users, tmp_path):
    code, said = import_file(b"\n".join(BAD), "--set-aside", str(tmp_path / "bad"))
    assert code == 0
    assert said.splitlines()[0] == "12 lines: 2 accepted, 10 set aside."
    assert [line for line in said.splitlines() if line.startswith("Line ")] == [
        f"Line {number}: {reason}." for number, reason in REASONS.items()
    ]
    assert users() == ["ann", "bob"]
    aside = [json.loads(line) for line in (tmp_path / "bad").read_text("utf-8").splitlines()]
    assert [(each["line"], each["reason"]) for each in aside] == list(REASONS.items())
    assert aside[2]["text"] == '{"type": "track", "userId": "ann"}'
    assert len(aside[6]["text"]) == 196_608
    assert (tmp_path / "bad").stat().st_mode & 0o777 == 0o600


@SQLITE
def test_of_many_bad_lines_only_the_first_are_listed(import_file):
    code, said = import_file(b"{\n" * 30)
    assert code == 1  # none of them is a call
    assert said.count("not valid JSON") == 20
    assert "No line is a call: import reads one JSON object a line" in said
    assert (
        "And 10 more lines that are not valid calls: --set-aside PATH writes all of them to a file." in said
    )


@SQLITE
def test_an_unwritable_path_for_bad_lines_is_an_error_before_anything_is_imported(
    import_file, users, tmp_path
):
    code, said = import_file(ANN, "--set-aside", str(tmp_path / "missing" / "bad"))
    assert code == 2
    assert said == f"audience-sync: {tmp_path}/missing/bad cannot be written: No such file or directory.\n"
    assert users() == []


@SQLITE
def test_bad_lines_never_overwrite_the_file(import_file, users, tmp_path):
    code, said = import_file(ANN + b"\n{", "--set-aside", f"{tmp_path}/./calls")
    assert code == 2
    message = f"{tmp_path}/calls is the file to import: name another file for --set-aside."
    assert said == f"audience-sync: {message}\n"
    assert ((tmp_path / "calls").read_bytes(), users()) == (ANN + b"\n{", [])


def test_importing_again_adds_nothing_and_equal_lines_are_one_call(import_file, users):
    content = b"\n".join([ANN, BOB, b"  " + ANN + b" ", ANN])
    assert import_file(content)[1].splitlines()[0] == "4 lines: 2 accepted, 2 known already."
    assert import_file(content)[1].splitlines()[0] == "4 lines: 0 accepted, 4 known already."
    assert (
        import_file(gzip.compress(content, mtime=0))[1].splitlines()[0]
        == "4 lines: 0 accepted, 4 known already."
    )
    assert sorted(users()) == ["ann", "bob"]


def test_lines_with_different_message_ids_are_different_calls(import_file, users):
    content = b"\n".join([identify("ann", messageId=each) for each in ("m1", "m2", "m1")])
    assert import_file(content)[1].splitlines()[0] == "3 lines: 2 accepted, 1 known already."
    assert users() == ["ann", "ann"]


@SQLITE
def test_ignored_calls_are_counted_separately(import_file):
    code, said = import_file(ANN + b'\n{"type": "page", "userId": "ann"}')
    assert (code, said.splitlines()[0]) == (
        0,
        "2 lines: 1 accepted, 1 ignored (`audience-sync calls --status ignored` shows the reasons).",
    )


def test_it_delivers_on_request(import_file, sandbox, users):
    assert import_file(identify("ann", traits={"plan": "pro"}), "--deliver")[0] == 0
    assert (users(), sandbox.state.users["ann"]["properties"]) == (["ann"], {"plan": "pro"})


OLD = json.dumps(
    {
        "type": "track",
        "userId": "ann",
        "event": "Ordered",
        "messageId": "m1",
        "timestamp": "2020-05-01T10:00:00Z",
    }
).encode()


def test_history_is_stored_without_being_sent(import_file, command, engine, sandbox):
    lines = [OLD, identify("ann", traits={"plan": "pro"}), b'{"type": "page", "userId": "bob"}']
    code, said = import_file(b"\n".join(lines), "--keep-only")
    assert (code, said.splitlines()[0]) == (0, "3 lines: 0 accepted, 3 stored as history.")
    assert "happened over a day ago" not in said
    with engines.read(engine) as connection:
        events = dialects.sql(connection, "SELECT name, user_id FROM {our}events").all()
        traits = dialects.sql(connection, "SELECT user_id, CAST(traits AS text) FROM {our}profiles").all()
        assert dialects.sql(connection, "SELECT count(*) FROM {our}deliveries").scalar() == 0
    assert events == [("Ordered", "ann")]
    assert sorted((user, json.loads(text)) for user, text in traits) == [
        ("ann", {"plan": "pro"}),
        ("bob", {}),
    ]
    assert command("deliver")[0] == 0
    assert sandbox.state.users == {}
    assert [(call["status"], call["reason"]) for call in command.document("calls", "--json")] == [
        ("ignored", "history: stored, not sent")
    ] * 3
    assert import_file(OLD)[1].splitlines()[0] == "1 line: 0 accepted, 1 known already."


@SQLITE
def test_history_may_have_several_pieces(import_file):
    lines = [identify(f"u{number}") for number in range(files.LINES_PER_PIECE + 5)]
    code, said = import_file(b"\n".join(lines), "--keep-only")
    assert (code, said.splitlines()[0]) == (0, "10,005 lines: 0 accepted, 10,005 stored as history.")


@SQLITE
def test_history_is_not_delivered(import_file):
    code, said = import_file(ANN, "--keep-only", "--deliver")
    assert code == 2
    assert said.startswith("audience-sync: --keep-only sends nothing: leave out --deliver")


@SQLITE
def test_old_events_that_are_sent_are_mentioned_once(import_file, sandbox):
    older = OLD.replace(b"m1", b"m2")
    now = b'{"type": "track", "userId": "ann", "event": "Ordered"}'
    code, said = import_file(b"\n".join([OLD, older, now, identify("ann")]), "--deliver")
    assert code == 0
    assert said.count("2 events happened over a day ago. Userpilot counts an event when it arrives") == 1
    assert len(sandbox.state.events) == 3


def test_a_list_that_gets_shorter_leaves_nothing_at_userpilot(import_file, sandbox):
    def send(*calls):
        assert import_file(b"\n".join(calls), "--deliver")[0] == 0
        return sandbox.state.users["ann"]["properties"], sandbox.state.companies["acme"]["properties"]

    def group(**traits):
        return json.dumps({"type": "group", "userId": "ann", "groupId": "acme", "traits": traits}).encode()

    address = {"city": "Rome", "zip": "1"}
    assert send(identify("ann", traits={"tags": ["a", "b"], "address": address}), group(tags=["a", "b"])) == (
        {"tags.0": "a", "tags.1": "b", "address.city": "Rome", "address.zip": "1"},
        {"tags.0": "a", "tags.1": "b"},
    )
    assert send(identify("ann", traits={"tags": ["c"], "address": {"city": "Bern"}}), group(tags="none")) == (
        {"tags.0": "c", "address.city": "Bern"},
        {"tags": "none"},
    )
    assert send(
        identify("ann", traits={"tags": ["x", "y", "z"]}),
        identify("ann", traits={"tags": []}),
        group(tags={}),
    ) == ({"address.city": "Bern"}, {})


@SQLITE
def test_a_refused_delivery_exits_with_1_after_the_calls_are_stored(start, users, tmp_path):
    (tmp_path / "calls").write_bytes(ANN)
    code, _ = start({}, key="wrong")("import", str(tmp_path / "calls"), "--deliver")
    assert (code, users()) == (1, ["ann"])


@SQLITE
def test_as_json_it_prints_one_document(command, tmp_path):
    content = [ANN, ANN, BOB, b"{", b'{"type": "page", "userId": "ann"}']
    (tmp_path / "calls").write_bytes(b"\n".join(content))
    assert command.document("import", str(tmp_path / "calls")) == {
        "line_count": 5,
        "accepted_count": 2,
        "ignored_count": 1,
        "kept_count": 0,
        "repeated_count": 1,
        "set_aside_count": 1,
        "pending_count": 2,
    }


def test_killed_in_the_middle_and_imported_again_each_line_is_one_call(command, users, tmp_path, engine):
    count = 2 * files.LINES_PER_PIECE
    lines = [identify(f"u{number}", traits={"n": number}) + b"\n" for number in range(count)]
    (tmp_path / "calls").write_bytes(b"".join(lines))
    with command.popen("import", "-", stdin=subprocess.PIPE, preexec_fn=lambda: None) as process:
        process.stdin.buffer.write(b"".join(lines[: files.LINES_PER_PIECE + 500]))
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not users():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    before = len(users())
    assert before == files.LINES_PER_PIECE
    code, said = command("import", str(tmp_path / "calls"))
    assert code == 0
    assert said.splitlines()[0] == f"{count:,} lines: {count - before:,} accepted, {before:,} known already."
    everybody = sorted(f"u{number}" for number in range(count))
    assert sorted(users()) == everybody
    with engines.read(engine) as connection:
        queued = dialects.sql(connection, "SELECT subject_id FROM {our}deliveries").scalars()
        assert sorted(queued) == everybody


def test_long_lines_make_short_pieces():
    lines = (files.Line(number, bytes(1_000_000)) for number in range(1, 21))
    pieces = [[number for number, _ in piece] for piece in files._pieces(lines, [])]
    assert pieces == [[*range(1, 9)], [*range(9, 17)], [*range(17, 21)]]


@SQLITE
def test_the_size_of_a_call_does_not_depend_on_escapes(import_file, users):
    line = json.dumps({"type": "identify", "userId": "ann", "traits": {"a": "Ж" * 15_000}}).encode()
    assert len(line) > 90_000
    assert import_file(line)[1].splitlines()[0] == "1 line: 1 accepted."
    assert users() == ["ann"]


def test_a_script_imports_a_file_without_a_second_process(make_app, users, monkeypatch):
    monkeypatch.setattr(files._SPAWN, "Process", None)
    monkeypatch.setattr(files, "LINES_PER_PIECE", 2)
    lines = b"\n".join(identify(f"u{number}") for number in range(5))
    summary = files.import_calls(make_app(), io.BytesIO(lines), pytest.fail)
    assert (summary.accepted_count, sorted(users())) == (5, [f"u{number}" for number in range(5)])


@SQLITE
@pytest.mark.parametrize(("seconds", "counts"), [(60, [6]), (0, [2, 4, 6])], ids=["together", "apart"])
def test_other_connections_can_write_between_transactions(
    make_app, users, engine, tmp_path, monkeypatch, seconds, counts
):
    monkeypatch.setattr(files, "LINES_PER_PIECE", 2)
    monkeypatch.setattr(files, "LOCK_SECONDS", seconds)
    (tmp_path / "calls").write_bytes(b"\n".join(identify(f"u{number}") for number in range(6)))
    seen = []

    def on_progress(summary):
        seen.append(summary.accepted_count)
        assert len(users()) == summary.accepted_count
        with engines.write(engine) as connection:
            dialects.sql(connection, "DELETE FROM {our}companies")

    with (tmp_path / "calls").open("rb") as file:
        files.import_calls(make_app(), files.decompressed(file), pytest.fail, on_progress)
    assert seen == counts


@SQLITE
def test_other_connections_can_write_while_a_pipe_is_silent(make_app, users, engine, monkeypatch):
    monkeypatch.setattr(files, "LINES_PER_PIECE", 2)
    out, into = os.pipe()
    os.write(into, b"\n".join([ANN, BOB, CLEO, b""]))
    with ThreadPoolExecutor() as pool, os.fdopen(out, "rb") as file:
        importing = pool.submit(files.import_calls, make_app(), files.decompressed(file), pytest.fail)
        until(lambda: users() == ["ann", "bob"])
        with engines.write(engine) as connection:
            dialects.sql(connection, "DELETE FROM {our}companies")
        os.close(into)
        assert importing.result(60).accepted_count == 3


@pytest.fixture
def queued(engine):
    """Reads columns of the deliveries `d` of calls `c` of a type, in order."""

    def read(columns, call_type):
        query = (
            f"SELECT {columns} FROM {{our}}deliveries d JOIN {{our}}calls c ON c.call_id = d.call_id "
            "WHERE c.type = :type ORDER BY d.delivery_id"
        )
        with engines.read(engine) as connection:
            return dialects.sql(connection, query, type=call_type).all()

    return read


def test_deliveries_of_a_user_are_queued_in_the_order_of_the_file(import_file, queued):
    names = [f"{number:03}" for number in range(300, 0, -1)]
    users = [("bob", "ann", "cleo")[number % 3] for number in range(300)]
    lines = [
        json.dumps({"type": "track", "userId": user, "event": name}).encode()
        for user, name in zip(users, names, strict=True)
    ]
    assert import_file(b"\n".join(lines))[0] == 0
    found = queued("d.subject_id, c.event", "track")
    for user in ("ann", "bob", "cleo"):
        sent_names = [name for each, name in zip(users, names, strict=True) if each == user]
        assert [name for each, name in found if each == user] == sent_names


def test_a_company_is_queued_before_its_users(import_file, queued):
    groups = [
        {
            "type": "group",
            "userId": f"u{number:03}",
            "groupId": f"c{number // 2}",
            "traits": {"number": number},
        }
        for number in range(300, 0, -1)
    ]
    others = [
        {"type": "identify", "userId": f"u{number:03}", "traits": {"a": 1}} for number in range(350, 0, -1)
    ]
    lines = [json.dumps(each).encode() for pair in zip(groups, others, strict=False) for each in pair]
    assert import_file(b"\n".join(lines))[0] == 0
    found = queued("d.action, d.subject_id, c.group_id, c.user_id", "group")
    members = [(each["groupId"], each["userId"]) for each in groups]
    assert found == [
        row
        for group, user in members
        for row in (("company", group, group, user), ("identify", user, group, user))
    ]


@SQLITE
def test_a_slow_report_of_bad_lines_locks_nobody_out(make_app, engine, tmp_path):
    (tmp_path / "calls").write_bytes(b"\n".join([ANN, b"bad", BOB, b"worse"]))
    seen = []

    def on_bad(line):
        seen.append(line.number)
        with engines.write(engine) as connection:
            dialects.sql(connection, "DELETE FROM {our}companies")

    with (tmp_path / "calls").open("rb") as file:
        files.import_calls(make_app(), files.decompressed(file), on_bad)
    assert seen == [2, 4]


@SQLITE
def test_a_transaction_does_not_wait_for_preparation(make_app, users, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINES_PER_PIECE", 2)
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    prepare = files.prepare_lines
    go_on = threading.Event()

    def slow_prepare(configured, lines):
        if lines[0][0] > 2:
            assert go_on.wait(60)
        return prepare(configured, lines)

    monkeypatch.setattr(files, "prepare_lines", slow_prepare)
    (tmp_path / "calls").write_bytes(b"\n".join([ANN, BOB, CLEO, identify("dora")]))
    with ThreadPoolExecutor() as pool, (tmp_path / "calls").open("rb") as file:
        importing = pool.submit(files.import_calls, make_app(), files.decompressed(file), pytest.fail)
        until(lambda: users() == ["ann", "bob"])
        with engines.write(engine) as connection:
            dialects.sql(connection, "DELETE FROM {our}companies")
        go_on.set()
        assert importing.result(60).accepted_count == 4
    assert users() == ["ann", "bob", "cleo", "dora"]
