"""The simulation with two environments of Userpilot, two API keys of each, and rows that are pruned after minutes.

The configuration moves from key to key. Runs are held, approved, rejected and made in full, keys are retired, and
`check --accept-destination` accepts a new key of the same environment. When the storm is over, both environments are
configured in turn, and each must have the newest values that were decided for it.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import sqlalchemy as sa

from audience_sync.audiences import decisions, foreign, runs
from audience_sync.audiences.definition import Kind
from audience_sync.db import engines, tables
from audience_sync.errors import Busy, ConfigError, LeaseLost, NotApproved
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination
from audience_sync.retention import pruning
from tests.simulation.machinery import Network
from tests.simulation.simulation import DEATHS_OF_SYNCS, Simulation

CALL_TRAITS = {"plan", "city"}


def environment(fingerprint):
    """A fingerprint is the name of an environment, and which of its keys."""
    return fingerprint and fingerprint[0]


class TwoDestinations(Simulation):
    def _draw(self):
        super()._draw()
        limits = {f"{lane}_per_minute": self.limits[lane] for lane in ("identify", "track")}
        other = Network(self.timeline, self.chance, self.note, **limits)
        other.when_late = self.follow_up
        self.networks = {"A": self.network, "B": other}
        # Who left before the memberships that are kept is not reached by a full run at another environment.
        self.has_one_environment = self.chance.random() < 0.3
        spans = [60.0, 600.0]
        self.keep = pruning.Retention(
            calls=self.chance.choice(spans),
            deliveries=self.chance.choice(spans),
            requests=math.inf,
            past_members=self.chance.choice(spans) if self.has_one_environment else math.inf,
        )
        self.retired = {}  # key: its definition
        self.recorded = {}  # delivery id: its row, as it was last seen
        self.pruned = {}  # (user, trait): the time of the newest value that was pruned
        self.after = {}  # (delivery id, trait): the same, when the delivery was first seen
        self.environments = defaultdict(set)  # delivery id: those that it was for, one after the other
        self.keys = {"A": "A1", "B": "B1"}
        self.configure("A1")

    # The configuration.

    def configure(self, fingerprint):
        self.note(f"configured: {fingerprint}")
        self.fingerprint, self.network = fingerprint, self.networks[environment(fingerprint)]
        jobs = replace(self.settings.jobs, fingerprint=fingerprint)
        self.settings = replace(self.settings, fingerprint=fingerprint, jobs=jobs)

    @property
    def destination(self):
        return Destination(self.fingerprint)

    def switch(self):
        """Configure the other environment, or go back to it; then make full runs there, or not yet."""
        if self.has_one_environment:
            self.rotate()
            return
        self.configure(self.keys["B" if environment(self.fingerprint) == "A" else "A"])
        self.chance.choice(
            [self.sync_in_full, self.move_and_sync, partial(self.note, "nothing else is done")]
        )()

    def rotate(self):
        """Configure another key of the environment and accept it, unless something belongs to another environment."""
        name = environment(self.fingerprint)
        before, after = self.fingerprint, f"{name}{3 - int(self.fingerprint[1])}"
        self.configure(after)
        while (is_accepted := self._accept(name)) is None:  # it was interrupted: it is repeated
            pass
        if is_accepted:
            self.keys[name] = after
        else:
            self.configure(before)

    def _accept(self, name):
        """Return whether the key was accepted; None if the process ended before it said so."""
        with self.process("check") as process:
            process.failure = self._armed([], 10)
            with engines.write(self.engine) as connection:
                is_own = self._environments(connection) <= {name}
                if is_own:
                    self.note(f"accepted: {foreign.accept_destination(connection, self.destination)}")
            return is_own
        return None

    def _environments(self, connection):
        undecided = ("held", "pending", "sending", "dead")
        names = sa.union(
            sa.select(tables.definitions.c.fingerprint),
            sa.select(tables.deliveries.c.fingerprint).where(tables.deliveries.c.status.in_(undecided)),
        )
        return {environment(name) for name in connection.execute(names).scalars() if name is not None}

    # Runs and decisions.

    def run_options(self, definition, *, full, users):
        if users is not None and self._is_foreign(definition.key):
            users = None  # a canary is refused
        hold = users is None and bool(self.kinds) and self.chance.random() < 0.15
        return runs.RunOptions(full=full, users=users, hold=hold, destination=self.destination)

    def _is_foreign(self, key):
        with engines.read(self.company) as connection:
            query = sa.select(tables.definitions.c.fingerprint).where(tables.definitions.c.key == key)
            return self.destination.is_foreign(connection, connection.execute(query).scalar())

    def sync(self, *, full=False, users=None):
        try:
            super().sync(full=full, users=users)
        finally:
            self.record()

    def sync_in_full(self):
        self.sync(full=True)

    def prepare_delivery(self, connection, now):
        super().prepare_delivery(connection, now)
        foreign.hold_foreign(connection, self.destination, now)

    def decide(self):
        """Approve or reject the held runs."""
        with engines.read(self.company) as connection:
            held = connection.execute(sa.select(tables.runs.c.run_id).where(tables.runs.c.status == "held"))
            run_ids = held.scalars().all()
        for run_id in run_ids:
            if self.chance.random() < 0.3:
                act = partial(decisions.reject, self.engine, run_id)
            else:
                act = partial(decisions.approve, self.engine, run_id, destination=self.destination)
            self._decide(f"{act.func.__name__} {run_id}", act)

    def retire(self):
        if len(self.definitions) > 1:
            definition = self.definitions[-1]
            act = partial(decisions.retire, self.engine, definition.key, destination=self.destination)
            self._decide(f"retire {definition.key}", act)
            with engines.read(self.company) as connection:
                query = sa.select(tables.definitions.c.retired_at)
                query = query.where(tables.definitions.c.key == definition.key)
                if connection.execute(query).scalar() is not None:
                    self.retired[definition.key] = self.definitions.pop()
                    self.truths_of_retired(definition)

    def truths_of_retired(self, definition):
        for user in self.users:
            self.truths[user, definition.key].append(False if definition.kind is Kind.AUDIENCE else None)

    def _decide(self, what, act):
        self.note(what)
        with self.process("decision") as process:
            process.failure = self._armed(DEATHS_OF_SYNCS, 40)
            try:
                act(clock=process.clock)
            except (Busy, LeaseLost, ConfigError, NotApproved) as error:
                self.note(str(error))
        self.record()

    def _retry(self):
        """Retry what is dead: nothing else does for a key that was retired."""
        with engines.write(self.company) as connection:
            self.note(f"retried: {deliveries.retry(connection, None, self.timeline.now())}")

    def prune(self):
        self.record()
        with self.process("prune") as process:
            process.failure = self._armed([], 20)
            self.note(f"pruned: {pruning.prune(self.engine, self.keep, process.clock.now())}")

    def record(self):
        """Remember the deliveries as they are, before pruning deletes some."""
        with engines.read(self.company) as connection:
            rows = {row.delivery_id: row for row in connection.execute(sa.select(tables.deliveries))}
        for row in [row for delivery_id, row in self.recorded.items() if delivery_id not in rows]:
            for name in row.body:
                whose = row.subject_id, name
                self.pruned[whose] = max(row.value_at, self.pruned.get(whose, row.value_at))
        for delivery_id, row in rows.items():
            if delivery_id not in self.recorded:
                earlier = {name: self.pruned.get((row.subject_id, name)) for name in row.body}
                self.after |= {(delivery_id, name): at for name, at in earlier.items() if at}
            self.environments[delivery_id].add(environment(row.fingerprint))
        self.recorded |= rows

    def _acts(self):
        ours = (
            [self.switch] * 4
            + [self.rotate] * 2
            + [self._retry, self.decide, self.decide, self.prune, self.prune, self.prune, self.retire]
        )
        return super()._acts() + ours

    def _submit(self, raws):
        is_taken = super()._submit(raws)
        self.record()
        return is_taken

    def _pending(self):
        of_run = sa.func.coalesce(tables.runs.c.deliveries_run_id, tables.runs.c.run_id)
        held = sa.select(of_run).where(tables.runs.c.status == "held")
        own = sa.select(sa.func.count()).where(
            tables.deliveries.c.status == "held",
            tables.deliveries.c.fingerprint == self.fingerprint,
            sa.or_(tables.deliveries.c.run_id.is_(None), tables.deliveries.c.run_id.not_in(held)),
        )
        with engines.read(self.company) as connection:
            return super()._pending() + connection.execute(own).scalar()

    # The end.

    def _calm(self):
        """Configure each environment once more, as it was left; then everything is synced and delivered there."""
        self.note("calm")
        self.kinds, self._nap_at = set(), None
        for network in self.networks.values():
            network.calm_down()
            network.userpilot.state.job_faults.clear()
        self.timeline.sleep(5)
        last = environment(self.fingerprint)
        for fingerprint in self.keys.values():  # what is held for each environment
            self.configure(fingerprint)
            self._retry()
            self._deliver_all()
        self.configure(self.keys[last])
        self._settle()
        self.check_environment(last)
        if not self.has_one_environment:
            self.configure(self.keys["B" if last == "A" else "A"])
            self._settle()
            self.check_environment(environment(self.fingerprint))
        self.record()

    def _settle(self):
        for _ in range(2):
            self.sync(full=any(self._is_foreign(definition.key) for definition in self.definitions))
            self._deliver_all()
            self.timeline.sleep(700)
            self.prune()

    def check_environment(self, name):
        """Every user has the true value, or the one that was decided for a key when it was retired."""
        users = self.networks[name].userpilot.state.users
        with engines.read(self.company) as connection:
            query = sa.select(tables.definitions.c.key, tables.definitions.c.fingerprint)
            homes = {row.key: environment(row.fingerprint) for row in connection.execute(query)}
        for user in sorted(set(self.users) - self.excused):
            true = self.now(user)
            held = users.get(user, {"properties": {}})["properties"]
            for definition in [*self.definitions, *self.retired.values()]:
                if homes[definition.key] != name:
                    assert definition.key in self.retired, definition.key
                    continue
                nothing = False if definition.kind is Kind.AUDIENCE else None
                wanted = nothing if definition.key in self.retired else true[definition.key]
                value = held.get(definition.key, nothing)
                assert value == wanted, (name, user, definition.key, value, wanted)


def check(simulation):
    decided = _decided(simulation)
    for name, network in simulation.networks.items():
        history = defaultdict(list)
        for user, lines in network.userpilot.state.history.items():
            for trait, value, _ in lines:
                history[user, trait].append(value)
        for (user, trait), values in sorted(history.items()):
            if user not in simulation.excused:
                _check_order(decided.get((name, user, trait), []), values, (name, user, trait))
    _check_calls(simulation, decided)
    _check_runs(simulation)


def _decided(simulation):
    """What was decided for an environment about a user's trait, oldest first, by these three."""
    decided = defaultdict(list)
    for row in simulation.recorded.values():
        if row.action == "identify":
            for name, trait in itertools.product(simulation.environments[row.delivery_id], row.body):
                decided[name, row.subject_id, trait].append(row)

    return {
        whose: sorted(rows, key=partial(_order, simulation.after, whose[-1]))
        for whose, rows in decided.items()
    }


