"""Make reference/configuration.md and reference/command-line.md from the code.

    python docs/make_reference.py            writes them
    python docs/make_reference.py --check    fails if they are not up to date

The configuration's names, types and defaults come from the settings schema, their descriptions from the comments of the
starter configuration. The commands come from the command line itself.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import typer

from audience_sync.cli.main import app
from audience_sync.settings import schema

DOCS = Path(__file__).parent
STARTER = DOCS.parent / "config" / "audience_sync.toml"
NOTE = "<!-- Made by docs/make_reference.py: change the code, then run `python docs/make_reference.py`. -->\n"


SECTIONS = (
    ("database", "[database]", schema.DatabaseSettings, "The database of audience-sync itself."),
    (
        "sources",
        "[sources.NAME]",
        schema.SourceSettings,
        "Other databases that definitions may run on, any number.",
    ),
    (
        "tables",
        "[tables.NAME]",
        schema.TableSettings,
        "Tables that [queries](query-language.md) read, any number. `entity('NAME')` always reads this table.",
    ),
    ("destination", "[destination]", schema.DestinationSettings, "Userpilot."),
    ("tracking", "[tracking]", schema.TrackingSettings, "The HTTP API that `audience-sync serve` opens."),
    ("web", "[web]", schema.WebSettings, "The dashboard of `audience-sync serve`."),
    ("web.users", "[[web.users]]", schema.WebUser, "The people who sign in to the dashboard, any number."),
    ("logging", "[logging]", schema.LoggingSettings, "Logs go to standard error."),
    (
        "daemon",
        "[daemon]",
        schema.DaemonSettings,
        "`audience-sync daemon`, which runs the schedules and delivers.",
    ),
    ("defaults", "[defaults]", schema.DefaultSettings, "For all definitions; each may set its own."),
    (
        "audiences",
        "[[audiences]] and [[traits]]",
        schema.DefinitionSettings,
        "One table for each audience or computed trait. It may also set every name of `[defaults]`.",
    ),
    (
        "mappings",
        "[[mappings]]",
        schema.MappingSettings,
        "What a call sends in addition to the presets, at most 50 with them.",
    ),
)
# For names without their own line in the starter, or without room for a comment.
MEANINGS = {
    (
        "sources",
        "url",
    ): "The database; those other than SQLite and PostgreSQL need SQLAlchemy's driver and `experimental`",
    ("web", "dashboard"): "Serve the dashboard, and not only the tracking API",
    ("web.users", "name"): "The name to sign in with",
    ("web.users", "role"): "`read` sees everything; `operate` may also approve, reject, retry and discard",
    ("web", "users"): "The people who sign in: `[[web.users]]`, below",
    ("logging", "format"): "Lines of text, or one JSON object a line",
    ("logging", "level"): "The lowest level that is logged",
    ("audiences", "name"): "Its name; the key is made from it",
    (
        "audiences",
        "type",
    ): "For a trait: the type to which its values are converted, such as SQLite's 1 and 0 to booleans",
    ("audiences", "sql"): "One query that returns `user_id`, for a trait also `value`; or `query`",
    ("audiences", "query"): "A query in [Segment's language](query-language.md), in place of `sql`",
    ("tables", "sql"): "A query in place of the table",
    ("tables", "table"): "The table, optionally with its schema; or `sql`",
    ("tables", "source"): "The database that has it; default: the one of audience-sync",
    ("mappings", "name"): "Its name, for messages",
    ("mappings", "action"): "What it sends",
    ("mappings", "trigger"): "Which calls it matches, in Segment's FQL",
    (
        "mappings",
        "fields",
    ): "How the action is filled, by Segment's directives; other fields as in the presets",
}
INTRODUCTION = """\
# Configuration

The file is TOML. `audience-sync init` writes one with a comment for every name. It is searched in this order:
`--config`, `$AUDIENCE_SYNC_CONFIG`, `config/audience_sync.toml`, `audience_sync.toml`. Relative paths in it are relative
to its folder, or to the folder above if that folder is called `config`.

`${NAME}` in a string is replaced by an environment variable. In a database URL, a variable at the beginning is a URL itself,
as in `"${DATABASE_URL}"`. Anywhere else in it the value is percent-encoded, so a password may contain any character:
`"postgresql://sync:${DB_PASSWORD}@${DB_HOST}/sync"`. The value is the password or the name itself, without escapes.

An unknown name is an error, with the nearest known name.

