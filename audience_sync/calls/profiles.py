"""Profiles, companies and events, built from calls; definitions may read their tables."""

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa

from audience_sync.calls.model import CallType, PreparedCall
from audience_sync.db import rows, tables
from audience_sync.db.dialects import is_among
from audience_sync.db.engines import from_json, to_json


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
    """The time and the traits of a call about a user or a company; `traits` may be empty."""

    at: str
    traits: str


_Observations: TypeAlias = defaultdict[str, list[_Observation]]  # by the id of the user or the company


def update_profiles(
    connection: sa.Connection, new: Mapping[int, PreparedCall], received_at: dt.datetime
) -> None:
    """Update profiles and companies and add events, from new calls by call id; skip calls of erased users."""
    users: _Observations = defaultdict(list)
    companies: _Observations = defaultdict(list)
    memberships: dict[str, _MembershipRow] = {}
    event_rows: list[_EventRow] = []
    received = rows.moment(received_at)
    for call_id, call in new.items():
        user = call.subject_id
        if user is None:  # erased
            continue
        traits = call.traits if call.type == CallType.IDENTIFY else ""
        users[user].append(_Observation(call.timestamp, traits))
        if call.type == CallType.GROUP and call.group_id is not None:
            companies[call.group_id].append(_Observation(call.timestamp, call.traits))
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
    _merge(connection, tables.profiles, tables.profiles.c.user_id, users)
    _merge(connection, tables.companies, tables.companies.c.company_id, companies)
    rows.update(
        connection,
        tables.profiles,
        _MembershipRow._fields,
        [row for _, row in sorted(memberships.items())],
        "(t.company_at IS NULL OR t.company_at <= {company_at})",
    )
    rows.insert(connection, tables.events, _EventRow._fields, event_rows)


def _merge(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], observations: _Observations
) -> None:
    """Merge traits into rows: the newest timestamp of each wins; a null removes the trait and leaves its time."""
    rows.insert(  # this also locks existing rows
        connection,
        table,
        (key.name, "traits", "trait_times", "first_seen_at", "last_seen_at"),
        [(subject, "{}", "{}", min(seen).at, max(seen).at) for subject, seen in sorted(observations.items())],
        f"ON CONFLICT ({key.name}) DO UPDATE SET {_SEEN}",
    )
    with_traits = [subject for subject, seen in observations.items() if any(each.traits for each in seen)]
    if not with_traits:
        return
    stored = connection.execute(
        sa.select(key.label("subject"), table.c.traits, table.c.trait_times).where(
            is_among(connection, key, with_traits)
        )
    )
    merged = [_merged(row, observations[row.subject]) for row in stored]
    rows.update(connection, table, (key.name, "traits", "trait_times"), merged)


_SEEN = """first_seen_at = CASE WHEN excluded.first_seen_at < t.first_seen_at THEN excluded.first_seen_at
ELSE t.first_seen_at END, last_seen_at = CASE WHEN excluded.last_seen_at > t.last_seen_at
THEN excluded.last_seen_at ELSE t.last_seen_at END"""


def _merged(row: sa.Row[Any], observations: Sequence[_Observation]) -> rows.Row:
    traits, times = row.traits, row.trait_times
    for observation in sorted(observations, key=lambda observation: observation.at):
        stamp = f"{observation.at.replace(' ', 'T')}+00:00"
        for name, value in from_json(observation.traits or "{}").items():
            if times.get(name, "") <= stamp:
                times[name] = stamp
                traits[name] = value
                if value is None:
                    del traits[name]
    return row.subject, to_json(traits), to_json(times)
