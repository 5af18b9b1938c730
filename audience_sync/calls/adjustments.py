"""Adjustments of a call's deliveries by the profile: traits are left out, and vanished properties become null.

Userpilot keeps a property until it is null. So when `{"address": {"city": "Rome", "zip": "1"}}` is followed by
`{"address": {"city": "Bern"}}`, the second call must also send `"address.zip": null`; the same holds when a list gets
shorter, and when a value changes between text, object and list. The profile has the previous value.

For a time (KEEP) after a name vanished, it is sent as null with every value of its trait, because several calls may be
merged into one request, and a newer one may replace an older one.
"""

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from audience_sync.calls.model import PreparedCall, PreparedDelivery
from audience_sync.db.engines import from_json, to_json
from audience_sync.db.rows import moment
from audience_sync.userpilot.properties import property_names, with_gone, without_gone

KEEP = dt.timedelta(days=7)  # longer than any delivery is retried
# Of a user or a company: the newest vanished names. Each value of their traits is sent with all of them.
MAX_NAMES = 5_000
MAX_NAMES_LENGTH = 256 * 1024


def delivery_positions(call: PreparedCall) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the positions of the deliveries with traits, by action and subject."""
    positions: dict[tuple[str, str], tuple[int, ...]] = {}
    for position, delivery in enumerate(call.deliveries):
        if delivery.has_traits:
            subject = (delivery.action, delivery.subject_id)
            positions[subject] = (*positions.get(subject, ()), position)
    return positions


def is_sent_flat(call: PreparedCall, positions: Sequence[int]) -> bool:
    """Return whether each trait in the deliveries at these positions is one property."""
    return all(call.deliveries[position].names is None for position in positions)


def without_traits(
    call: PreparedCall, positions: Sequence[int], surplus: Mapping[str, Any], correction: str
) -> PreparedCall:
    """Remove traits from deliveries, and record them as left out."""
    deliveries = list(call.deliveries)
    for position in positions:
        delivery = deliveries[position]
        body = {name: value for name, value in from_json(delivery.body).items() if name not in surplus}
        names = delivery.names
        if names is not None:
            names = {name: trait for name, trait in names.items() if trait not in surplus}
        deliveries[position] = delivery._replace(body=to_json(body), names=names)
    left_out = from_json(call.left_out or "{}") | surplus
    corrections = (*call.corrections, correction)
    return call._replace(
        deliveries=tuple(deliveries),
        left_out=to_json(left_out),
        left_out_names=tuple(left_out),
        corrected=to_json(list(corrections)),
        corrections=corrections,
    )


def _not_expired(stored: Mapping[str, tuple[str, str | None]], now: str) -> dict[str, tuple[str, str | None]]:
    oldest = moment(dt.datetime.fromisoformat(now).replace(tzinfo=dt.UTC) - KEEP)
    return {
        name: (trait, gone_at)
        for name, (trait, gone_at) in stored.items()
        if gone_at is None or gone_at > oldest
    }


class SentNames:
    """Names of properties of a user or a company, each with its trait and the moment when it vanished.

    The moment is None for a current name of a trait that is not in the profile, because a mapping makes it.
    """

    def __init__(self, stored: Mapping[str, tuple[str, str | None]] | None, now: str) -> None:
        self._now = now
        self._names = _not_expired(stored, now) if stored else {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def text(self) -> str | None:
        """Return the names as JSON text, None if there are none."""
        return to_json(self._names) if self._names else None

    def complete(
        self,
        call: PreparedCall,
        positions: Sequence[int],
        before: Mapping[str, Any],
        held: Collection[str],
    ) -> PreparedCall:
        """Return the call, with the properties that its traits no longer have added to these deliveries as null.

        `before` has the profile's traits without this call, `held` the names of this call's traits that it will have.
        """
        deliveries = list(call.deliveries)
        for position in positions:
            deliveries[position] = self._complete(deliveries[position], before, held)
        return call if tuple(deliveries) == call.deliveries else call._replace(deliveries=tuple(deliveries))

    def _complete(
        self, delivery: PreparedDelivery, before: Mapping[str, Any], held: Collection[str]
    ) -> PreparedDelivery:
        if not delivery.is_flattened:
            return delivery
        body = from_json(delivery.body)
        names = property_names(body) if delivery.names is None else delivery.names
        known = {name: trait for name, (trait, _) in self._names.items() if trait in body}
        known |= property_names({name: before[name] for name in body if name in before})
        gone = known.keys() - names.keys()
        if gone:  # a property may belong to another trait: {"a.b": 1} and {"a": {"b": 2}}
            gone -= property_names({name: before[name] for name in before if name not in body}).keys()
        self._note({name: known[name] for name in gone if known[name] not in held}, self._now)
        nested = {name: trait for name, trait in names.items() if name != trait and trait not in held}
        self._note(nested, None)
        if not gone:
            return delivery
        for trait in {known[name] for name in gone}:
            names_of_trait = [name for name in gone if known[name] == trait]
            body[trait] = with_gone(without_gone(body[trait]), names_of_trait)
        return delivery._replace(body=to_json(body))

    def update(self, before: Mapping[str, Any], after: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Record the names that vanished from the profile because of a call, or arrived too late to be in it.

        `before` and `after` are the values of the call's traits in the profile, `new` their values in the call.
        """
        current = property_names(after)
        known = property_names(new) | property_names(before)
        gone = {
            name: trait
            for name, trait in known.items()
            if name not in current and not (name == trait and new[trait] is None)
        }
        self._note(gone, self._now)
        for name in current.keys() & self._names.keys():
            del self._names[name]

    def _note(self, names: Mapping[str, str], gone_at: str | None) -> None:
        for name, trait in names.items():
            self._names.pop(name, None)  # the newest are last
            self._names[name] = (trait, gone_at)
        length = sum(map(len, self._names))
        for name in list(self._names):
            if len(self._names) <= MAX_NAMES and length <= MAX_NAMES_LENGTH:
                break
            del self._names[name]
            length -= len(name)