At the top of the file, before any table, `include` names files with more audiences, traits and mappings, such as
`include = ["audiences/*.toml"]`.
"""


def configuration() -> str:
    comments = starter_comments()
    parts = [NOTE, INTRODUCTION]
    for name, title, struct, text in SECTIONS:
        rows = ["name | default | meaning | value", "--- | --- | --- | ---"]
        rows += [" | ".join(row) for row in _options(name, struct, comments[name])]
        parts.append(f"## {title}\n\n{text}\n\n" + "".join(f"| {row} |\n" for row in rows))
    return "\n".join(parts)


def starter_comments() -> dict[str, dict[str, str]]:
    """{section: {name: comment}} of the starter, of lines that are commented out too."""
    comments: dict[str, dict[str, str]] = {name: {} for name, *_ in SECTIONS}
    section = ""
    for line in STARTER.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("# ")
        if header := re.match(r"\[+([a-z_]+)[a-z_.]*\]", text):
            section = {"traits": "audiences"}.get(header[1], header[1])
            section = "web.users" if text.startswith("[[web.users]]") else section
        elif option := re.match(r"""([a-z_]+) = (?:"[^"]*"|'[^']*'|[^#]*?)\s*(?:#\s*(.*))?$""", text):
            comments.setdefault(section, {}).setdefault(option[1], (option[2] or "").strip())
    return comments


def _options(section: str, struct: Any, comments: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """The cells of each name: itself, its default, its meaning, the values that it takes."""
    inherited = struct.__base__.__struct_fields__
    for field in msgspec.structs.fields(struct):
        if field.name not in inherited:
            meaning = MEANINGS.get((section, field.name)) or _sentence(comments.get(field.name, ""))
            if not meaning:
                sys.exit(f"{STARTER}: {section}: {field.name} has no comment, which is its documentation")
            yield f"`{field.name}`", _default(field), _cell(meaning), _cell(_expected(field.type))


def _default(field: Any) -> str:
    if field.name == "api_key":  # set when the section is read
        return '`"${USERPILOT_API_KEY}"`'
    if field.required:
        return "required"
    return "" if field.default in (None, msgspec.NODEFAULT) else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def _expected(kind: Any) -> str:
    """Say in a few words which values an option takes."""
    names = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(kind))
    for meta in getattr(kind, "__metadata__", ()):
        if getattr(meta, "description", None):
            return str(meta.description)
    options = [each for each in get_args(kind) if each is not type(None)]
    return _expected(options[0]) if options else ""


def _sentence(comment: str) -> str:
    """The comment without the other values that it begins with: those have a column."""
    comment = re.sub(r'^or ("[^"]*"(, )?)+[:;]? *', "", comment)
    return comment if re.match(r"\w+\(", comment) else comment[:1].upper() + comment[1:]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def commands() -> str:
    program: Any = typer.main.get_command(app)
    parts = [NOTE, "# Command line\n", _usage("audience-sync", program), _parameters(program)]
    parts.append("See also [exit codes](exit-codes.md) and [the documents of `--json`](json-output.md).\n")
    panels: dict[str, list[Any]] = {}
    for name in program.list_commands(program.context_class(program)):
        command = program.commands[name]
        panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(command)
    for panel, members in panels.items():
        parts.append(f"## {panel}\n")
        for command in members:
            nested = getattr(command, "commands", {"": command})
            for name, each in nested.items():
                title = f"{command.name} {name}".strip()
                parts += [
                    f"### {title}\n",
                    _help(each),
                    _usage(f"audience-sync {title}", each),
                    _parameters(each),
                ]
    return "\n".join(part for part in parts if part)


def _usage(name: str, command: Any) -> str:
    words = [name, *(["[OPTIONS]"] if any(map(_is_option, command.params)) else [])]
    for argument in (parameter for parameter in command.params if not _is_option(parameter)):
        word = f"{_argument(argument)}{'…' if argument.nargs == -1 else ''}"
        words.append(word if argument.required else f"[{word}]")
    words += ["COMMAND"] if hasattr(command, "commands") else []
    return f"```text\n{' '.join(words)}\n```\n"


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()).strip("[].…")


def _help(command: Any) -> str:
    """The help text; indented lines are examples."""
    lines = (command.help or "").replace("\b\n", "").splitlines()
    text = "\n".join(f"    {line.strip()}" if line.startswith("  ") else line for line in lines)
    return f"{text}\n"


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        name = _argument(parameter)
        if _is_option(parameter):
            name = ", ".join(parameter.opts)
            if not parameter.is_flag:
                name += f" {parameter.metavar or parameter.name.upper()}"
        text = (getattr(parameter, "help", None) or "").strip()
        if isinstance(parameter.default, int | str | Path) and not isinstance(parameter.default, bool):
            text += f" Default: `{parameter.default}`."
        rows.append(f"| `{_cell(name)}` | {_cell(text).strip()} |")
    return "| | |\n| --- | --- |\n" + "\n".join(rows) + "\n" if rows else ""


PAGES = {"configuration.md": configuration, "command-line.md": commands}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / "reference" / name, make()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        sys.exit(f"{', '.join(stale)}: not up to date: run `python docs/make_reference.py`")


if __name__ == "__main__":
    main()
