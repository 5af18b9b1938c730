"""Questions for Segment's packages, one JSON object a line: calls, mappings and triggers. See README.md."""

import itertools
import json
import random

MISSING = object()
CALL_COUNT = 1300  # that are drawn at random, in addition to those with one odd field each

LONG = 40_000  # more than a call may contain
IDS = [
    MISSING,
    None,
    "",
    " ",
    "u1",
    "user@example.com",
    "007",
    "Zoë 名前",
    7,
    0,
    -3,
    1.5,
    2**53,
    2**63,
    1e21,
    1e-7,
]
IDS += [True, False, ["u1"], ["u1", "u2"], {"id": "u1"}, "u" * 255, "u" * 256, "g" * 500, "g" * 501, "a\0b"]
EVENTS = [
    MISSING,
    None,
    "",
    " ",
    "Order Completed",
    "Größe gewählt ✓",
    "e" * 300,
    7,
    0,
    True,
    ["x"],
    {"name": "x"},
]
OBJECTS = [
    MISSING,
    None,
    "",
    "plan",
    7,
    0,
    True,
    [],
    [1, 2],
    [{"plan": "pro"}],
    {},
    {"plan": "pro", "vip": True},
]
OBJECTS += [
    {"a": None, "b": False, "c": 0, "d": "", "e": -1.5, "f": 10**15, "g": 2**53 + 1},
    {"größe": "XL", "名前": "Zoë", "emoji 🎉": "🎉", "": "no name", "a b": 1, "$price": 2, "net.price": 3},
    {"address": {"city": "Köln", "geo": {"lat": 50.9, "lon": None}}, "plan": "pro"},
    {
        "tags": ["x", "y", ["z"]],
        "empty": {},
        "none": [],
        "items": [{"sku": "A1", "price": 10}, {"sku": "B2"}],
    },
    {"first_seen_at": "2024-01-01T00:00:00Z", "last_seen_at": "2024-02-01T00:00:00Z", "plan": "pro"},
    {"first_seen_at": {"at": 1}, "web": {"last_seen_at": "2024-02-01"}},
    {"text": "x" * 3000},
    {"text": "x" * LONG},
    {"text": "a\0b"},
    {"text": "\ud800"},
    {"big": 10**400},
    {"deep": json.loads("[" * 18 + "1" + "]" * 18)},
    {"deep": json.loads("[" * 19 + "1" + "]" * 19)},
]
MOMENTS = [
    MISSING,
    None,
    "",
    " ",
    0,
    1,
    -1,
    1714557600,
    1714557600000,
    1714557600.5,
    True,
    False,
    [],
    {},
    ["2024-05-01"],
]
MOMENTS += [
    "2024-05-01T12:00:00Z",
    "2024-05-01T12:00:00.123Z",
    "2024-05-01T14:00:00+02:00",
    "2024-05-01T12:00:00",
    "2024-05-01 12:00:00",
    "2024-05-01",
    "20240501",
    "2024-05",
    "2024",
    "2024-02-30",
    "2024-13-45",
    "May 1, 2024",
    "01/05/2024",
    "Wed, 01 May 2024 12:00:00 GMT",
    "1714557600",
    "1714557600000",
    "0",
    "soon",
    "yesterday",
    "not a date",
    "2024-W18-3",  # the last: see drawn()
]
TYPES = [
    MISSING,
    None,
    *["page", "screen", "alias", "delete"] * 3,
    "Identify",
    "identify ",
    "",
    7,
    ["identify"],
]
MESSAGE_IDS = [MISSING, None, "m1", "m" * 100, "m" * 101, "", 7]
OTHERS = [
    MISSING,
    None,
    {},
    {"All": False},
    {"Userpilot Cloud (Actions)": False},
    {"ip": "::1"},
    "x",
    [],
    7,
    True,
]
FIELDS = {
    "userId": IDS,
    "anonymousId": IDS,
    "groupId": IDS,
    "event": EVENTS,
    "traits": OBJECTS,
    "properties": OBJECTS,
    "timestamp": MOMENTS,
    "context": OTHERS,
    "integrations": OTHERS,
    "messageId": MESSAGE_IDS,
}
USUAL = {
    "userId": ["u1", "user@example.com", 7],
    "anonymousId": [MISSING, "a1"],
    "groupId": ["g1", 7],
    "event": ["Order Completed", "Größe gewählt ✓"],
    "traits": [MISSING, {}, {"plan": "pro", "vip": True}],
    "properties": [MISSING, {"total": 12.5, "paid": True}],
    "timestamp": [MISSING, "2024-05-01T12:00:00Z"],
    "context": [MISSING, {"ip": "::1", "page": {"url": "https://example.com"}}],
    "integrations": [MISSING, {"All": True}],
    "messageId": [MISSING, "m1"],
}
NAMES = [
    "plan",
    "vip",
    "email",
    "größe",
    "total",
    "a b",
    "net.price",
    "first_seen_at",
    "last_seen_at",
    "createdAt",
]
SCALARS = [None, True, False, 0, 1, -2.5, 1e-7, 10**12, "", "pro", "Zoë", "🎉", "2024-05-01", "true", "7"]


