"""Definitions written in SQL: is it one query that only reads, and how is it handed to SQLAlchemy.

Their author is trusted; this guards against mistakes first. Read-only transactions, the database's roles and
the authorizer of SQLite are the layers behind it. sqlglot is imported where it is used: it takes 0.2 s.
"""

import logging
import re
from collections.abc import Iterator
from typing import NamedTuple

from audience_sync.errors import DefinitionError

PARAMETER = "as_of"

# Functions that reach outside the query: files, other servers, sessions, locks, sequences, SQL in a string.
_DENIED = re.compile(
    r"pg_read_\w+|pg_ls_\w+|pg_stat_file|pg_file_\w+|pg_logfile_rotate|pg_rotate_logfile|pg_reload_conf"
    r"|pg_sleep\w*|pg_(?:terminate|cancel)_backend|pg_(?:try_)?advisory_\w+|pg_notify|pg_promote|pg_switch_wal"
    r"|pg_create_restore_point|pg_logical_\w+|pg_replication_\w+|pg_(?:create|drop)_\w*replication_slot"
    r"|lo_(?:import|export|creat|create|open|unlink|put|from_bytea|truncate\w*)|lowrite|dblink\w*|set_config|nextval|setval"
    r"|(?:query|table|cursor|schema|database)_to_xml\w*"
    r"|load_extension|writefile|readfile|edit|fts3_tokenizer|zipfile|fsdir|lsdir"
    r"|xp_(?:cmdshell|dirtree|reg\w+)|load_file|sleep|benchmark|get_lock|openrowset|opendatasource",
    re.IGNORECASE,
)
_FORBIDDEN = (
    "Insert", "Update", "Delete", "Merge", "Create", "Drop", "Alter", "Into", "Lock", "Command", "Copy",
    "Set", "Pragma", "Attach", "Detach", "TruncateTable", "Use", "Transaction", "Commit", "Rollback", "Kill",
    "Grant", "Revoke", "Analyze", "Cache", "LoadData",
)  # fmt: skip
_NO_QUERY = "the SQL is not a query: write one SELECT (WITH is fine)"
_DIALECTS = {
    "postgresql": "postgres", "mssql": "tsql", "clickhousedb": "clickhouse", "mariadb": "mysql",
}  # fmt: skip

