"""A key keeps its kind: an audience cannot use the key of an earlier trait, or vice versa."""

import pytest

GOOD = "SELECT user_id FROM people"
SPEND = "SELECT user_id, spent AS value FROM people"
EVERYWHERE = [
    ("sync",),
    ("sync", "--full"),
    ("sync", "--no-deliver"),
    ("plan",),
    ("deliver",),
    ("daemon",),
    ("serve", "--port", "0"),
    ("list",),
    ("status",),
    ("history",),
    ("members", "good"),
    ("user", "u1"),
    ("track", "u1", "Opened"),
]


def trait(name="Good", **options):
    lines = ["[[traits]]", f'name = "{name}"', f'sql = "{SPEND}"']
    return "\n".join([*lines, *(f"{option} = {value}" for option, value in options.items())])


@pytest.fixture
def synced(company, start):
    """An audience and a trait that were synced once."""
    company("CREATE TABLE people (user_id text, spent integer)")
    company("INSERT INTO people VALUES ('u1', 5), ('u2', 7)")
    code, output = start({"Good": GOOD}, extra=trait("Spend"))("sync")
    assert code == 0, output
    return start


def refused(command, *arguments, expected):
    code, output = command(*arguments)
    assert code == 2, output
    assert expected in output
    assert "a key cannot change its kind" in output
    return output


def test_every_command_refuses_a_key_of_the_other_kind(synced, sandbox):
    seen = len(sandbox.state.requests)
    command = synced({}, extra=trait())
    for arguments in EVERYWHERE:
        output = refused(
            command,
            *arguments,
            expected="[[traits]] Good: the key good has belonged to the audience Good since ",
        )
        assert "audience_sync.toml: " in output
        assert "another key with `key = `" in output
        assert "`audience-sync retire good` clears the values of the audience" in output
    output = refused(command, "check", expected="wrong  keys: ")
    assert "[[traits]] Good" in output
    assert len([each for each in sandbox.state.requests if each.path != "/v1/validate"]) == seen


@pytest.mark.parametrize(
    ("audiences", "extra", "expected"),
    [
        ({"Spend": GOOD}, "", "[[audiences]] Spend: the key spend has belonged to the trait Spend since "),
        ({"spend!": GOOD}, "", "[[audiences]] spend!: the key spend has belonged to the trait Spend since "),
        ({}, trait("GOOD"), "[[traits]] GOOD: the key good has belonged to the audience Good since "),
        (
            {},
            trait("Worth", key='"good"'),
            "[[traits]] Worth: the key good has belonged to the audience Good since ",
        ),
        (
            {},
            trait(enabled="false"),
            "[[traits]] Good: the key good has belonged to the audience Good since ",
        ),
    ],
    ids=["back", "renamed", "other case", "own key", "disabled"],
)
def test_a_key_of_the_other_kind_is_refused_however_it_arises(synced, audiences, extra, expected):
    command = synced(audiences, extra=extra)
    for arguments in (("sync",), ("check",), ("list",)):
        refused(command, *arguments, expected=expected)


def test_a_retired_key_keeps_its_kind(synced):
    assert synced({})("retire", "good")[0] == 0
    command = synced({}, extra=trait())
    output = refused(
        command, "sync", expected="[[traits]] Good: the key good has belonged to the audience Good since "
    )
    assert "`audience-sync retire" not in output


def test_with_another_key_the_old_one_can_be_retired(synced, sandbox):
    command = synced({}, extra=trait(key='"good_trait"'))
    assert command("sync")[0] == 0
    assert command("retire", "good")[0] == 0
    assert command("deliver")[0] == 0
    held = sandbox.state.users["u1"]["properties"]
    assert held == {"good": False, "good_trait": 5, "spend": 5}


def test_the_kind_is_unchanged_after_a_refusal(synced):
    refused(synced({"Spend": GOOD}), "sync", "--full", expected="has belonged to the trait Spend")
    command = synced({"Good": GOOD}, extra=trait("Spend"))
    assert [(each["key"], each["kind"]) for each in command.document("list")] == [
        ("good", "audience"), ("spend", "trait"),
    ]  # fmt: skip
    code, output = command("sync", "--full")
    assert code == 0, output