def present(fields):
    return {name: value for name, value in fields.items() if value is not MISSING}


def calls():
    usual = {name: values[-1] for name, values in USUAL.items()}
    for kind in ("identify", "track", "group"):
        for name, values in FIELDS.items():
            yield from ({"type": kind, **usual, name: value} for value in values)
        for anonymous_id, user_id in itertools.product(IDS[:10], [MISSING, None, ""]):
            yield {"type": kind, **usual, "userId": user_id, "anonymousId": anonymous_id}
    for kind, created_at, other in itertools.product(
        ("identify", "group"), MOMENTS, [MISSING, None, "1999-01-01", ""]
    ):
        yield {
            "type": kind,
            **usual,
            "traits": present({"createdAt": created_at, "created_at": other, "plan": "pro"}),
        }
    yield from ({**usual, "type": kind} for kind in TYPES)
    yield from ({"type": "delete", "userId": user_id} for user_id in IDS)
    yield from (drawn(random.Random(seed)) for seed in range(CALL_COUNT))


def drawn(rng):
    kind = rng.choices(["identify", "track", "group", rng.choice(TYPES)], [40, 30, 22, 8])[0]
    fields = {name: rng.choice(USUAL[name] if rng.random() < 0.9 else FIELDS[name]) for name in FIELDS}
    for name in ("traits", "properties"):
        if rng.random() < 0.7:
            fields[name] = drawn_object(rng, 3)
    if fields["context"] is None:
        fields["context"] = MISSING  # the package fails at null: one call of each type shows it
    if rng.random() < 0.2 and isinstance(fields["traits"], dict):
        fields["traits"] = present({**fields["traits"], "createdAt": rng.choice(MOMENTS[:-1])})
    return {"type": kind, **fields}


def drawn_object(rng, levels):
    return {name: drawn_value(rng, levels - 1) for name in rng.sample(NAMES, rng.randrange(6))}


def drawn_value(rng, levels):
    if levels == 0 or rng.random() < 0.8:
        return rng.choice(SCALARS)
    if rng.random() < 0.5:
        return drawn_object(rng, levels)
    return [drawn_value(rng, levels - 1) for _ in range(rng.randrange(4))]


