"""Which SQL is accepted, and how `:as_of` is bound in it."""

import itertools
import re

import pytest

from audience_sync.audiences import statement
from audience_sync.errors import DefinitionError

DIALECTS = ["sqlite", "postgresql"]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT user_id FROM orders WHERE ordered_on > date(:as_of, '-30 days')",
        "WITH o AS (SELECT * FROM orders) SELECT user_id FROM o ; -- the end",
        "(SELECT 1) UNION SELECT 2",
        "SELECT ';' AS user_id -- ; drop",
    ],
)
def test_a_query_passes(sql, dialect):
    assert statement.check(sql, dialect) == []
    statement.check_before_run(sql, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "sql",
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
def test_sql_that_does_more_than_read_is_refused(sql, dialect):
    with pytest.raises(DefinitionError) as refused:
        statement.check(sql, dialect)
    with pytest.raises(DefinitionError, match=re.escape(str(refused.value))):
        statement.check_before_run(sql, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "sql",
    [
        "WITH x AS (INSERT INTO t VALUES (1) RETURNING a) SELECT a FROM x",
        "WITH x AS (UPDATE t SET a = 1 RETURNING a) SELECT a FROM x",
        "WITH x AS (MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE RETURNING a) SELECT a FROM x",
        "(SELECT a FROM t FOR NO KEY UPDATE)",
        "SELECT a FROM t FOR SHARE",
        "SELECT a INTO TEMP u FROM t",
        'SELECT "pg_sleep"(1)',
        'SELECT pg_catalog . "lo_import" (1)',
        "SELECT * FROM pg_sleep /* */ (1)",
        "SELECT a FROM t WHERE PG_SLEEP(1) IS NULL",
        "TABLE t; SELECT 1",
        "SELECT 1 WHERE nextval('s') = 1",
    ],
)
def test_sql_that_may_write_or_lock_is_parsed_before_it_runs(sql, dialect):
    with pytest.raises(DefinitionError) as refused:
        statement.check(sql, dialect)
    with pytest.raises(DefinitionError, match=re.escape(str(refused.value))):
        statement.check_before_run(sql, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("", "the SQL is empty: write one SELECT"),
        ("-- only a comment", "the SQL is empty: write one SELECT"),
        ("SELECT 1;\n SELECT 2", "line 1 of the SQL: a second statement follows"),
        ("SELECT 1\n)", r"line 2 of the SQL: this \) was never opened"),
        ("SELECT (1", r"the SQL opens 1 more \( than it closes"),
        ("SELECT 'Ann", "the SQL cannot be read: is a quote or a comment not closed"),
        ('SELECT "user_id', "the SQL cannot be read: is a quote or a comment not closed"),
        ("SELECT 1 /* one", "the SQL cannot be read: is a quote or a comment not closed"),
        ("SELECT\n :name", "line 2 of the SQL: there is no parameter :name, only :as_of"),
        ("EXPLAIN SELECT 1", "the SQL contains COMMAND, and a definition only reads"),
    ],
)
def test_sql_that_cannot_be_parsed_is_refused_with_a_remedy(sql, message, dialect):
    with pytest.raises(DefinitionError, match=message):
        statement.check(sql, dialect)
    checks = (statement.check_before_run, statement.bind)
    with pytest.raises(DefinitionError, match=message):
        assert not [check(sql, dialect) for check in checks]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sql_that_sqlglot_cannot_parse_is_a_warning_if_it_may_be_a_query(dialect):
    assert statement.check("SELECT 1 + FROM t", dialect) == [
        "the SQL could not be parsed before it runs, so only the database checks it"
    ]
    with pytest.raises(DefinitionError, match="the SQL is not a query"):
        statement.check("1 + FROM t", dialect)
    with pytest.raises(DefinitionError, match="the SQL calls pg_sleep, which does more than read"):
        statement.check('SELECT 1 + FROM t WHERE "pg_sleep" (1)', dialect)


