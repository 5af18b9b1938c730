"""Tables as people read them: as wide as the terminal, nothing cut off, and keys whole."""

import pytest

from audience_sync.cli import output

KEY = "order_completed_last_30days"
LONG_KEY = "order_completed_in_the_last_30days_by_customers_of_the_wholesale_business_in_emea"
RUN_COLUMNS = ["run", "key", "as of", "status", "members", "in", "out", "new", "sent", "left"]
RUN = ["2", KEY, "2026-11-24 22:10", "succeeded", "108,000", "60,000", "12,000", "120,000", "496", "59,504"]
NOTE = "Some values are folded to fit: a wider terminal or --json shows them whole."


@pytest.fixture
def shown(capsys, monkeypatch):
    """Prints a table on a terminal of some columns; its lines, without the note on folded values."""

    def show(*arguments, terminal=80, **options):
        monkeypatch.setenv("COLUMNS", str(terminal))
        output.table(*arguments, **options)
        lines = capsys.readouterr().out.splitlines()
        show.has_note = lines[-1] == NOTE
        return lines[:-1] if show.has_note else lines

    return show


def test_a_table_has_a_line_a_row_and_numbers_to_the_right(shown):
    assert shown(["key", "members"], [["vips", "1,234"], [KEY, "7"]], numbers=["members"]) == [
        "",
        " key                          members",
        " ────────────────────────────────────",
        " vips                           1,234",
        " order_completed_last_30days        7",
        "",
    ]
    assert not shown.has_note


def test_a_text_that_is_too_long_is_folded(shown):
    lines = shown(["id", "answer"], [["1", "word " * 30]], numbers=["id"])
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[3:]).split()) == ("1 " + "word " * 30).strip()
    assert shown.has_note


def test_a_key_that_does_not_fit_stands_above_its_row(shown):
    lines = shown(RUN_COLUMNS, [RUN], numbers=["run", *RUN_COLUMNS[4:]])
    assert max(map(len, lines)) <= 80
    assert lines[1] == " key"
    assert lines[4] == f" {KEY}"
    assert all(cell in lines[5] for cell in RUN if cell != KEY)
    assert shown.has_note


def test_on_a_wide_terminal_it_stands_in_its_row(shown):
    lines = shown(RUN_COLUMNS, [RUN], numbers=["run", *RUN_COLUMNS[4:]], terminal=120)
    assert all(cell in lines[3] for cell in RUN)
    assert not shown.has_note


def test_gaps_are_narrowed_before_a_key_leaves_its_row(shown):
    columns = ["run", "key", "as of", "members", "entered", "exited", "accepted"]
    row = ["92", KEY, "2011-07-01", "991", "24", "24", "48"]
    lines = shown(columns, [row], numbers=["run", *columns[3:]])
    assert max(map(len, lines)) <= 80
    assert all(cell in lines[3] for cell in row)
    assert not shown.has_note


@pytest.mark.parametrize("terminal", [80, 100, 160])
@pytest.mark.parametrize("key", [KEY, "short", LONG_KEY[:60], LONG_KEY])
@pytest.mark.parametrize("columns", [["key", "state"], ["key", "value", "from", "to"], RUN_COLUMNS])
def test_a_key_is_whole_where_the_terminal_is_wide_enough(shown, terminal, key, columns):
    row = [key if column == "key" else "2026-11-24" for column in columns]
    lines = shown(columns, [row], terminal=terminal)
    assert max(map(len, lines)) <= max(terminal, len(columns) * 11)
    if len(key) < terminal:
        assert any(key in line for line in lines)
    else:
        pieces = [line.strip() for line in lines[4:-2]]
        assert "".join(pieces) == key
        assert all(piece.endswith("_") for piece in pieces[:-1])


def test_a_key_in_a_text_is_broken_after_an_underscore():
    assert output.wrap(f'{{"{KEY}": true}}', 20) == ['{"order_completed_', 'last_30days": true}']
    assert output.wrap(f'a {{"{KEY}": true}}', 40) == [f'a {{"{KEY}": true}}']
    assert output.wrap(f'1234567890 {{"{KEY}": true}}', 38) == ["1234567890", f'{{"{KEY}": true}}']


@pytest.mark.parametrize("cell", ["", "x" * 300, "a b " * 100, "ä" * 90])
def test_whatever_a_cell_holds_all_of_it_is_there(shown, cell):
    lines = shown(["id", "body", "created"], [["1", cell, "2026-11-24 22:10"]])
    letters = "".join("".join(lines[3:]).split())
    assert all(letters.count(letter) >= cell.count(letter) for letter in set(cell) - {" "})
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("values", [[], [1], [{"a": ["x\u2028y\x85\nz", {}]}, {}, [], None, {"b": {"c": 1}}]])
def test_a_list_that_is_printed_value_by_value_looks_like_a_document(values, capsys):
    output.document(values)
    whole = capsys.readouterr().out
    output.documents(iter(values))
    assert capsys.readouterr().out == whole