ORDER = {
    "type": "track",
    "userId": "u1",
    "anonymousId": "a1",
    "event": "Order Completed",
    "properties": {
        "total": 12.5,
        "count": 0,
        "currency": "gbp",
        "empty": "",
        "none": None,
        "paid": True,
        "gift": False,
        "items": [{"sku": "A1", "price": 10}, {"sku": "B2", "price": 2.5, "sizes": ["S", "M"]}],
        "tags": ["x", "y"],
        "address": {"city": "Köln", "geo": {"lat": 50.9, "lon": 7}},
        "encoded": '{"a":[1,2],"b":null}',
        "text": "not {json",
    },
    "traits": {"plan": "Pro", "email": "Ann@Example.com"},
    "context": {"ip": "::1", "page": {"url": "https://example.com/?a=1"}},
}
OTHER_ORDER = {
    "type": "track",
    "userId": None,
    "anonymousId": "a2",
    "event": "Straße",
    "properties": {
        "total": -7,
        "count": 1,
        "currency": "EUR",
        "empty": " ",
        "paid": False,
        "items": [{"sku": "C3"}],
        "tags": ["z"],
        "address": {"geo": {"lat": 0}, "zip": "0123"},
        "encoded": "7",
        "text": "true",
    },
    "traits": {"plan": "free", "total": 1},
}
SPARSE = {"type": "identify", "userId": "", "traits": {"plan": "basic"}}
SPARSE["properties"] = {"tags": ["only"], "address": {"zip": "89073"}}
PAYLOADS = [ORDER, OTHER_ORDER, SPARSE]
PATHS = ["$.userId", "userId", "$.anonymousId", "$.event", "$.traits.plan", "$.traits", "$.missing", "$.type"]
PATHS += [f"$.properties.{name}" for name in [*ORDER["properties"], "missing"]]
PATHS += [
    "$.properties.items[0].sku",
    "properties.items[1].sku",
    "$.properties.tags[0]",
    "$.properties.tags[5]",
]
PATHS += ["$.properties.address.city", "$.properties.address.geo.lat", "$.properties.items[1].sizes[1]"]
TEMPLATES = [
    "plain",
    "",
    "{{userId}}",
    "{{ userId }}",
    "{{{userId}}}",
    "Order of {{userId}}: {{properties.total}}",
]
TEMPLATES += [
    "{{properties.paid}} {{properties.count}}",
    "{{properties.none}}|{{missing}}|{{properties.empty}}",
]
TEMPLATES += [
    "{{properties.items[0].sku}}/{{properties.tags[0]}}",
    "{userId} {{traits.plan}}{{type}} ü {{event}}",
]
LITERALS = [
    "x",
    "",
    7,
    0,
    1.5,
    True,
    False,
    None,
    [],
    ["a", 1],
    {},
    {"a": {"b": [1]}},
    "$.userId",
    "{{userId}}",
]


def path(text):
    return {"@path": text}


def directives():
    total, address = path("$.properties.total"), path("$.properties.address")
    yield from map(path, PATHS)
    yield from ({"@template": text} for text in TEMPLATES)
    for condition, text in itertools.product(["exists", "blank"], PATHS[:8] + PATHS[8:20]):
        yield {"@if": {condition: path(text), "then": "yes", "else": {"@template": "no {{type}}"}}}
    for condition in ("exists", "blank"):
        yield {"@if": {condition: path("$.userId"), "then": path("$.userId"), "else": path("$.anonymousId")}}
        yield {"@if": {condition: path("$.properties.paid"), "then": total}}
        yield {"@if": {condition: path("$.properties.none"), "else": total}}
        yield {
            "@if": {condition: total, "then": {"@if": {condition: path("$.userId"), "then": 1, "else": 2}}}
        }
    for operator, text in itertools.product(
        ["upper", "lower"], ["event", "traits.email", "properties.total", "missing"]
    ):
        yield {"@case": {"operator": operator, "value": path(text)}}
    yield {"@case": {"operator": "upper", "value": {"@template": "{{event}} {{properties.currency}}"}}}
    yield {"@case": {"operator": "lower", "value": "PLAIN"}}
    for separator, omit in itertools.product([".", "_", " / "], [True, False]):
        yield {"@flatten": {"value": address, "separator": separator, "omitArrays": omit}}
        yield {"@flatten": {"value": path("$.traits"), "separator": separator, "omitArrays": omit}}
    yield {"@flatten": {"value": path("$.properties"), "separator": ".", "omitArrays": True}}
    yield {"@flatten": {"value": {"cart": path("$.properties.items")}, "separator": ".", "omitArrays": True}}
    yield {"@flatten": {"value": {"cart": path("$.properties.tags")}, "separator": "."}}
    yield from ({"@json": {"mode": "encode", "value": path(text)}} for text in PATHS[3:20])
    for text in ("encoded", "text", "total", "items", "missing"):
        yield {"@json": {"mode": "decode", "value": path(f"$.properties.{text}")}}
    yield {"@json": {"mode": "decode", "value": {"@json": {"mode": "encode", "value": path("$.properties")}}}}
    for direction in ("left", "right"):
        yield {
            "@merge": {
                "objects": [path("$.traits"), {"plan": "default", "source": "x"}],
                "direction": direction,
            }
        }
        yield {
            "@merge": {
                "objects": [{"total": 0}, path("$.properties.address"), path("$.traits")],
                "direction": direction,
            }
        }
        yield {"@merge": {"objects": [], "direction": direction}}
    yield {
        "nested": {"total": total, "fixed": [1, "two"], "missing": path("$.missing")},
        "list": [total, "x"],
    }
    yield [path("$.type"), {"plan": path("$.traits.plan")}, 3]


