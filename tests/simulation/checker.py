"""Checks of what must be true after a simulation, from the sandbox's history and log and the database alone.

The rules allow these exceptions:
- a user in a job that Userpilot forgot before it answered the upload, and that ran on, may hold a job's old value;
- a request that arrived after its sender had given up counts in Userpilot's window but not in ours, and
  where the wall clock jumped ahead before a restart, our window is shorter than it should be;
- with at most once, a track whose request may have been applied dies.
"""

import itertools
from collections import Counter, defaultdict

import sqlalchemy as sa

from audience_sync.audiences.definition import Kind
from audience_sync.db import engines, tables
from audience_sync.queue.worker import MAX_IN_FLIGHT

LANE_PATHS = {"/v1/identify": "identify", "/v1/track": "track"}


def check(simulation):
    findings = Findings(simulation)
    findings.check_accounts()
    findings.check_truth()
    findings.check_order()
    findings.check_received()
    findings.check_repeats()
    findings.check_pace()
    findings.check_runs()
    findings.check_tracks()


class Findings:
    def __init__(self, simulation):
        self.simulation = simulation
        self.state = simulation.network.userpilot.state
        with engines.read(simulation.company) as connection:

            def rows(table):
                return list(connection.execute(sa.select(table).order_by(*table.primary_key.columns)))

            self.deliveries, self.requests = rows(tables.deliveries), rows(tables.requests)
            self.jobs, self.runs, self.calls = rows(tables.bulk_jobs), rows(tables.runs), rows(tables.calls)
            self.members, self.definitions = rows(tables.members), rows(tables.definitions)
        self.history = defaultdict(list)  # (user, name): each value and its request's number, in order
        for user, lines in self.state.history.items():
            for name, value, number in lines:
                self.history[user, name].append((value, number))
        self.carried = self._match_requests()  # our request's id: the number of the sandbox's

    def _match_requests(self):
        numbers = {entry.x_request_id: entry.number for entry in self.state.requests}
        uploads = {filename: number for number, filename in self.simulation.network.uploads.items()}
        files = {job.request_id: job.filename for job in self.jobs if job.status == "completed"}
        carried = {}
        for request in self.requests:
            if request.lane == "bulk":
                if request.request_id in files:
                    carried[request.request_id] = uploads.get(files[request.request_id])
            elif request.status_code is not None and request.status_code < 300 and request.error is None:
                carried[request.request_id] = numbers[request.x_request_id]
        return carried

    def check_accounts(self):
        """Each delivery is accepted, or dead or cancelled with a reason; each call is there once."""
        assert Counter(call.message_id for call in self.calls) == Counter(self.simulation.messages)
        for each in self.deliveries:
            assert each.status in {"accepted", "dead", "cancelled"}, each
            assert each.status == "accepted" or each.error, each
            if each.status == "dead":
                self._check_death(each)
        assert all(request.ended_at for request in self.requests)
        assert all(job.settled_at for job in self.jobs)

    def _check_death(self, delivery):
        is_unsure_track = delivery.action == "track" and self.simulation.settings.tracks_at_most_once
        simulated = (
            "HTTP 400 without a message",
            *(["Given up after"] if self.simulation.forward_jumps else []),
            *(["Not repeated"] if is_unsure_track else []),
        )
        is_sick = any(str(value).endswith("sick") for value in delivery.body.values())
        is_given_up = is_sick and delivery.error.endswith("HTTP 500 without a message")
        assert is_given_up or delivery.error.startswith(simulated), delivery

    def check_truth(self):
        """What Userpilot holds is what the table says, for every user and key."""
        for user in sorted(set(self.simulation.users) - self.simulation.excused):
            held = self.state.users.get(user, {"properties": {}})["properties"]
            true = self.simulation.now(user)
            for definition in self.simulation.definitions:
                never = False if definition.kind is Kind.AUDIENCE else None
                value = held.get(definition.key, never)
                assert value == true[definition.key], (
                    user,
                    definition.key,
                    value,
                    self.history[user, definition.key],
                )

    def check_order(self):
        """Values came true in the order of the history, repeats aside; those of calls, by timestamp and arrival."""
        places, accepted = {}, defaultdict(list)
        for each in self.deliveries:
            if each.call_id is not None and each.action == "identify":
                for name, value in each.body.items():
                    place = places[each.subject_id, name, value] = (each.value_at, each.delivery_id)
                    if each.status == "accepted":
                        accepted[each.subject_id, name].append(place)
        for (user, name), lines in sorted(self.history.items()):
            if user in self.simulation.excused:
                continue
            values = [value for value, _ in itertools.groupby(value for value, _ in lines)]
            if name in {"plan", "city"}:
                sent = [places[user, name, value] for value in values]
                assert sent == sorted(sent), (user, name, lines)
                assert sent[-1] >= max(accepted[user, name], default=sent[-1]), (user, name, lines)
            else:
                kind = next(each.kind for each in self.simulation.definitions if each.key == name)
                first = [False] if kind is Kind.AUDIENCE else [None]
                true = iter([*first, *self.simulation.truths[user, name]])
                assert all(any(value == each for each in true) for value in values), (user, name, lines)

    def check_received(self):
        """The request of an accepted delivery carried at least one of its traits, or its event."""
        events = {(event["request"], event["user_id"], event["event_name"]) for event in self.state.events}
        for each in self.deliveries:
            if each.status != "accepted":
                continue
            number = self.carried.get(each.request_id)
            assert number is not None, each
            if each.action == "track":
                assert (number, each.subject_id, each.body["event_name"]) in events, each
            else:
                sent = [
                    (value, number) in self.history[each.subject_id, name]
                    for name, value in each.body.items()
                ]
                assert any(sent), (each, number)

    def check_repeats(self):
        """Nothing is sent twice, except requests that were in flight when something failed."""
        simulation = self.simulation
        known = set(self.carried.values())
        applied = {
            entry.number for entry in self.state.requests if entry.applied and entry.path in LANE_PATHS
        }
        most = simulation.network.unsure_count + simulation.interruption_count * 2 * (MAX_IN_FLIGHT + 1)
        assert len(applied - known) <= most
        accepted = {each.request_id for each in self.deliveries if each.status == "accepted"}
        assert self.carried.keys() <= accepted, "a request that nothing was accepted for"
        sent, asked = Counter(), Counter()
        for (user, name), lines in self.history.items():
            sent[user, name] = sum(number in known for _, number in lines)
        for each in self.deliveries:
            if each.status == "accepted" and each.action == "identify":
                asked.update((each.subject_id, name) for name in each.body)
        assert sent <= asked, sent - asked

    def check_pace(self):
        """Userpilot refused no request because of its rate limits, except those that the simulation refused."""
        network, jumps = self.simulation.network, self.simulation.forward_jumps
        for entry in self.state.requests:
            if entry.status != 429 or entry.number in network.injected:
                continue
            since = entry.monotonic - 130
            before = self.state.requests[: entry.number]
            assert any(since < jump for jump in jumps if jump <= entry.monotonic) or any(
                each.number in network.strays and each.monotonic > since for each in before
            ), (entry.number, entry.path, entry.monotonic)

    def check_runs(self):
        """Members add up from run to run, and a run's deliveries to its changes."""
        counts = Counter(each.run_id for each in self.deliveries)
        for definition in self.definitions:
            last = 0
            for run in self.runs:
                if run.definition_id != definition.definition_id:
                    continue
                assert run.status in {"succeeded", "failed", "abandoned"}, run
                made = counts[run.run_id]
                if run.status != "succeeded":
                    assert made == 0, run
                    continue
                assert run.member_count == last + run.entered_count - run.exited_count, run
                last = run.member_count
                held = run.entered_count + run.changed_count
                # A full run sends nothing about users who left before anything was sent.
                is_right = made >= held if run.mode == "full" else made == held + run.exited_count
                assert is_right, (run, made)
            held = sum(each.definition_id == definition.definition_id for each in self.members)
            assert held == last, (definition.key, held, last)

    def check_tracks(self):
        """A user's events came in order; with at most once, none twice."""
        came = defaultdict(list)
        for event in self.state.events:
            came[event["user_id"]].append(event["event_name"])
        for user, names in came.items():
            asked = [
                each.body["event_name"]
                for each in self.deliveries
                if each.action == "track" and each.subject_id == user
            ]
            first = list(dict.fromkeys(names))
            assert first == [name for name in asked if name in first], (user, names)
            if self.simulation.settings.tracks_at_most_once:
                assert len(names) == len(first), (user, names)