def _order(after, trait, row):
    """By time; but what was decided after a value was pruned is newer than that, even if a clock was set back."""
    pruned_at = after.get((row.delivery_id, trait))
    if pruned_at is None or row.value_at > pruned_at:
        return row.value_at, 0, row.value_at, row.delivery_id
    return pruned_at, 1, row.value_at, row.delivery_id


def _check_order(decided, values, whose):
    """The values that a user had are decisions in their order, repeats aside."""
    trait = whose[-1]
    later = iter([row.body[trait] for row in decided])
    changes = [value for value, _ in itertools.groupby(values)]
    assert all(any(value == each for each in later) for value in changes), (
        whose, values, [(row.delivery_id, row.body, row.status) for row in decided],
    )  # fmt: skip


def _check_calls(simulation, decided):
    """Each environment has the newest value of the calls for it, apart from those that it refused."""
    for name, user in itertools.product(simulation.networks, simulation.users):
        if user in simulation.excused:
            continue
        held = simulation.networks[name].userpilot.state.users.get(user, {"properties": {}})["properties"]
        for trait in CALL_TRAITS:
            rows = [
                row
                for row in decided.get((name, user, trait), [])
                if environment(row.fingerprint) == name and row.status != "dead"
            ]
            if rows and (name == environment(simulation.fingerprint) or not simulation.has_one_environment):
                assert rows[-1].status == "accepted", rows[-1]
                assert held.get(trait) == rows[-1].body[trait], (name, user, trait, rows[-1], held)


def _check_runs(simulation):
    """Members add up from run to run."""
    with engines.read(simulation.company) as connection:
        definitions = connection.execute(sa.select(tables.definitions)).all()
        all_runs = connection.execute(sa.select(tables.runs).order_by(tables.runs.c.run_id)).all()
        members = connection.execute(sa.select(tables.members.c.definition_id)).scalars().all()
    for definition in definitions:
        last = 0
        for run in all_runs:
            if run.definition_id == definition.definition_id and run.status == "succeeded":
                assert run.member_count == last + run.entered_count - run.exited_count, run
                last = run.member_count
        assert members.count(definition.definition_id) == last, definition.key
