"""Profiles, companies and events, built from calls; definitions may read their tables.

A profile also changes what its calls send: traits beyond its limit are left out, and properties that an object or list
no longer has become null.
"""

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa

from audience_sync.calls.adjustments import SentNames, delivery_positions, is_sent_flat, without_traits
from audience_sync.calls.model import CallType, PreparedCall
from audience_sync.db import rows, tables
from audience_sync.db.dialects import is_among
from audience_sync.db.engines import from_json, to_json
from audience_sync.userpilot.payloads import Action
from audience_sync.userpilot.properties import has_nested

# Of a user or a company. Each call reads and writes the whole profile.
MAX_PROFILE_TRAITS = 1_000
MAX_PROFILE_LENGTH = 256 * 1024  # of the traits as JSON
_LEFT_OUT = (
    f"traits beyond the profile's {MAX_PROFILE_TRAITS:,} or {MAX_PROFILE_LENGTH // 1024} KB are left out"
)


class _EventRow(NamedTuple):
    call_id: int
    user_id: str
    name: str | None
    properties: str
    context: str
    timestamp: str
    received_at: str


class _MembershipRow(NamedTuple):
    user_id: str
    company_id: str
    company_at: str


class _Observation(NamedTuple):
    """A call's traits of a user or a company, and the positions of the deliveries for it.

    `at` is empty if the call is about another subject and only sends something for this one; `traits` may be empty.
    """

    call_id: int
    at: str
    traits: str
    sent: tuple[int, ...]


_Observations: TypeAlias = defaultdict[str, list[_Observation]]  # by the id of the user or the company


def update_profiles(
    connection: sa.Connection,
    new: Mapping[int, PreparedCall],
    received_at: dt.datetime,
    *,
    latest: dt.datetime,
) -> dict[int, PreparedCall]:
    """Update profiles and companies and add events, from new calls by call id; skip calls of erased users.

    Stored times after `latest` come from a clock that was ahead, and do not count. Returns the calls whose deliveries
    must be changed.
    """
    users: _Observations = defaultdict(list)
    companies: _Observations = defaultdict(list)
    memberships: dict[str, _MembershipRow] = {}
    event_rows: list[_EventRow] = []
    received, latest_stamp = rows.moment(received_at), _stamp(rows.moment(latest))
    for call_id, call in new.items():
        user = call.subject_id
        if user is None:  # erased
            continue
        sent = delivery_positions(call)
        traits = call.traits if call.type == CallType.IDENTIFY else ""
        positions = sent.pop((Action.IDENTIFY.value, user), ())
        users[user].append(_Observation(call_id, call.timestamp, traits, positions))
        if call.type == CallType.GROUP and call.group_id is not None:
            positions = sent.pop((Action.COMPANY.value, call.group_id), ())
            companies[call.group_id].append(_Observation(call_id, call.timestamp, call.traits, positions))
            if user not in memberships or memberships[user].company_at <= call.timestamp:
                memberships[user] = _MembershipRow(user, call.group_id, call.timestamp)
        elif call.type == CallType.TRACK:
            event_rows.append(
                _EventRow(
                    call_id=call_id,
                    user_id=user,
                    name=call.event,
                    properties=call.properties,
                    context=call.context,
                    timestamp=call.timestamp,
                    received_at=received,
                )
            )
        for (action, subject), positions in sent.items():  # mappings may send to others
            table = users if action == Action.IDENTIFY.value else companies
            table[subject].append(_Observation(call_id, "", "", positions))
    calls = dict(new)
    _merge(connection, tables.profiles, tables.profiles.c.user_id, users, calls, received, latest_stamp)
    _merge(
        connection, tables.companies, tables.companies.c.company_id, companies, calls, received, latest_stamp
    )
    rows.update(
        connection,
        tables.profiles,
        _MembershipRow._fields,
        [row for _, row in sorted(memberships.items())],
        "(t.company_at IS NULL OR t.company_at <= {company_at})",
    )
    rows.insert(connection, tables.events, _EventRow._fields, event_rows)
    return {call_id: call for call_id, call in calls.items() if call is not new[call_id]}