INVALID = [
    {"@nothing": 1},
    {"@path": "$.userId", "@literal": 1},
    {"@path": "$.userId", "other": 1},
    {"@path": 7},
    {"@path": None},
    {"@template": 7},
    {"@if": "x"},
    {"@if": {"then": 1}},
    {"@case": {"value": "x"}},
    {"@case": {"operator": "title", "value": "x"}},
    {"@flatten": {"value": {}}},
    {"@flatten": {"value": {}, "separator": 7}},
    {"@json": {"value": 1}},
    {"@json": {"mode": "encode"}},
    {"@merge": {"objects": [{}]}},
    {"@merge": {"direction": "left"}},
    {"@merge": {"objects": {}, "direction": "left"}},
    {"@merge": {"objects": [{}, "x"], "direction": "left"}},
    {"@merge": {"objects": [{}], "direction": "up"}},
]
SURPRISES = {
    "a path through a null is null, not missing": path("$.properties.none.name"),
    "a path through a 0 is 0": path("$.properties.count.name"),
    "a path through an empty string is an empty string": path("$.properties.empty.name"),
    "a path goes into strings and lists as JavaScript does": path("$.properties.tags.length"),
    "brackets may quote a name": path("$.properties['total']"),
    "the path $. is the whole payload": path("$."),
    "an object in a template": {"@template": "{{traits}}"},
    "a list in a template": {"@template": "{{properties.tags}}"},
    "a template's path has no $.": {"@template": "{{$.userId}}"},
    "an else that is false is no else": {"@if": {"exists": path("$.missing"), "then": 1, "else": False}},
    "an else that is 0 is no else": {"@if": {"exists": path("$.missing"), "then": 1, "else": 0}},
    "an else that is an empty string is no else": {
        "@if": {"exists": path("$.missing"), "then": 1, "else": ""}
    },
    "an else that is null is no else": {"@if": {"exists": path("$.missing"), "then": 1, "else": None}},
    "exists of a fixed empty string is an error": {"@if": {"exists": "", "then": 1}},
    "an empty list is not blank's then": {"@if": {"blank": {"@literal": []}, "then": 1, "else": 2}},
    "a fixed empty string in @case is missing": {"@case": {"operator": "upper", "value": ""}},
    "a literal is resolved": {"@literal": {"@path": "$.userId"}},
    "flatten loses empty objects": {"@flatten": {"value": {"a": {}, "b": [], "c": 1}, "separator": "."}},
    "flatten of a scalar has an empty name": {"@flatten": {"value": path("$.event"), "separator": "."}},
    "flatten of what is missing is an empty object": {
        "@flatten": {"value": path("$.missing"), "separator": "."}
    },
    "merge takes a list apart": {
        "@merge": {"objects": [path("$.properties.tags"), {"a": 1}], "direction": "right"}
    },
    "merge passes over null and what is missing": {
        "@merge": {"objects": [path("$.properties.none"), path("$.missing"), {"a": 1}], "direction": "right"}
    },
    "a fixed 0 cannot be encoded": {"@json": {"mode": "encode", "value": 0}},
    "what is missing in a list is null": [path("$.missing"), 1],
}


