"""The syntax of a query, which lark parses by grammar.lark. A syntax error shows its position in the text."""

import re
from collections.abc import Collection
from functools import cache

from lark import Lark, Token, Tree, UnexpectedInput, UnexpectedToken

from audience_sync.errors import ConfigError
from audience_sync.suggest import located, one_of, shown

MAX_LENGTH = 20_000
MAX_LEVELS = 64
NOT_HERE = {
    "sources": "sources(…) is not supported: a definition runs on one database, its source",
    "expires_after": "expires_after(…) is not supported",
    "any": "ANY is not supported: account-level definitions do not exist here",
    "all": "ALL is not supported: account-level definitions do not exist here",
}


class QueryError(ConfigError):
    """A query that cannot be parsed. The message shows the position in the text."""

    def __init__(self, text: str, position: int, reason: str) -> None:
        self.position, self.reason = position, reason
        super().__init__(located(text, position, reason))


@cache
def _parser() -> Lark:
    return Lark.open(
        "grammar.lark",
        rel_to=__file__,
        parser="lalr",
        lexer="basic",
        maybe_placeholders=False,
        propagate_positions=True,
    )


def parse_form(text: str) -> Tree[Token]:
    """Return lark's tree of a text.

    Raises:
        QueryError: the syntax is wrong.

    """
    if len(text) > MAX_LENGTH:
        raise QueryError(text, MAX_LENGTH, f"a query has at most {MAX_LENGTH:,} characters")
    if odd := re.search("[\0\ud800-\udfff]", text):
        raise QueryError(text, odd.start(), "this character is not text: save the query as UTF-8 without it")
    try:
        reading = _parser().parse_interactive(text)
        depth = _Depth()
        last = None
        for token in reading.lexer_thread.lex(reading.parser_state):  # type: ignore[no-untyped-call]
            if depth.after(token) > MAX_LEVELS:
                raise QueryError(text, start_of(token), f"nested more than {MAX_LEVELS} levels deep")
            last = token
            reading.feed_token(token)
        tree: Tree[Token] = reading.feed_eof(last)  # type: ignore[no-untyped-call]
    except UnexpectedInput as error:
        raise QueryError(text, *_unexpected(text, error)) from None
    return tree


class _Depth:
    """The number of parentheses and NOTs around a token."""

    def __init__(self) -> None:
        self._levels: list[int] = []
        self._total = self._nots = 0

    def after(self, token: Token) -> int:
        match token.type:
            case "NOT":
                self._nots += 1
            case "LPAR":
                self._levels.append(self._nots + 1)
                self._total, self._nots = self._total + self._nots + 1, 0
            case "RPAR" if self._levels:
                self._total, self._nots = self._total - self._levels.pop(), 0
            case "_AND" | "_OR" | "COMMA":
                self._nots = 0
        return self._total + self._nots


_EXPECTED = {
    "SIGN": "a comparator (= != > >= < <=)",
    "DOT": "a dot and a function",
    "_AND": "AND",
    "_OR": "OR",
    "_AS": "`as`",
    "COMMA": "a comma",
    "RPAR": "a closing parenthesis",
    "LPAR": "an opening parenthesis",
    "COLON": "a colon",
    "NUMBER": "a number",
    "NAME": "a name",
    "$END": "the end",
}
_SQL_WORDS = {
    "in": "for IN write one_of, as in trait('country').one_of('DE', 'FR')",
    "is": "for IS NULL write absent, as in trait('country').absent(), else exists()",
    "like": "for LIKE write contains, starts_with or ends_with, as in trait('email').ends_with('@example.com')",
    "between": "for BETWEEN write two comparisons, with >=, AND and <=",
}
_CURLED_QUOTES = "\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"
_WRONG_SIGNS = {"&&": "AND", "||": "OR", "<>": "!=", "=>": ">=", "=<": "<="}


def _unexpected(text: str, error: UnexpectedInput) -> tuple[int, str]:
    """Return the position of the syntax error, and a message."""
    if isinstance(error, UnexpectedToken):
        is_end = error.token.type == "$END"
        position = len(text.rstrip()) if is_end else start_of(error.token)
        if not is_end and (reason := (NOT_HERE | _SQL_WORDS).get(error.token.lower())):
            return position, reason
    else:
        position = error.pos_in_stream or 0
    word = re.search(r"\w+\s*$", text[:position])
    if word and (reason := NOT_HERE.get(word[0].strip().lower())) and word[0].isupper():
        return word.start(), reason
    for start in (position, position - 1):
        sign = text[max(0, start) : start + 2]
        if sign in _WRONG_SIGNS:
            return max(0, start), f"write `{_WRONG_SIGNS[sign]}` for `{sign}`"
    if not isinstance(error, UnexpectedToken):
        return _unexpected_character(text, position)
    accepted = set(error.accepts or error.expected)
    if word and accepted and accepted <= {"LPAR", "COLON"}:
        return word.start(), _unquoted_word(word[0].strip())
    return position, f"expected {_expected(accepted)}"


def _unexpected_character(text: str, position: int) -> tuple[int, str]:
    if text[position] in "\"'":
        return len(text), "this string has no closing quote"
    if text[position] in _CURLED_QUOTES:
        return position, "write straight quotes, ' or \""
    if text[position] == "!":
        return position, "write NOT before a condition, or != between two values"
    return position, f"unexpected character {shown(text[position])!r}"


def _unquoted_word(word: str) -> str:
    if word.lower() == "null":
        return "there is no null: write absent() or exists(), as in trait('country').absent()"
    name = shown(word)
    return f"{name} needs quotes, '{name}', or to be a function: property('{name}'), trait('{name}')"


def _expected(accepted: Collection[str]) -> str:
    if "NOT" in accepted:
        return "a condition, such as event('Order Completed').count() >= 1"
    if {"TRUE", "NAME"} <= set(accepted):
        return "a value: a string in quotes, a number, true, false, trait(…) or another function"
    names = [name for terminal, name in _EXPECTED.items() if terminal in accepted]
    return one_of(names or ["something else"])


def start_of(token: Token) -> int:
    return token.start_pos or 0


def children_of(node: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in node.children if isinstance(child, Tree)]


def tokens_of(node: Tree[Token]) -> list[Token]:
    return [child for child in node.children if isinstance(child, Token)]


def begin_of(node: Tree[Token]) -> int:
    return node.meta.start_pos


def end_of(node: Tree[Token]) -> int:
    return node.meta.end_pos
