"""The names and the language of the code and the docs: plain, and each name for one thing."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

CATCH_ALL = {"told", "found", "kept", "heard"}
OPENS_WITH_A_CLAUSE = re.compile(
    r"(What|How|Whether|Of|Whom|Whose|Which|Who|Where|When|Why|While|That|Those|Let|Is|Are|As|If|Not|In|On|By|To"
    r"|So|From|Nothing|Nobody|Everything|True|False|None)\b(?! and )"
)
OLD_IDIOM = re.compile(
    r"\b(told|hears?\b|heard|unheard|errands?|levers?|doors?|whoever|whom|overtak(e|es|ing)\b|knows? better"
    r"|key rests?|comes? again|(?<!for word )in words|(its|their|own|driver's|API's) words|bec[ao]mes? of"
    r"|nobody knows|hand(s|ed|ing)? in|in vain"
    r"|the trouble|kept nowhere|begin as they mean|let (it|them|him|others|users) |tell(s|ing)? (false"
    r"|true|everyone|everything|userpilot|it\b|all\b)|sees? to it|is no (call|primitive|number|moment|text|list|view)"
    r"|nothing of (it|them|the run|this)|so many (?!connections)|any more\b|anew\b|of ours\b|goes? on\b"
    r"|tried again by itself|(an?|in|no|by|with|have|has|hold) (\w+ ){1,2}of (its|their) own\b"
    r"|stands? (before|behind|beside|first|last|in (no|its|the))\b"
    r"|(has|have|had|get|gets|got) (its|their) turn|a look (at|in|into)\b|knows? (nothing|no|none) "
    r"|(SQL|value|variable|folder|batch|text|endpoint|URL) holds? (a|an|at|both|no|\{))",
    re.IGNORECASE,
)
# Words that have no other meaning in an identifier, such as test_a_user_is_told.
OLD_NAMES = re.compile(
    r"(^|_)(told|tells?|heard|unheard|errands?|levers?|doors?|whom|whoever|anew)(_|$)", re.IGNORECASE
)


def files(repository, *folders, suffixes=(".py",)):
    """The files of these folders, each with its place in the repository."""
    for folder in folders:
        path = repository / folder
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in suffixes:
                yield file, str(file.relative_to(repository))


def trees(repository):
    for file, place in files(repository, "audience_sync"):
        yield ast.parse(file.read_text()), place


def test_docstrings_begin_with_a_verb_or_a_noun(repository):
    for tree, place in trees(repository):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                assert not OPENS_WITH_A_CLAUSE.match(text), f"{place}: {text.splitlines()[0]}"


def test_our_modules_are_imported_under_their_own_names(repository):
    for tree, place in trees(repository):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("audience_sync"):
                assert not [alias.asname for alias in node.names if alias.asname], f"{place}:{node.lineno}"


# The command functions of cli/ are named as their commands, and these may be the names of what they call.
@pytest.mark.parametrize("is_cli", [False, True])
def test_each_public_name_is_defined_once(repository, is_cli):
    defined = defaultdict(list)
    for tree, place in trees(repository):
        if place.startswith("audience_sync/cli/") is is_cli:
            for node in tree.body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    defined[node.name].append(place)
    assert {name: places for name, places in defined.items() if len(places) > 1} == {}


def test_no_variable_is_named_for_anything(repository):
    for tree, place in trees(repository):
        for node in ast.walk(tree):
            name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
            is_bound = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
            assert not (is_bound and name in CATCH_ALL), f"{place}:{node.lineno}: {name}"


def test_code_and_docs_are_free_of_the_old_idiom(repository):
    folders = (
        "audience_sync",
        "benchmarks",
        "config",
        "docs",
        "soak",
        "tests",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    )
    this = str(Path(__file__).relative_to(repository))  # which has to quote the idiom
    for file, place in files(repository, *folders, suffixes=(".py", ".md", ".toml")):
        if place == this:
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = OLD_IDIOM.search(line)
            assert not match, f"{place}:{number}: {match and match.group()!r} in {line.strip()}"


def test_names_are_free_of_the_old_idiom(repository):
    for file, place in files(repository, "audience_sync", "benchmarks", "docs", "soak", "tests"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "arg", None)
            assert not OLD_NAMES.search(str(name)), f"{place}:{node.lineno}: {name}"
