"""The search for subjects that are due in one queue (an action and a class), some rows at a time.

A walk reads the queue in the order in which its deliveries became due, and remembers its position, so that it need not
read deliveries that cannot be sent now again and again. It skips deliveries whose subject is busy:

- If the subject has a request in flight, the walk notes it in `passed` and returns to it after the answer. While other
  subjects wait, each passed subject gets a twentieth of the lane, and all of them together at most half of it.
- A subject that waits for any other reason is found by the next pass: from time to time, a search reads the part of the
  queue before its position again.

Each search reads a limited number of rows of both parts. All state is only a hint: deliveries.py checks what is claimed.
"""

import datetime as dt
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync.queue import due
from audience_sync.queue.due import START, DueSubject, Position

TURNS_PER_PASSED = 20  # while others wait, a passed subject gets one of this many turns of the lane
MAX_PASSED = 10_000  # further subjects are found by the next pass
PASS_ROWS = 1_000  # a pass that reads more than this makes the next pass begin later, in proportion
DENSE_ROWS = 10  # rows for each subject of a step, from which the next step reads more rows


@dataclass(slots=True)
class Walk:
    """A walk through a queue. `front`: the position of the current pass. `tail`: where unread deliveries begin.

    Between passes they are equal.
    """

    action: str
    delivery_class: str
    fingerprint: str | None = None
    front: Position = START
    tail: Position = START
    passed: dict[str, None] = field(default_factory=dict)
    is_at_end: bool = False
    searched_at: dt.datetime = START[0]
    quiet_until: dt.datetime | None = None  # the first moment at which a subject's grace ends
    has_skipped: bool = False  # the current pass left out a subject that an answer may make due
    _answer_count: int = -1  # the number of answers when the current pass began
    _began_at: float = -math.inf  # when the latest pass began
    _pass_rows: int = 0  # rows read since then
    _others_count: int = 0  # other subjects that got a turn since a passed subject did
    _rows_left: dict[bool, int] = field(
        default_factory=dict
    )  # for this search: True in the pass, False beyond
    _step_rows: int = due.FIRST_STEP_ROWS
    _seen: set[str] = field(default_factory=set)  # subjects returned in this search

    def begin(self, monotonic: float, pass_seconds: float, answer_count: int) -> None:
        """Begin a search. A short pass begins after `pass_seconds`, a longer one after a longer time."""
        is_reading_on = self._rows_left.get(False, 1) <= 0  # the last search did not reach the end
        self._rows_left = {True: due.MAX_ROWS_READ, False: due.MAX_ROWS_READ}
        self._seen, self.is_at_end = set(), False
        seconds = pass_seconds * max(1.0, self._pass_rows / PASS_ROWS)
        if self.front == self.tail and monotonic >= self._began_at + seconds and not is_reading_on:
            self.front, self._pass_rows, self.quiet_until, self.has_skipped = START, 0, None, False
            self._answer_count, self._began_at = answer_count, monotonic

    def begin_pass(self) -> None:
        """Make the next search begin a pass."""
        self._began_at = -math.inf

    def is_search_over(self, in_flight: Collection[str]) -> bool:
        """Return whether the last search found everything that may be sent now."""
        return self.is_at_end and self.passed.keys() <= set(in_flight)

    def is_over(self, answer_count: int) -> bool:
        """Return whether nothing is left to send and, if a subject was skipped, no answer has arrived since."""
        is_passed = self.front == self.tail and not (self.has_skipped and self.is_older_than(answer_count))
        return is_passed and self.is_search_over(())

    def is_older_than(self, answer_count: int) -> bool:
        """Return whether an answer has arrived since the last pass began."""
        return self._answer_count != answer_count

    def next_subjects(
        self, connection: sa.Connection, now: dt.datetime, room: int, in_flight: Collection[str]
    ) -> list[DueSubject]:
        """Return the next subjects to send to, at most `room`; none if this search is over."""
        subjects: list[DueSubject] = []
        self.searched_at = now
        if self._others_count >= max(1, TURNS_PER_PASSED // max(1, len(self.passed)) - 1):
            self._add_passed(subjects, 1, in_flight)
        while len(subjects) < room and (position := self._position()) is not None:
            self._step(connection, now, position, subjects, room, in_flight)
        self._add_passed(subjects, room - len(subjects), in_flight)
        return subjects

    def _position(self) -> Position | None:
        """Return the position from which to continue; None if this search is over."""
        if self.front < self.tail and self._rows_left[True] > 0:
            return self.front
        return self.tail if self._rows_left[False] > 0 and not self.is_at_end else None

    def _step(
        self,
        connection: sa.Connection,
        now: dt.datetime,
        position: Position,
        subjects: list[DueSubject],
        room: int,
        in_flight: Collection[str],
    ) -> None:
        stretch = due.read_stretch(
            connection, self.action, self.delivery_class, now, position, self._step_rows, self.fingerprint
        )
        end, is_last = stretch.end, stretch.is_last
        for subject in stretch.subjects:
            if not self._is_free(subject, in_flight):
                self.has_skipped = True
                continue
            if len(subjects) == room:
                end, is_last = max(position, subject.first), False
                break
            self._seen.add(subject.subject_id)
            self._others_count += 1
            subjects.append(subject)
        is_dense = stretch.row_count >= DENSE_ROWS * len(stretch.subjects)
        self._step_rows = min(4 * self._step_rows, due.STEP_ROWS) if is_dense else due.FIRST_STEP_ROWS
        cost = max(1, stretch.row_count + DENSE_ROWS * len(stretch.subjects))
        self._move(position, end, stretch.row_count, cost, is_last=is_last)

    def _is_free(self, subject: DueSubject, in_flight: Collection[str]) -> bool:
        subject_id = subject.subject_id
        if subject_id in in_flight:
            self.put_back(subject_id)
        elif subject.quiet_until is not None:
            self.quiet_until = min(self.quiet_until or subject.quiet_until, subject.quiet_until)
        is_busy = subject_id in in_flight or subject.is_sending or subject.quiet_until is not None
        return not is_busy and subject_id not in self.passed and subject_id not in self._seen

    def _move(self, position: Position, end: Position, row_count: int, cost: int, *, is_last: bool) -> None:
        is_pass = self.front < self.tail
        self._rows_left[is_pass and position == self.front] -= cost
        self._pass_rows += row_count
        self.is_at_end = is_last
        if is_pass and position == self.front:
            self.front = self.tail if is_last else end
            self.tail = max(self.front, self.tail)
        else:
            self.front, self.tail = (self.front if is_pass else end), end

    def _add_passed(self, subjects: list[DueSubject], count: int, in_flight: Collection[str]) -> None:
        """Add passed subjects that are not in flight, those that have waited longest first."""
        free = (subject for subject in self.passed if subject not in in_flight and subject not in self._seen)
        for subject_id in [subject for subject, _ in zip(free, range(count))]:  # noqa: B905  (`count` at most)
            del self.passed[subject_id]
            self._seen.add(subject_id)
            self._others_count = 0
            subjects.append(DueSubject(subject_id, START, due.MAX_ROWS_READ, True, False, None))

    def put_back(self, subject_id: str) -> None:
        """Note a subject that has more deliveries than can be sent now."""
        self.has_skipped = True
        if len(self.passed) < MAX_PASSED:
            self.passed.setdefault(subject_id)
