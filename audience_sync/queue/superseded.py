"""Values that newer ones supersede, so that they are neither sent nor retried.

A value is superseded if its subject has a newer one of the same trait. Every function runs in its caller's transaction.
"""

import datetime as dt
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.db.dialects import is_among, json_keys, json_list, sql
from audience_sync.db.engines import to_json
from audience_sync.db.tables import deliveries, destination
from audience_sync.queue.conditions import OF_SUBJECT, exists, for_subject, moments_of, subjects_where
from audience_sync.queue.outcomes import SUPERSEDED, Delivery, Status

_ALL_BUT_HELD = tuple(status for status in Status if status is not Status.HELD)


def superseded_traits(
    connection: sa.Connection,
    values: Sequence[Delivery | sa.Row[Any]],
    statuses: Collection[Status] = _ALL_BUT_HELD,
    fingerprint: str | None = None,
    *,
    of_runs: bool = False,
) -> dict[int, frozenset[str]]:
    """Return, by delivery id, the traits for which the subject has a newer value with one of the statuses.

    `fingerprint`: count only newer values for this destination or another key or address of its environment.
    `of_runs`: count only newer values of runs.
    """
    superseded: dict[int, frozenset[str]] = {}
    if not values:
        return superseded
    where = _newer_in(statuses) + (" AND b.call_id IS NULL" if of_runs else "")
    parameters: dict[str, Any] = {}
    if fingerprint is not None:
        where = f"{where} AND (b.fingerprint IS NULL OR b.fingerprint IN :environment)"
        parameters["environment"] = environment_of(connection, fingerprint)
    for action in ("identify", "company"):
        by_subject: dict[str, list[Any]] = {}
        for value in values:
            if value.action == action:
                by_subject.setdefault(value.subject_id, []).append(value)
        if not by_subject:
            continue
        parameters |= {
            "action": action,
            "since": min(value.value_at for value in itertools.chain(*by_subject.values())),
        }
        for subject in subjects_where(connection, by_subject, exists(where, "value_at"), **parameters):
            newest = _newest_values(connection, subject, by_subject[subject], where, parameters)
            for value in by_subject[subject]:
                names = frozenset(name for name in value.body if newest.get(name, _age(value)) > _age(value))
                if names:
                    superseded[value.delivery_id] = names
    return superseded


def _newest_values(
    connection: sa.Connection, subject: str, values: Sequence[Any], where: str, parameters: dict[str, Any]
) -> dict[str, tuple[dt.datetime, int]]:
    """Return the age of the subject's newest value of each trait in `values`, among the deliveries that meet `where`."""
    has_trait = f"EXISTS (SELECT 1 FROM {json_keys(connection, 'b.body')} k WHERE k.name = t.value)"
    newest = (
        f"SELECT t.value AS trait, d.value_at, d.delivery_id FROM {json_list(connection, 'names')} t "
        "JOIN {our}deliveries d ON d.delivery_id = (SELECT b.delivery_id FROM {our}deliveries b "
        f"WHERE {for_subject(where, ':subject')} AND {has_trait} ORDER BY b.value_at DESC, b.delivery_id DESC LIMIT 1)"
    )
    names = sorted({name for value in values for name in value.body})
    since = min(value.value_at for value in values)
    asked = parameters | {"names": to_json(names), "subject": subject, "since": since}
    moment = moments_of(connection)
    return {row.trait: (moment(row.value_at), row.delivery_id) for row in sql(connection, newest, **asked)}


def _newer_in(statuses: Collection[Status]) -> str:
    names = ", ".join(f"'{Status(status).value}'" for status in statuses)
    status = f"= {names}" if len(statuses) == 1 else f"IN ({names})"  # the partial index matches only `=`
    if names == "'dead'":
        status = "IN ('held', 'dead') AND b.status = 'dead'"  # the condition of its partial index
    # The values of a rejected run were never true.
    rejected = (
        "b.status = 'cancelled' AND b.run_id IN (SELECT run_id FROM {our}runs WHERE status = 'rejected')"
    )
    condition = f"{OF_SUBJECT} AND b.status {status} AND b.value_at >= :since"
    return f"{condition} AND NOT COALESCE({rejected}, false)" if "cancelled" in names else condition


def environment_of(connection: sa.Connection, fingerprint: str) -> list[str]:
    """Return the fingerprints of all keys and addresses that were accepted as the same environment."""
    stored = connection.execute(sa.select(destination.c.environments)).scalar_one_or_none() or []
    return sorted({fingerprint}.union(*(names for names in stored if fingerprint in names)))


def reasons_not_to_retry(connection: sa.Connection, ids: Sequence[int]) -> dict[int, str]:
    """Return, by id, why some of these deliveries must not get a new attempt.

    A value is superseded if its subject has a newer one of the same trait, whatever the newer one's status: every change
    of a membership has a delivery, so the older value is no longer true.
    """
    rows = connection.execute(
        sa.select(deliveries).where(is_among(connection, deliveries.c.delivery_id, ids))
    ).all()
    by_id = {row.delivery_id: row for row in rows}
    dead = [row for row in rows if row.status == "dead"]
    newer: dict[int, frozenset[str]] = {}
    for fingerprint in {row.fingerprint for row in dead}:
        of_destination = [row for row in dead if row.fingerprint == fingerprint]
        newer |= superseded_traits(connection, of_destination, fingerprint=fingerprint)
    reasons = {}
    for delivery_id in ids:
        row = by_id.get(delivery_id)
        if row is None:
            reasons[delivery_id] = f"There is no delivery {delivery_id}."
        elif row.status != "dead":
            reasons[delivery_id] = f"Delivery {delivery_id} is {row.status}, not dead."
        elif row.body and newer.get(delivery_id, frozenset()).issuperset(row.body):
            reasons[delivery_id] = f"Delivery {delivery_id} is {SUPERSEDED}."
    return reasons


def _age(value: Any) -> tuple[dt.datetime, int]:
    return value.value_at, value.delivery_id