def mappings():
    for directive, payload in itertools.product(directives(), PAYLOADS):
        yield {"mapping": {"field": directive}, "payload": payload}
    yield from ({"mapping": {"field": {"@literal": value}}, "payload": {}} for value in LITERALS)
    yield from ({"mapping": {"field": value}, "payload": {}} for value in LITERALS)
    yield from ({"mapping": {"field": directive}, "payload": ORDER} for directive in INVALID)
    for surprise, directive in SURPRISES.items():
        yield {"surprise": surprise, "mapping": {"field": directive}, "payload": ORDER}


TRIGGERS = [
    'type = "track"',
    'type="identify"',
    'type != "track"',
    'event = "Order Completed"',
    'event != "Order Completed"',
    'userId = "u1"',
    "userId = null",
    "userId != null",
    "properties.total > 100",
    "properties.total >= 12.5",
    "properties.total < 12.5",
    "properties.total <= 12.5",
    "properties.total = 12.5",
    "properties.count = 0",
    'properties.currency = "gbp"',
    'properties.currency != "gbp"',
    "properties.paid = true",
    "properties.paid = false",
    "properties.none = null",
    "properties.missing != null",
    'properties.address.city = "Köln"',
    "properties.address.geo.lat > 10",
    'traits.plan = "Pro"',
    "traits.total >= 1",
    'context.page.url = "https://example.com/?a=1"',
    "context.page.url != null",
    'contains(event, "Order")',
    'contains(properties.currency, "b")',
    'contains(traits.email, "@Example")',
    'match(event, "Order*")',
    'match(traits.email, "*.com")',
    'match(context.page.url, "https*")',
    'type = "track" and event = "Order Completed"',
    'type = "track" and properties.total > 10 and properties.paid = true',
    'type = "identify" or type = "group"',
    'event = "Straße" or event = "x" or event = "Order Completed"',
    'type = "track" and (properties.total > 100 or properties.paid = true)',
    '(type = "identify" or type = "group") and traits.plan = "basic"',
    '(type = "track" and properties.paid = true) or (type = "identify" and traits.plan = "basic")',
    '(type = "track")',
    'type = "track" and contains(event, "Comp")',
    'contains(event, "Comp") or match(traits.plan, "b*")',
]
WITH_AN_EVENT = [  # where the field is missing, the engine does not follow the documentation
    '!contains(event, "Order")',
    '!match(event, "Order*")',
    "properties.total != 12.5",
    'type = "track" and !contains(properties.currency, "E")',
]
GROUP = {"type": "group", "userId": "u1", "groupId": "g1", "traits": {"plan": "basic", "total": 100.5}}
LARGE_ORDER = {
    "type": "track",
    "userId": "u2",
    "event": "Big Order",
    "properties": {"total": 100.5, "currency": "gb"},
}


def triggers():
    for trigger, call in itertools.product(TRIGGERS, [*PAYLOADS, GROUP, LARGE_ORDER]):
        yield {"trigger": trigger, "call": call}
    for trigger, call in itertools.product(WITH_AN_EVENT, [ORDER, OTHER_ORDER, LARGE_ORDER]):
        yield {"trigger": trigger, "call": call}


def main():
    asked = itertools.chain(({"call": present(call)} for call in calls()), mappings(), triggers())
    for line in dict.fromkeys(json.dumps(question) for question in asked):  # each once
        print(line)


if __name__ == "__main__":
    main()
