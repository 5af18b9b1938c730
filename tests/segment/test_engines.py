"""Triggers and mappings give the same results as Segment's own engines, except for the listed differences."""

import gzip
import json
from pathlib import Path

from audience_sync.calls import directives, fql
from audience_sync.errors import ConfigError


def recorded(member):
    lines = gzip.decompress(Path(__file__).with_name("recorded.ndjson.gz").read_bytes()).splitlines()
    return [line for line in map(json.loads, lines) if member in line]


def test_triggers_match_what_segments_engine_matches():
    answers = recorded("trigger")
    wrong = [
        each
        for each in answers
        if fql.compile_trigger(fql.parse_trigger(each["trigger"]))(each["call"]) != each["matches"]
    ]
    assert (len(answers), wrong) == (222, [])


def ours(answer):
    try:
        return {"result": directives.compile_template(answer["mapping"]).resolve(answer["payload"])}
    except ConfigError:
        return {"invalid": True}


def segments(answer):
    return {"invalid": True} if "invalid" in answer else {"result": answer["result"]}


WE_SKIP_WHAT_IS_NO_OBJECT = [{"field": {"@merge": {"objects": [{}, "x"], "direction": "left"}}}]


def test_mappings_give_what_segments_kit_gives():
    answers = [each for each in recorded("mapping") if "surprise" not in each]
    wrong = [each["mapping"] for each in answers if ours(each) != segments(each)]
    assert (len(answers), wrong) == (473, WE_SKIP_WHAT_IS_NO_OBJECT)


NOT_COPIED = {
    "a fixed 0 cannot be encoded",
    "a fixed empty string in @case is missing",
    "a list in a template",
    "a literal is resolved",
    "a path goes into strings and lists as JavaScript does",
    "a path through a 0 is 0",
    "a path through a null is null, not missing",
    "a path through an empty string is an empty string",
    "a template's path has no $.",
    "an else that is 0 is no else",
    "an else that is an empty string is no else",
    "an else that is false is no else",
    "an else that is null is no else",
    "an empty list is not blank's then",
    "an object in a template",
    "exists of a fixed empty string is an error",
    "flatten of a scalar has an empty name",
    "flatten of what is missing is an empty object",
    "merge takes a list apart",
    "the path $. is the whole payload",
}


def test_what_surprises_in_segments_kit_is_not_copied():
    different = {each["surprise"] for each in recorded("surprise") if ours(each) != segments(each)}
    assert different == NOT_COPIED