def _merge(
    connection: sa.Connection,
    table: sa.Table,
    key: sa.Column[str],
    observations: _Observations,
    calls: dict[int, PreparedCall],
    received: str,
    latest: str,
) -> None:
    """Merge traits into rows: the newest value of each trait wins; null removes the trait but keeps its time."""
    seen = {
        subject: [each.at for each in about if each.at] for subject, about in sorted(observations.items())
    }
    rows.insert(  # this also locks existing rows
        connection,
        table,
        (key.name, "traits", "trait_times", "first_seen_at", "last_seen_at"),
        [(subject, "{}", "{}", min(times), max(times)) for subject, times in seen.items() if times],
        f"ON CONFLICT ({key.name}) DO UPDATE SET {_SEEN}",
    )
    concerned = [
        subject for subject, about in observations.items() if any(each.traits or each.sent for each in about)
    ]
    if not concerned:
        return
    stored = connection.execute(
        sa.select(key.label("subject"), table.c.traits, table.c.trait_times, table.c.sent_names).where(
            is_among(connection, key, concerned)
        )
    )
    merged = [
        _merged(row, observations[row.subject], calls, SentNames(row.sent_names, received), latest)
        for row in stored
    ]
    rows.update(connection, table, (key.name, "traits", "trait_times", "sent_names"), merged)


_SEEN = """first_seen_at = CASE WHEN excluded.first_seen_at < t.first_seen_at THEN excluded.first_seen_at
ELSE t.first_seen_at END, last_seen_at = CASE WHEN excluded.last_seen_at > t.last_seen_at
THEN excluded.last_seen_at ELSE t.last_seen_at END"""


def _merged(
    row: sa.Row[Any],
    observations: Sequence[_Observation],
    calls: dict[int, PreparedCall],
    sent_names: SentNames,
    latest: str,
) -> rows.Row:
    traits, times = row.traits, row.trait_times
    is_flat = not (sent_names or has_nested(traits))
    length = len(to_json(traits))
    for observation in observations:
        if not (observation.traits or observation.sent):
            continue
        stamp = _stamp(observation.at)
        new = from_json(observation.traits or "{}")
        newer = {name: value for name, value in new.items() if not stamp < times.get(name, "") <= latest}
        call = calls[observation.call_id]
        is_flat = is_flat and not has_nested(new) and is_sent_flat(call, observation.sent)
        length += len(observation.traits)  # at most
        surplus: dict[str, Any] = {}
        if len(traits) + len(newer) > MAX_PROFILE_TRAITS or length > MAX_PROFILE_LENGTH:
            surplus, length = _surplus(traits, newer)
        if surplus:
            call = without_traits(call, observation.sent, surplus, _LEFT_OUT)
        if not is_flat:
            call = sent_names.complete(call, observation.sent, traits, new)
        calls[observation.call_id] = call
        applied = {name: value for name, value in new.items() if name not in surplus}
        before = {} if is_flat else {name: traits[name] for name in applied if name in traits}
        for name, value in newer.items():
            if name in surplus:
                continue
            times[name] = stamp
            traits[name] = value
            if value is None:
                del traits[name]
        if not is_flat:
            sent_names.update(before, {name: traits[name] for name in applied if name in traits}, applied)
    _drop_oldest_times(traits, times)
    return row.subject, to_json(traits), to_json(times), sent_names.text()


def _stamp(moment: str) -> str:
    return f"{moment.replace(' ', 'T')}+00:00"


def _surplus(traits: Mapping[str, Any], newer: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the new values for which the profile has no room, and the profile's length with the others, at most.

    Traits that become null make room for the others, wherever they are in the call.
    """
    staying = {name: value for name, value in traits.items() if newer.get(name, "") is not None}
    room, length = MAX_PROFILE_TRAITS - len(staying), len(to_json(staying))
    surplus = {}
    for name, value in newer.items():
        if value is None:
            continue
        is_added, growth = name not in staying, _length(name, value)
        if not is_added:
            growth -= _length(name, staying[name])
        if (is_added and room <= 0) or (growth > 0 and length + growth > MAX_PROFILE_LENGTH):
            surplus[name] = value
        else:
            room, length = room - is_added, length + growth
    return surplus, length


def _length(name: str, value: Any) -> int:
    return len(to_json({name: value})) - 1  # a comma in place of the braces


def _drop_oldest_times(traits: Mapping[str, Any], times: dict[str, str]) -> None:
    """Drop the oldest times of removed traits beyond the limit; a late older value would bring such a trait back."""
    removed = sorted(times.keys() - traits.keys(), key=lambda name: times[name])
    for name in removed[: max(0, len(removed) - MAX_PROFILE_TRAITS)]:
        del times[name]
