"""Random histories of snapshots, on both databases, compared with a slow, obvious model.

The model keeps each user's value, since when, and the list of the user's deliveries, without sets, joins or
transactions.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

USERS = "abcde"


@dataclass
class Model:
    """Plain lists: `sent` holds [run, user, value, status, tried], `history` [user, value, from, to]."""

    sent: list = field(default_factory=list)
    history: list = field(default_factory=list)
    is_new: bool = True

    def held(self):
        return {user: value for user, value, _, to in self.history if to is None}

    def sync(self, run, snapshot, *, full):
        """The counts of the run: entered, exited, changed."""
        before, counts = self.held(), [0, 0, 0]
        changed = []
        for user in USERS:
            old, new = before.get(user), snapshot.get(user)
            if old == new:
                continue
            counts[0 if old is None else 1 if new is None else 2] += 1
            for interval in self.history:
                if interval[0] == user and interval[3] is None:
                    interval[3] = run
            if new is not None:
                self.history.append([user, new, run, None])
            changed.append(user)
        for user in changed:
            mine = [each for each in self.sent if each[1] == user]
            is_never_sent = (
                user not in snapshot
                and any(each[3] == "pending" for each in mine)
                and not any(each[4] or each[3] in {"accepted", "dead"} for each in mine)
            )
            if is_never_sent:
                for each in mine:
                    if each[3] == "pending":
                        each[3] = "cancelled"
            if not full:
                self.sent.append(
                    [run, user, snapshot.get(user), "cancelled" if is_never_sent else "pending", False]
                )
        if full:
            for user in USERS:
                mine = [each for each in self.sent if each[1] == user]
                is_known = any(each[3] != "cancelled" or each[4] for each in mine)
                ever = any(interval[0] == user for interval in self.history)
                if user in snapshot or (ever and is_known):
                    self.sent.append([run, user, snapshot.get(user), "pending", False])
        for user in USERS:  # the newest of a user, if it died and is still true, lives again
            mine = [each for each in self.sent if each[1] == user]
            if mine and mine[-1][3] == "dead" and mine[-1][2] == snapshot.get(user):
                mine[-1][3] = "pending"
        return counts

    def settle(self, user, status):
        for each in self.sent:
            if each[1] == user and each[3] == "pending":
                each[3], each[4] = status, True


steps = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(USERS), st.sampled_from([1.0, 2.5])),
        st.sampled_from([False, False, False, True]),
        st.dictionaries(st.sampled_from(USERS), st.sampled_from(["accepted", "dead"])),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("kind", ["audience", "trait"])
def test_a_history_of_syncs_is_as_the_model_says(world, kind):
    definition = world.audience() if kind == "audience" else world.trait()

    def text(value):
        if kind == "audience":
            return "false" if value is None else "true"
        return "null" if value is None else f"{value:.15g}"

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps)
    def check(steps):
        for table in ("deliveries", "members", "past_members", "runs"):
            world.execute(f"DELETE FROM {{our}}{table}")
        model = Model()
        for number, (wanted, full, answers) in enumerate(steps):
            snapshot = {user: value if kind == "trait" else 1.0 for user, value in wanted.items()}
            world.people(*snapshot.items())
            run = world.sync(definition, full=full)
            counts = model.sync(run.run_id, snapshot, full=full)
            assert [run.entered_count, run.exited_count, run.changed_count] == counts
            assert (run.status, run.member_count) == ("succeeded", len(snapshot))
            assert run.mode == ("full" if full else "first" if number == 0 else "changes")
            for user, status in answers.items():
                model.settle(user, status)
                world.settle(status, f"subject_id = '{user}'")
            _compare(world, model, definition.key, text)

    check()


def _compare(world, model, key, text):
    expected = sorted(
        [(run, user, f'{{"{key}": {text(value)}}}', status) for run, user, value, status, _ in model.sent]
    )
    rows = world.query("SELECT run_id, subject_id, CAST(body AS text), status FROM {our}deliveries")
    assert sorted(rows) == expected
    assert set(world.members(key)) == set(model.held())
    moments = dict(world.query("SELECT run_id, as_of FROM {our}runs"))
    history = world.query('SELECT user_id, value, "from", "to" FROM {our}membership_history')
    shown = text if key == "spend" else lambda _: "true"
    wanted = [
        (user, shown(value), moments[start], moments.get(end)) for user, value, start, end in model.history
    ]
    assert sorted(map(repr, history)) == sorted(map(repr, wanted))
    sizes = world.query("SELECT size, entered, exited FROM {our}snapshots ORDER BY run_id")
    size = 0
    for stored_size, entered, exited in sizes:
        size += entered - exited
        assert stored_size == size
