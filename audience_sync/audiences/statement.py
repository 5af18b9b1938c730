"""The SQL of a definition: check that it is one query that only reads, and bind its parameters.

The author of a definition is trusted: these checks guard against mistakes, as do read-only transactions, the database's
roles and SQLite's authorizer (reading.py). sqlglot parses the SQL; it is imported where it is used, because that takes
0.2 s. Parameters are found by the database's own rules for quotes and comments.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from audience_sync.errors import DefinitionError

if TYPE_CHECKING:
    from sqlglot import exp

PARAMETERS = {"as_of": "the moment of the run", "today": "its date"}
# The databases that enforce reading and time limits; others are experimental.
SUPPORTED = ("sqlite", "postgresql")

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
# On an experimental source only the text is checked, so these words are refused there everywhere, unless they are quoted
# or name a function (before a parenthesis). SQL Server needs no semicolon between two statements.
_WRITING_WORDS = {
    "insert", "update", "delete", "merge", "create", "drop", "alter", "truncate", "exec", "execute", "call", "grant",
    "revoke", "into", "outfile", "dumpfile", "attach", "install", "copy", "procedure", "nextval", "shutdown", "kill",
    "dbcc", "waitfor", "backup", "restore", "reconfigure", "deny",
}  # fmt: skip
# A query of SQLite or PostgreSQL without these words can neither write nor lock.
_SUSPICIOUS_WORDS = _WRITING_WORDS | {name.lower() for name in _FORBIDDEN} | {"for", "share"}
_QUERY_STARTS = {"select", "with", "from", "table", "values"}
_UNREADABLE = "the SQL cannot be read: is a quote or a comment not closed?"
_NO_QUERY = "the SQL is not a query: write one SELECT (WITH is fine)"
_DIALECTS = {
    "postgresql": "postgres", "mssql": "tsql", "clickhousedb": "clickhouse", "mariadb": "mysql",
}  # fmt: skip

# The tokens of SQL. Space and comments have no group. An unclosed quote or comment matches no token. A name may contain
# all characters outside ASCII, because `re` compiles that ten times as fast as the ranges of all letters.
_LETTER = r"[^\x00-@\[-^`{-\x7f]"
_LETTER_OR_DIGIT = r"[^\x00-/:-@\[-^`{-\x7f]"
_IN_NAME = r"[^\x00-#%-/:-@\[-^`{-\x7f]"  # with $
_COMMON = rf"""
[ \t\n\r\f\v]+ | --[^\n\r]*
| (?P<text> '(?:[^']|'')*') | (?P<quoted> "(?:[^"]|"")*")
| (?P<word> {_LETTER}{_IN_NAME}*) | (?P<number> [0-9]{_LETTER_OR_DIGIT}*)
| (?P<cast> ::|:=) | (?P<parameter> :{_IN_NAME}+)
"""
_ESCAPED = r"'(?:[^'\\]|\\.|'')*'"
_POSTGRESQL = rf"""
(?P<escaped> [eE]{_ESCAPED} (?: [ \t\f]*[\n\r]\s*{_ESCAPED})*)
| (?P<dollar> \$(?P<tag> (?:{_LETTER}{_LETTER_OR_DIGIT}*)?)\$ .*? \$(?P=tag)\$)
| {_COMMON}
| (?P<other> (?! /\* | \$(?:{_LETTER}{_LETTER_OR_DIGIT}*)?\$ ) [^'"])
"""
_BACKTICKS = rf"{_COMMON} | /\*.*?\*/ | (?P<backticks> `(?:[^`]|``)*`)"
_SQLITE = rf"{_BACKTICKS} | (?P<brackets> \[[^]]*]) | (?P<other> (?! /\* ) [^'\"`[])"
_OTHERS = rf"{_BACKTICKS} | (?P<other> (?! /\* ) [^'\"`])"
_BACKSLASHES = rf"(?P<escaped> {_ESCAPED}) | {_OTHERS}"
_TOKENS = {
    "postgresql": _POSTGRESQL, "duckdb": _POSTGRESQL, "sqlite": _SQLITE, "mssql": _SQLITE, "": _OTHERS,
    **dict.fromkeys(("mysql", "mariadb", "clickhousedb", "bigquery", "snowflake", "databricks"), _BACKSLASHES),
}  # fmt: skip
_ENDS_IN_NAME = re.compile(rf"{_IN_NAME}\Z")
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_PLACEHOLDERS = {"qmark": "?", "format": "%s", "pyformat": "%({0})s", "named": ":{0}", "numeric": ":{1}"}


class _Token(NamedTuple):
    kind: str  # the name of a group above
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BoundText:
    """SQL that is split at its parameters: `names[i]` is between `parts[i]` and `parts[i + 1]`."""

    parts: tuple[str, ...]
    names: tuple[str, ...]  # without the colon

    def render(self, paramstyle: str) -> str:
        """Return the text in a driver's style (PEP 249)."""
        parts = [part.replace("%", "%%") if "format" in paramstyle else part for part in self.parts]
        # PostgreSQL gets $1 for a parameter, which must not continue a name, as in `AND:today`.
        parts = [f"{part} " if _ENDS_IN_NAME.search(part) else part for part in parts]
        marks = [_PLACEHOLDERS[paramstyle].format(name, number) for number, name in enumerate(self.names, 1)]
        return "".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True))

    def with_literal(self, name: str, literal: str) -> str:
        """Return the SQL as it was written, with a literal in place of one parameter."""
        marks = [literal if each == name else f":{each}" for each in self.names]
        return "".join(part + mark for part, mark in zip(self.parts, [*marks, ""], strict=True))

    def arguments(self, paramstyle: str, values: Mapping[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
        """Return the driver's arguments for the text; `values` has one for each of PARAMETERS."""
        if paramstyle in {"named", "pyformat"}:
            return {name: values[name] for name in self.names}
        return tuple(values[name] for name in self.names)


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
        _check_words(sql, dialect)
    bind(sql, dialect)
    statements = _parse(sql[: tokens[-1].end], dialect)
    if statements is None:
        _check_unparsed(tokens)
        if dialect not in SUPPORTED:
            raise DefinitionError(
                "sqlglot cannot parse the SQL, and an experimental source runs only SQL that it can parse"
            )
        return ["the SQL could not be parsed before it runs, so only the database checks it"]
    if len(statements) != 1:
        raise DefinitionError(f"the SQL contains {len(statements)} statements: write exactly one query")
    _check_nodes(statements[0])
    return []


def check_before_run(sql: str, dialect: str) -> None:
    """Raise the errors of `check`, but import sqlglot only if a word in the SQL might do more than read."""
    if not _plainly_reads(sql, dialect):
        check(sql, dialect)


def _plainly_reads(sql: str, dialect: str) -> bool:
    """Return whether the words of the SQL show that it is one query that only reads; false if only sqlglot can decide."""
    if dialect not in SUPPORTED:
        return False
    tokens = _tokenize(sql, dialect)
    _check_structure(sql, tokens)
    first = next((token.text.lower() for token in tokens if token.text != "("), "")
    words = {token.text.lower() for token in tokens if token.kind == "word"}
    functions = [token for token, following in pairwise(tokens) if following.text == "("]
    return (
        first in _QUERY_STARTS
        and not words & _SUSPICIOUS_WORDS
        and not any(token.kind in _QUOTED or _DENIED.fullmatch(token.text) for token in functions)
    )


def _parse(sql: str, dialect: str) -> "list[list[exp.Expr]] | None":
    """Return the nodes of each statement, root first; None if sqlglot cannot parse the SQL for any reason."""
    import sqlglot  # noqa: PLC0415

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it would log the definition
    try:
        parsed = sqlglot.parse(sql, dialect=_sqlglot_dialect(dialect))
        return [list(statement.walk()) for statement in parsed if statement is not None]
    except Exception:  # noqa: BLE001  (its own errors, and what its bugs raise: RecursionError, AttributeError, …)
        return None


def _check_nodes(nodes: "list[exp.Expr]") -> None:
    from sqlglot import exp  # noqa: PLC0415

    forbidden = tuple(getattr(exp, name) for name in _FORBIDDEN if hasattr(exp, name))
    for node in nodes:
        if isinstance(node, forbidden):
            raise DefinitionError(
                f"the SQL contains {type(node).__name__.upper()}, and a definition only reads: write one SELECT"
            )
    if not isinstance(nodes[0], exp.Query):
        raise DefinitionError(_NO_QUERY)
    for node in nodes:
        if isinstance(node, exp.Func):
            _check_function(node.name if isinstance(node, exp.Anonymous) else node.sql_name())


def bind(sql: str, dialect: str) -> BoundText:
    """Split the SQL at its parameters.

    Semicolons at the end are removed, and a newline ends the text, so that a comment on the last line ends there too.

    Raises:
        DefinitionError: the SQL uses another parameter, or a quote in it is not closed.

    """
    tokens = _tokenize(sql, dialect)
    parts, names, copied = [], [], 0
    for token in _parameters(sql, tokens):
        parts.append(sql[copied : token.start])
        names.append(token.text[1:])
        copied = token.end
    parts.append(f"{sql[copied : tokens[-1].end]}\n" if tokens else "\n")
    return BoundText(tuple(parts), tuple(names))


def without_end(sql: str, dialect: str) -> str:
    """Return the SQL without the semicolons and comments at its end, so that it can be put in parentheses."""
    tokens = _tokenize(sql, dialect)
    return sql[: tokens[-1].end] if tokens else ""


def _parameters(sql: str, tokens: list[_Token]) -> list[_Token]:
    """Return the parameters. Any other name after a colon is an error, except in an array slice or a path (`a:b`)."""
    parameters = []
    depth = 0
    for before, token in pairwise([_Token("start", "", 0, -1), *tokens]):
        depth += (token.text == "[") - (token.text == "]")
        if token.kind != "parameter":
            continue
        is_path = before.end == token.start and (before.kind in _PATH_STARTS or before.text == "]")
        if token.text[1:] in PARAMETERS:
            parameters.append(token)
        elif depth <= 0 and not is_path:
            known = " and ".join(f":{name} ({meaning})" for name, meaning in PARAMETERS.items())
            raise DefinitionError(
                f"line {_line(sql, token.start)} of the SQL: there is no parameter {token.text}, only {known}; write a text "
                "with a colon in quotes"
            )
    return parameters


_QUOTED = {"quoted", "brackets", "backticks"}
_PATH_STARTS = {"word", "number", *_QUOTED}


def _tokenize(sql: str, dialect: str) -> list[_Token]:
    """Return the tokens, without comments and without semicolons at the end.

    Raises:
        DefinitionError: a quote or a comment is not closed.

    """
    pattern = _pattern(_TOKENS.get(dialect, _OTHERS))
    tokens, position = [], 0
    while position < len(sql):
        match = pattern.match(sql, position)
        end = match.end() if match else _end_of_nested_comment(sql, position, dialect)
        if match and match.lastgroup:
            tokens.append(_Token(match.lastgroup, match[0], position, end))
        position = end
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    return tokens


@cache  # compiled where it is used, because compiling all of them takes 0.1 s
def _pattern(tokens: str) -> re.Pattern[str]:
    return re.compile(tokens, re.VERBOSE | re.DOTALL)


def _end_of_nested_comment(sql: str, start: int, dialect: str) -> int:
    """Return the end of a PostgreSQL comment, which may contain other comments."""
    depth = 0
    if sql.startswith("/*", start) and _TOKENS.get(dialect) is _POSTGRESQL:
        for edge in _COMMENT_EDGE.finditer(sql, start):
            depth += 1 if edge[0] == "/*" else -1
            if depth == 0:
                return edge.end()
    raise DefinitionError(_UNREADABLE)


def _sqlglot_dialect(dialect: str) -> str | None:
    import sqlglot  # noqa: PLC0415

    name = dialect.partition("+")[0].lower()
    name = _DIALECTS.get(name, name)
    return name if name in {known.value for known in sqlglot.Dialects} else None


def _check_structure(sql: str, tokens: list[_Token]) -> None:
    """Check that this is one statement with matching parentheses, even if sqlglot cannot parse it."""
    if not tokens:
        raise DefinitionError("the SQL is empty: write one SELECT")
    depth = 0
    for token in tokens:
        if token.text == ";":
            raise DefinitionError(
                f"line {_line(sql, token.start)} of the SQL: a second statement follows: write exactly one query"
            )
        depth += (token.text == "(") - (token.text == ")")
        if depth < 0:
            raise DefinitionError(f"line {_line(sql, token.start)} of the SQL: this ) was never opened")
    if depth:
        raise DefinitionError(f"the SQL opens {depth} more ( than it closes: is a ) missing?")


def _check_unparsed(tokens: list[_Token]) -> None:
    """Check the first word, and the functions, of SQL that sqlglot cannot parse."""
    texts = [token.text.lower() for token in tokens if token.text != "("]
    if texts[:1] and texts[0] not in _QUERY_STARTS:
        raise DefinitionError(_NO_QUERY)
    for token, following in pairwise(tokens):
        if following.text == "(":
            _check_function(token.text.strip('"`[]'))


def _check_words(sql: str, dialect: str) -> None:
    import sqlglot  # noqa: PLC0415

    try:
        tokens = sqlglot.tokenize(sql, read=_sqlglot_dialect(dialect))
    except sqlglot.TokenError as error:
        raise DefinitionError(_UNREADABLE) from error
    for token, following in zip_longest(tokens, tokens[1:]):
        text, kind = sql[token.start : token.end + 1].lower(), token.token_type.name
        is_word = kind not in {"IDENTIFIER", "STRING"} and not (
            following and following.token_type.name == "L_PAREN"
        )
        is_package = kind != "STRING" and re.fullmatch(r"(utl|dbms)_\w+", text)  # Oracle's
        if (text in _WRITING_WORDS and is_word) or is_package:
            raise DefinitionError(
                f"line {_line(sql, token.start)} of the SQL: the word {text.upper()} is not allowed on an experimental "
                "source: if it is a name, put it in quotes"
            )
        if any(comment.startswith(("!", "M!")) for comment in token.comments):
            raise DefinitionError("the SQL contains a comment that MySQL runs (/*! … */): remove it")


def _check_function(name: str) -> None:
    if _DENIED.fullmatch(name):
        raise DefinitionError(f"the SQL calls {name.lower()}, which does more than read: remove it")


def _line(sql: str, position: int) -> int:
    return sql.count("\n", 0, position) + 1
