import pytest

from audience_sync.audiences import statement as sql
from audience_sync.errors import DefinitionError

DIALECTS = ["sqlite", "postgresql"]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT user_id FROM orders WHERE ordered_on > date(:as_of, '-30 days')",
        "WITH o AS (SELECT * FROM orders) SELECT user_id FROM o ; -- the end",
        "(SELECT 1) UNION SELECT 2",
        "SELECT ';' AS user_id -- ; drop",
    ],
)
def test_a_query_passes(statement, dialect):
    assert sql.check(statement, dialect) == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1; DROP TABLE orders",
        "WITH x AS (DELETE FROM orders RETURNING *) SELECT * FROM x",
        "SELECT * INTO copied FROM orders",
        "SELECT * FROM orders FOR UPDATE",
        "COPY orders TO '/tmp/x'",
        "DO $$ BEGIN END $$",
        "VACUUM INTO 'x'",
        "SELECT pg_catalog.pg_read_file('/etc/passwd')",
        "SELECT load_extension('x')",
    ],
)
def test_what_does_more_than_read_is_refused(statement, dialect):
    with pytest.raises(DefinitionError):
        sql.check(statement, dialect)