_TOKEN = re.compile(
    r"""
      (?P<comment>  --[^\n]* | /\* )
    | (?P<string>   (?<![\w$])[eE]'(?:[^'\\]|''|\\.)*'? | '(?:[^']|'')*'? )
    | (?P<dollar>   (?<![\w$])(?P<tag>\$(?:[^\W\d]\w*)?\$).*?(?:(?P=tag)|\Z) )
    | (?P<name>     "(?:[^"]|"")*"? | `(?:[^`]|``)*`? )
    | (?P<bracket>  \[[^\]]*\]? )
    | (?P<cast>     ::+ | := )
    | (?P<colon>    :[\w$]+ )
    | (?P<word>     [\w$]+ )
    | (?P<space>    \s+ )
    | (?P<other>    . )
    """,
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    depth: int  # of square brackets


def check(sql: str, dialect: str) -> list[str]:
    """What is doubtful about a definition's SQL; a DefinitionError for what is not one reading query.

    `dialect` is the name of SQLAlchemy's dialect: `sqlite`, `postgresql`. What sqlglot cannot read is a
    warning: the database may well know it.
    """
    _check_tokens(sql, dialect)
    bind(sql, dialect)
    query = "".join(token.text for token in _trimmed(sql, dialect))
    import sqlglot  # noqa: PLC0415
    from sqlglot import errors, exp  # noqa: PLC0415

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it would print the definition
    name = dialect.partition("+")[0].lower()
    name = _DIALECTS.get(name, name)
    known = name in {each.value for each in sqlglot.Dialects}
    try:
        statements = sqlglot.parse(query, dialect=name if known else None)
        found = [statement for statement in statements if statement is not None]
    except (errors.SqlglotError, RecursionError, ValueError):
        code = _code(sql, dialect)
        if not re.match(r"[\s(]*(select|with|from|table|values)\b", code, re.IGNORECASE):
            raise DefinitionError(_NO_QUERY) from None
        _deny(re.findall(r"[\w$]+(?=\s*\()", code))
        return ["the SQL could not be read before it runs, so only the database will judge it"]
    if len(found) != 1:
        raise DefinitionError(f"the SQL holds {len(found)} statements: write exactly one query")
    root = found[0]
    forbidden = tuple(getattr(exp, each) for each in _FORBIDDEN if hasattr(exp, each))
    for node in root.walk():
        if isinstance(node, forbidden):
            raise DefinitionError(
                f"the SQL holds {type(node).__name__.upper()}, and a definition only reads: write one SELECT"
            )
    if not isinstance(root, exp.Query):
        raise DefinitionError(_NO_QUERY)
    _deny(
        [
            node.name if isinstance(node, exp.Anonymous) else node.sql_name()
            for node in root.find_all(exp.Func)
        ]
    )
    return []


def bind(sql: str, dialect: str = "") -> str:
    r"""The SQL as text for `sqlalchemy.text`, with `:as_of` as its only parameter.

    Every other colon that SQLAlchemy would take for a parameter is escaped, casts stay as they are. The
    parameter stands in parentheses, because SQLAlchemy misreads `:as_of::date`. A last semicolon is gone, and
    a newline ends the text, so that a comment on the last line ends there too.
    """
    parts, places, length, previous = [], set(), 0, ""
    for token in _trimmed(sql, dialect):
        text = token.text
        if token.kind == "colon":
            if text == f":{PARAMETER}":
                text = f"(:{PARAMETER})"
                places.add(length + 1)
            elif not token.depth and not re.search(r"[\w$\]\"`]\Z", previous):
                raise DefinitionError(
                    f"line {_line(sql, token.start)} of the SQL: there is no parameter {text}: "
                    f"only :{PARAMETER}, the moment of the run; write a text with a colon in quotes"
                )
        parts.append(text)
        length += len(text)
        previous = token.text

    # What SQLAlchemy's compiler takes for a parameter, and for an escaped one, gets one backslash more.
    def escape(match: re.Match[str]) -> str:
        return match[0] if match.start() in places else "\\" + match[0]

    return re.sub(r"\\:[\w$]*(?![:\w$])|(?<![:\w$\\]):[\w$]+(?![:\w$])", escape, "".join(parts)) + "\n"


def uses_as_of(sql: str, dialect: str = "") -> bool:
    return any(token.kind == "colon" and token.text == f":{PARAMETER}" for token in _tokens(sql, dialect))


def _tokens(sql: str, dialect: str) -> Iterator[_Token]:
    place = depth = 0
    while place < len(sql):
        match = _TOKEN.match(sql, place)
        assert match is not None and match.lastgroup is not None  # noqa: S101, PT018  (`other` takes anything)
        kind, end = match.lastgroup, match.end()
        if match[0] == "/*":
            end = _comment_end(sql, place, nested=dialect != "sqlite")
        if kind == "bracket" and dialect != "sqlite":  # an array's, elsewhere
            kind, end = "other", place + 1
        text = sql[place:end]
        depth = max(0, depth + (kind == "other") * ((text == "[") - (text == "]")))
        yield _Token(kind, text, place, depth)
        place = end


def _comment_end(sql: str, start: int, *, nested: bool) -> int:
    depth = 0
    for match in re.compile(r"/\*|\*/").finditer(sql, start):
        depth = depth - 1 if match[0] == "*/" else depth + 1 if nested else 1
        if depth == 0:
            return match.end()
    return len(sql)


def _trimmed(sql: str, dialect: str) -> list[_Token]:
    """The tokens without semicolons, space and comments at the end."""
    tokens = list(_tokens(sql, dialect))
    last = len(tokens)
    while last and (tokens[last - 1].kind in {"space", "comment"} or tokens[last - 1].text == ";"):
        last -= 1
    return tokens[:last]


def _check_tokens(sql: str, dialect: str) -> None:
    """What must hold even where sqlglot cannot read: one statement, that ends where the text ends."""
    depth = 0
    tokens = _trimmed(sql, dialect)
    if not any(token.kind not in {"space", "comment"} for token in tokens):
        raise DefinitionError("the SQL is empty: write one SELECT")
    for token in tokens:
        if token.kind != "other":
            continue
        if token.text == ";":
            line = _line(sql, token.start)
            raise DefinitionError(
                f"line {line} of the SQL: a second statement follows: write exactly one query"
            )
        depth += (token.text == "(") - (token.text == ")")
        if depth < 0:
            raise DefinitionError(f"line {_line(sql, token.start)} of the SQL: this ) was never opened")
    if depth:
        raise DefinitionError(f"the SQL opens {depth} more ( than it closes: is a quote or a ) missing?")


def _code(sql: str, dialect: str) -> str:
    """The SQL with comments and literals blanked and names without their quotes."""
    blank = {"comment": " ", "string": "''", "dollar": "''", "space": " "}
    return "".join(
        blank.get(token.kind) or (token.text.strip('"`[]') if token.kind == "name" else token.text)
        for token in _tokens(sql, dialect)
    )


def _deny(functions: list[str]) -> None:
    for function in functions:
        if _DENIED.fullmatch(function):
            raise DefinitionError(
                f"the SQL calls {function.lower()}, which does more than read: leave it out"
            )


def _line(sql: str, place: int) -> int:
    return sql.count("\n", 0, place) + 1
