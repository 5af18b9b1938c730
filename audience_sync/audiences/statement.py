"""The SQL of a definition: check that it is one query that only reads, and bind `:as_of`.

The author of a definition is trusted: these checks guard against mistakes. Read-only transactions, the database's roles
and SQLite's authorizer (compute.py) guard as well. sqlglot is imported where it is used, because its import takes 0.2 s.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from audience_sync.errors import DefinitionError

if TYPE_CHECKING:
    from sqlglot import Token

PARAMETER = ":as_of"
SUPPORTED = (
    "sqlite",
    "postgresql",
)  # the databases that enforce reading and time limits; others are experimental
_NAME = re.compile(r":[\w$]+")

# Functions that reach outside the query: files, other servers, sessions, locks, sequences, SQL in a string.
_DENIED = re.compile(
    r"pg_read_\w+|pg_ls_\w+|pg_stat_file|pg_file_\w+|pg_logfile_rotate|pg_rotate_logfile|pg_reload_conf"
    r"|pg_sleep\w*|pg_(?:terminate|cancel)_backend|pg_(?:try_)?advisory_\w+|pg_notify|pg_promote|pg_switch_wal"
    r"|pg_create_restore_point|pg_logical_\w+|pg_replication_\w+|pg_(?:create|drop)_\w*replication_slot"
    r"|lo_(?:import|export|creat|create|open|unlink|put|from_bytea|truncate\w*)|lowrite|dblink\w*|set_config|nextval|setval"
    r"|(?:query|table|cursor|schema|database)_to_xml\w*"
    r"|load_extension|writefile|readfile|edit|fts3_tokenizer|zipfile|fsdir|lsdir"
    r"|xp_(?:cmdshell|dirtree|reg\w+)|load_file|sleep|benchmark|get_lock|release_(?:all_)?locks?|sys_(?:exec|eval)"
    r"|openrowset|opendatasource|openquery|external_query|executable\w*|(?:java|try_reflect|reflect)(?:_method)?|gen_id"
    r"|system\$\w+",
    re.IGNORECASE,
)
_FORBIDDEN = (
    "Insert", "Update", "Delete", "Merge", "Create", "Drop", "Alter", "Into", "Lock", "Command", "Copy",
    "Set", "Pragma", "Attach", "Detach", "TruncateTable", "Use", "Transaction", "Commit", "Rollback", "Kill",
    "Grant", "Revoke", "Analyze", "Cache", "LoadData", "NextValueFor", "QueryTransform",
)  # fmt: skip
# On an experimental source nothing but the text is checked, so these words are refused there wherever they stand, unless
# quoted, or before a parenthesis, where they name a function. SQL Server takes a statement without a semicolon before it.
_WRITING_WORDS = {
    "insert", "update", "delete", "merge", "create", "drop", "alter", "truncate", "exec", "execute", "call", "grant",
    "revoke", "into", "outfile", "dumpfile", "attach", "install", "copy", "procedure", "nextval", "shutdown", "kill",
    "dbcc", "waitfor", "backup", "restore", "reconfigure", "deny",
}  # fmt: skip
_QUERY_STARTS = {"select", "with", "from", "table", "values"}
_NO_QUERY = "the SQL is not a query: write one SELECT (WITH is fine)"
_DIALECTS = {
    "postgresql": "postgres", "mssql": "tsql", "clickhousedb": "clickhouse", "mariadb": "mysql",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BoundText:
    """SQL for `sqlalchemy.text`; `:as_of` is its only parameter, if it has one."""

    text: str
    uses_as_of: bool


def check(sql: str, dialect: str) -> list[str]:
    """Return warnings about a definition's SQL.

    `dialect` is the name of SQLAlchemy's dialect. SQL that sqlglot cannot parse is only a warning on SQLite and
    PostgreSQL, which themselves enforce that it only reads. Elsewhere it is refused.

    Raises:
        DefinitionError: the SQL is not exactly one query that only reads.

    """
    tokens = _tokenize(sql, dialect)
    _check_structure(sql, tokens)
    if dialect not in SUPPORTED:
        _check_words(sql, tokens)
    bind(sql, dialect)
    import sqlglot  # noqa: PLC0415
    from sqlglot import exp  # noqa: PLC0415

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it would log the definition
    try:
        parsed = sqlglot.parse(sql[: tokens[-1].end + 1], dialect=_sqlglot_dialect(dialect))
        statements = [statement for statement in parsed if statement is not None]
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
        _check_unparsed(tokens)
        if dialect not in SUPPORTED:
            raise DefinitionError(
                "sqlglot cannot read the SQL, and on an experimental source only SQL that it can read is run"
            ) from None
        return ["the SQL could not be parsed before it runs, so only the database checks it"]
    if len(statements) != 1:
        raise DefinitionError(f"the SQL holds {len(statements)} statements: write exactly one query")
    root = statements[0]
    forbidden = tuple(getattr(exp, name) for name in _FORBIDDEN if hasattr(exp, name))
    for node in root.walk():
        if isinstance(node, forbidden):
            raise DefinitionError(
                f"the SQL holds {type(node).__name__.upper()}, and a definition only reads: write one SELECT"
            )
    if not isinstance(root, exp.Query):
        raise DefinitionError(_NO_QUERY)
    for function in root.find_all(exp.Func):
        _check_function(function.name if isinstance(function, exp.Anonymous) else function.sql_name())
    return []


def bind(sql: str, dialect: str) -> BoundText:
    """Return the SQL in the form that `sqlalchemy.text` needs.

    Every other colon that SQLAlchemy would take for a parameter is escaped; casts stay as they are. The parameter
    is put in parentheses, because SQLAlchemy misreads `:as_of::date`. Semicolons at the end are removed, and a
    newline ends the text, so that a comment on the last line ends there too.

    Raises:
        DefinitionError: the SQL uses another parameter, or a quote in it is not closed.

    """
    tokens = _tokenize(sql, dialect)
    text, copied, parameters = "", 0, set()
    for start in _parameters(sql, tokens):
        text += f"{sql[copied:start]}("
        parameters.add(len(text))
        text += f"{PARAMETER})"
        copied = start + len(PARAMETER)
    text += sql[copied : tokens[-1].end + 1 if tokens else 0]

    # Whatever else SQLAlchemy's compiler takes for a parameter, or for an escaped one, gets one more backslash.
    def escape(match: re.Match[str]) -> str:
        return match[0] if match.start() in parameters else f"\\{match[0]}"

    escaped = re.sub(r"\\:[\w$]*(?![:\w$])|(?<![:\w$\\]):[\w$]+(?![:\w$])", escape, text)
    return BoundText(f"{escaped}\n", uses_as_of=bool(parameters))


def _parameters(sql: str, tokens: "list[Token]") -> Iterator[int]:
    """Yield the positions of `:as_of`. Any other name after a colon is an error, except in an array slice."""
    depth = 0
    for token in tokens:
        kind = token.token_type.name
        depth += (kind == "L_BRACKET") - (kind == "R_BRACKET")
        name = _NAME.match(sql, token.start) if kind == "COLON" else None
        if name is None:
            continue
        if name[0] == PARAMETER:
            yield token.start
        elif depth <= 0 and not re.match(r'[\w$\]"`:]', sql[token.start - 1 : token.start]):
            raise DefinitionError(
                f"line {_line(sql, token)} of the SQL: there is no parameter {name[0]}: "
                f"only {PARAMETER}, the moment of the run; write a text with a colon in quotes"
            )


def _tokenize(sql: str, dialect: str) -> "list[Token]":
    """Return the tokens, without comments and without semicolons at the end."""
    import sqlglot  # noqa: PLC0415

    try:
        tokens = list(sqlglot.tokenize(sql, read=_sqlglot_dialect(dialect)))
    except sqlglot.TokenError as error:
        raise DefinitionError("the SQL cannot be read: is a quote or a comment not closed?") from error
    while tokens and tokens[-1].token_type.name == "SEMICOLON":
        tokens.pop()
    return tokens


def _sqlglot_dialect(dialect: str) -> str | None:
    import sqlglot  # noqa: PLC0415

    name = dialect.partition("+")[0].lower()
    name = _DIALECTS.get(name, name)
    return name if name in {known.value for known in sqlglot.Dialects} else None


def _check_structure(sql: str, tokens: "list[Token]") -> None:
    """Check that this is one statement with matching parentheses, even if sqlglot cannot parse it."""
    if not tokens:
        raise DefinitionError("the SQL is empty: write one SELECT")
    depth = 0
    for token in tokens:
        kind = token.token_type.name
        if kind == "SEMICOLON":
            raise DefinitionError(
                f"line {_line(sql, token)} of the SQL: a second statement follows: write exactly one query"
            )
        depth += (kind == "L_PAREN") - (kind == "R_PAREN")
        if depth < 0:
            raise DefinitionError(f"line {_line(sql, token)} of the SQL: this ) was never opened")
    if depth:
        raise DefinitionError(f"the SQL opens {depth} more ( than it closes: is a ) missing?")


def _check_unparsed(tokens: "list[Token]") -> None:
    """Check the first word, and the functions, of SQL that sqlglot cannot parse."""
    texts = [token.text.lower() for token in tokens if token.token_type.name != "L_PAREN"]
    if texts[:1] and texts[0] not in _QUERY_STARTS:
        raise DefinitionError(_NO_QUERY)
    for token, following in pairwise(tokens):
        if following.token_type.name == "L_PAREN":
            _check_function(token.text)


def _check_words(sql: str, tokens: "list[Token]") -> None:
    for token, following in zip_longest(tokens, tokens[1:]):
        text, kind = sql[token.start : token.end + 1].lower(), token.token_type.name
        is_word = kind not in {"IDENTIFIER", "STRING"} and not (
            following and following.token_type.name == "L_PAREN"
        )
        is_package = kind != "STRING" and re.fullmatch(r"(utl|dbms)_\w+", text)  # Oracle's
        if (text in _WRITING_WORDS and is_word) or is_package:
            raise DefinitionError(
                f"line {_line(sql, token)} of the SQL: the word {text.upper()} is not allowed on an experimental source: "
                "if it is a name, put it in quotes"
            )
        if any(comment.startswith(("!", "M!")) for comment in token.comments):
            raise DefinitionError("the SQL holds a comment that MySQL runs (/*! … */): remove it")


def _check_function(name: str) -> None:
    if _DENIED.fullmatch(name):
        raise DefinitionError(f"the SQL calls {name.lower()}, which does more than read: leave it out")


def _line(sql: str, token: "Token") -> int:
    return sql.count("\n", 0, token.start) + 1
