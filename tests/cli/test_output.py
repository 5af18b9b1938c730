"""Tables as people read them: 80 columns, and nothing cut."""

import pytest

from audience_sync.cli import output

KEY = "order_completed_last_30days"


def shown(capsys, *arguments, **options):
    output.table(*arguments, **options)
    return capsys.readouterr().out.splitlines()


def test_a_table_has_a_line_a_row_and_numbers_to_the_right(capsys):
    assert shown(capsys, ["key", "members"], [["vips", "1,234"], [KEY, "7"]], numbers=["members"]) == [
        "",
        " key                          members",
        " ────────────────────────────────────",
        " vips                           1,234",
        " order_completed_last_30days        7",
        "",
    ]


def test_a_text_that_is_too_long_is_folded(capsys):
    lines = shown(capsys, ["id", "answer"], [["1", "word " * 30]], numbers=["id"])
    assert max(map(len, lines)) <= output.WIDTH
    assert " ".join(" ".join(lines[3:]).split()) == ("1 " + "word " * 30).strip()


def test_a_key_that_does_not_fit_stands_above_its_row(capsys):
    columns = ["run", "key", "as of", "status", "members", "in", "out", "new", "sent", "left"]
    row = [
        "2",
        KEY,
        "2026-11-24 22:10",
        "succeeded",
        "108,000",
        "60,000",
        "12,000",
        "120,000",
        "496",
        "59,504",
    ]
    lines = shown(capsys, columns, [row], numbers=["run", *columns[4:]])
    assert max(map(len, lines)) <= output.WIDTH
    assert lines[3] == f" {KEY}"
    assert all(cell in lines[4] for cell in row if cell != KEY)


@pytest.mark.parametrize("cell", ["", "x" * 300, "a b " * 100, "ä" * 90])
def test_whatever_a_cell_holds_all_of_it_is_there(capsys, cell):
    lines = shown(capsys, ["id", "body", "created"], [["1", cell, "2026-11-24 22:10"]])
    found = "".join("".join(lines[3:]).split())
    assert all(found.count(letter) >= cell.count(letter) for letter in set(cell) - {" "})
    assert max(map(len, lines)) <= output.WIDTH