WRITING_ELSEWHERE = [
    ("mysql", "SELECT user_id FROM t INTO OUTFILE '/tmp/x'"),
    ("mysql", "SELECT user_id /*!50000 INTO OUTFILE '/tmp/x' */ FROM t"),
    ("mysql", "SELECT sys_exec('touch x') AS user_id"),
    ("mariadb", "SELECT release_all_locks() AS user_id"),
    ("mssql", "SELECT user_id FROM t\nDELETE FROM t"),
    ("mssql", "SELECT 1 AS user_id EXEC xp_cmdshell 'dir'"),
    ("mssql", "SELECT user_id FROM t x SHUTDOWN"),
    ("mssql", "SELECT NEXT VALUE FOR numbers AS user_id"),
    ("mssql", "SELECT * FROM (DELETE FROM t OUTPUT deleted.user_id) AS d"),
    ("duckdb", "COPY t TO 'x'"),
    ("duckdb", "INSTALL httpfs"),
    ("oracle", "SELECT numbers.NEXTVAL AS user_id FROM dual"),
    ("oracle", "SELECT utl_http.request('http://x') AS user_id FROM dual"),
    ("clickhouse", "SELECT * FROM executable('x.sh', TabSeparated, 'user_id String')"),
    ("hive", "SELECT TRANSFORM (a) USING 'touch x' AS user_id FROM t"),
    ("snowflake", "SELECT SYSTEM$CANCEL_QUERY('x') AS user_id"),
    ("unknown", "EXECUTE BLOCK AS BEGIN END"),
]


@pytest.mark.parametrize(("dialect", "sql"), WRITING_ELSEWHERE)
def test_on_an_experimental_source_the_text_alone_must_show_that_it_reads(dialect, sql):
    with pytest.raises(DefinitionError):
        statement.check(sql, dialect)


@pytest.mark.parametrize(
    "dialect", ["mysql", "mssql", "duckdb", "oracle", "snowflake", "bigquery", "unknown"]
)
def test_on_an_experimental_source_sql_that_cannot_be_parsed_is_refused(dialect):
    with pytest.raises(
        DefinitionError, match="sqlglot cannot parse the SQL, and an experimental source runs only"
    ):
        statement.check("SELECT 1 + FROM t", dialect)


@pytest.mark.parametrize(
    "dialect", ["mysql", "mssql", "duckdb", "oracle", "snowflake", "bigquery", "unknown"]
)
def test_on_an_experimental_source_a_query_passes(dialect):
    sql = "SELECT user_id, replace(name, 'delete', 'INTO') AS value FROM orders -- drop\nWHERE day <= :as_of"
    assert statement.check(sql, dialect) == []


def test_on_an_experimental_source_a_name_that_is_a_writing_word_is_quoted():
    with pytest.raises(
        DefinitionError, match=r"line 1 of the SQL: the word CALL is not allowed .* put it in quotes"
    ):
        statement.check("SELECT user_id FROM call", "duckdb")
    assert statement.check('SELECT user_id FROM "call"', "duckdb") == []


