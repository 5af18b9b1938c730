"""Names of events and traits from calls, as suggestions for queries."""

import sqlalchemy as sa

from audience_sync.db import tables

SHOWN_NAMES = 40
SAMPLED_PROFILES = 200
SAMPLED_EVENTS = 50


def event_names(connection: sa.Connection) -> list[str]:
    """The first names of events in alphabetical order, each found by one lookup in the index."""
    name = tables.events.c.name
    names: list[str] = []
    while len(names) < SHOWN_NAMES:
        query = (
            sa.select(sa.func.min(name))
            if not names
            else sa.select(sa.func.min(name)).where(name > names[-1])
        )
        following = connection.execute(query).scalar()
        if following is None:
            break
        names.append(following)
    return names


def number_property(connection: sa.Connection) -> tuple[str, str] | None:
    """An event with a property that is a number, from the newest events."""
    events = tables.events.c
    newest = sa.select(events.name, events.properties).order_by(events.event_id.desc()).limit(SAMPLED_EVENTS)
    for event in connection.execute(newest):
        for name, value in event.properties.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and "." not in name:
                return event.name, name
    return None


def trait_names(connection: sa.Connection) -> list[str]:
    """Names of traits in a sample of profiles."""
    sample = connection.execute(sa.select(tables.profiles.c.traits).limit(SAMPLED_PROFILES)).scalars()
    return sorted({name for traits in sample for name in traits})[:SHOWN_NAMES]