BOUND = [
    ("SELECT :as_of::date, x::text", "SELECT {as_of}::date, x::text"),
    ("SELECT :as_of", "SELECT {as_of}"),
    ("SELECT date(:as_of, '-30 days')", "SELECT date({as_of}, '-30 days')"),
    ("SELECT ':as_of', '12:30', 'it''s :x', :as_of", "SELECT ':as_of', '12:30', 'it''s :x', {as_of}"),
    ('SELECT ":as_of", "a"":b", :as_of', 'SELECT ":as_of", "a"":b", {as_of}'),
    ("SELECT 1 -- :as_of\n, :as_of", "SELECT 1 -- :as_of\n, {as_of}"),
    ("SELECT /* :as_of ' */ :as_of /* it's */;", "SELECT /* :as_of ' */ {as_of}"),
    ("/*+ Hint(:as_of) */ SELECT :as_of", "/*+ Hint(:as_of) */ SELECT {as_of}"),
    ("SELECT body->>'a:b', body->'x'->:as_of", "SELECT body->>'a:b', body->'x'->{as_of}"),
    ("SELECT '\N{GRINNING FACE}:x', :as_of\r\n;;", "SELECT '\N{GRINNING FACE}:x', {as_of}"),
    ("SELECT user_id FROM people ; -- :as_of", "SELECT user_id FROM people"),
]
POSTGRESQL_BOUND = [
    ("SELECT tags[1:2], tags[lo:hi], tags[:as_of]", "SELECT tags[1:2], tags[lo:hi], tags[{as_of}]"),
    ("SELECT $$ :as_of ' $$, $t$ $$ :x $t$, :as_of", "SELECT $$ :as_of ' $$, $t$ $$ :x $t$, {as_of}"),
    (r"SELECT E'it\'s :x', 'c:\', :as_of", r"SELECT E'it\'s :x', 'c:\', {as_of}"),
    ("SELECT a #>> '{b:c}' FROM t WHERE b ? 'c:d' AND d @> :as_of",
     "SELECT a #>> '{b:c}' FROM t WHERE b ? 'c:d' AND d @> {as_of}"),
    ("SELECT 1 /* a /* :x */ ' */, :as_of", "SELECT 1 /* a /* :x */ ' */, {as_of}"),
    ("SELECT $$:z$$, $a$:z$a$, :as_of", "SELECT $$:z$$, $a$:z$a$, {as_of}"),
    ("SELECT $$\n-- :z ' $$, a$b$ :: text, :as_of", "SELECT $$\n-- :z ' $$, a$b$ :: text, {as_of}"),
    ("SELECT e'\\\\' , E'a'\n 'b\\':z', :as_of", "SELECT e'\\\\' , E'a'\n 'b\\':z', {as_of}"),
    (r"SELECT U&'\0061:x', n'\:y', b'0', :as_of", r"SELECT U&'\0061:x', n'\:y', b'0', {as_of}"),
    ("SELECT a ?| array['b:c'] AND a @? '$.x ? (@ > 1)', :as_of",
     "SELECT a ?| array['b:c'] AND a @? '$.x ? (@ > 1)', {as_of}"),
    ("SELECT :as_of::date - :today", "SELECT {as_of}::date - {today}"),
    ("SELECT f(moment := :as_of)", "SELECT f(moment := {as_of})"),
]  # fmt: skip
SQLITE_BOUND = [
    ("SELECT [a:b], `c:d`, :as_of", "SELECT [a:b], `c:d`, {as_of}"),
    ("SELECT 1 /* a /* ' */, :as_of", "SELECT 1 /* a /* ' */, {as_of}"),
]


@pytest.mark.parametrize(
    ("dialect", "sql", "text"),
    [
        *((dialect, *pair) for dialect in DIALECTS for pair in BOUND),
        *(("postgresql", *pair) for pair in POSTGRESQL_BOUND),
        *(("sqlite", *pair) for pair in SQLITE_BOUND),
    ],
)
def test_parameters_are_bound_in_code_only(dialect, sql, text):
    bound = statement.bind(sql, dialect)
    marks = [f"{{{name}}}" for name in bound.names]
    assert "".join(itertools.chain(*itertools.zip_longest(bound.parts, marks, fillvalue=""))) == f"{text}\n"
    assert bound.names == tuple(re.findall(r"\{(as_of|today)\}", text))


@pytest.mark.parametrize(
    ("paramstyle", "text", "arguments"),
    [
        ("qmark", "SELECT '5%', ? - ?\n", (1, 2)),
        ("format", "SELECT '5%%', %s - %s\n", (1, 2)),
        ("pyformat", "SELECT '5%%', %(as_of)s - %(today)s\n", {"as_of": 1, "today": 2}),
        ("named", "SELECT '5%', :as_of - :today\n", {"as_of": 1, "today": 2}),
        ("numeric", "SELECT '5%', :1 - :2\n", (1, 2)),
    ],
)
def test_each_driver_gets_parameters_in_its_style(paramstyle, text, arguments):
    bound = statement.bind("SELECT '5%', :as_of - :today", "postgresql")
    assert bound.render(paramstyle) == text
    assert bound.arguments(paramstyle, {"as_of": 1, "today": 2}) == arguments


@pytest.mark.parametrize("name", ["AND", "é", "a$", "x_1"])
def test_a_parameter_does_not_continue_a_name(name):  # PostgreSQL would read AND$1 as one word
    text = statement.bind(f"SELECT 1{name}:today", "postgresql").render("pyformat")
    assert text == f"SELECT 1{name} %(today)s\n"
