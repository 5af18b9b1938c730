"""Interpret the answers about bulk jobs, as outcomes.py does for the live lanes, without the database.

| event | the job's users |
| --- | --- |
| completed | are accepted |
| failed, or completed with rows missing | are sent by the live lane, which gets an answer for each |
| refused (400, 422), or too large (413) | are queued again; the next job has half as many rows; a single row is sent live |
| 409: another job is running | are queued again; nothing is uploaded until the list of jobs shows none running |
| 429, 5xx, no connection, no such endpoint | are queued again; the lane pauses, each time twice as long |
| no answer to the upload | wait: the job is looked up by its file name; if none is running, the live lane sends them |
| unknown state, no end, or 404 | wait; after a long time without progress the live lane sends them |

If a job were given up while it still runs, it would overwrite newer values. So its users wait until it must have ended:
for half an hour, or four times as long as its rows take. After a poll that is answered with 404, the list of jobs is
read. Jobs of other clients block ours until the list shows none running, but for half an hour at most. Then we try an
upload, because a job in an unknown state may have ended.
"""

import datetime as dt
import logging
from dataclasses import dataclass

from audience_sync import logs
from audience_sync.clock import Clock
from audience_sync.queue.jobs import BulkJob, JobRequest, JobStatus, parse_job, parse_jobs
from audience_sync.queue.pace import LONGEST_PAUSE_SECONDS, BulkPace
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

FOREIGN_JOB_POLL_SECONDS = 15.0
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 30.0
STALLED_JOB_SECONDS = 1800.0  # without progress; longer for large jobs
MEASURED_ROWS = 1_000  # smaller jobs are not measured, because overhead dominates
_NO_ENDPOINT = {404, 405, 501}
_NOT_ALLOWED = {401, 403}  # although the key is valid


@dataclass(frozen=True, slots=True)
class JobAnswers:
    """Update a job and the lane's pace from answers. An upload without an answer may still arrive within `grace`."""

    pace: BulkPace
    clock: Clock
    grace: dt.timedelta

    def read(self, request: JobRequest, job: BulkJob, answer: Answer) -> None:
        match request.kind:
            case "upload":
                job.upload = answer
                self._read_upload(job, answer)
            case "poll":
                self._read_poll(job, answer)
            case "list":
                self._read_list(job, answer)

    def _read_upload(self, job: BulkJob, answer: Answer) -> None:
        error, status = answer.error or "no answer", parse_job(answer.document)
        match answer.outcome:
            case Outcome.ACCEPTED if status.job_id:
                self.pace.accepted()
                self._update_status(job, status.job_id, status)
            case Outcome.ACCEPTED | Outcome.UNKNOWN:
                job.error = answer.error or "Userpilot accepted the upload but returned no job id"
                job.poll_at = self.clock.monotonic() + self.grace.total_seconds()  # it may still arrive
            case Outcome.REFUSED if answer.status_code == 409:
                job.end("dropped", error)
                self._wait_for_foreign_job(f"Another bulk job is running: {error}")
            case Outcome.REFUSED if answer.status_code not in _NO_ENDPOINT:
                self._refused(job, answer, error)
            case Outcome.FAILED if answer.status_code in _NOT_ALLOWED and answer.is_evidence:
                self._refused(job, answer, error)
            case outcome:
                job.end("dropped", error)
                if outcome is not Outcome.UNAUTHORISED:
                    self._pause(error, answer.retry_after_seconds)

    def _refused(self, job: BulkJob, answer: Answer, error: str) -> None:
        """Halve the next job, until the refused row is alone; the live lane then sends it and gets its answer."""
        job.end("failed" if job.row_count == 1 else "dropped", error)
        logs.event(log, logging.WARNING, "bulk job refused", rows=job.row_count)
        if self.pace.refused(job.row_count, is_too_large=answer.status_code == 413):
            self._pause(error)

    def _read_poll(self, job: BulkJob, answer: Answer) -> None:
        monotonic = self.clock.monotonic()
        if answer.outcome is Outcome.ACCEPTED and isinstance(answer.document, dict):
            self._update_status(job, job.job_id or "", parse_job(answer.document))
        elif answer.status_code == 404 and answer.is_evidence:
            job.is_missing, job.poll_at = True, monotonic  # the list may show it
        else:
            wait = answer.retry_after_seconds or 2 * max(self._poll_seconds(job), 1.0)
            job.poll_at = monotonic + min(wait, LONGEST_PAUSE_SECONDS)

    def _read_list(self, job: BulkJob, answer: Answer) -> None:
        """Find the job of an upload that was not answered, or one that a poll did not find."""
        wait = max(FOREIGN_JOB_POLL_SECONDS, answer.retry_after_seconds or 0.0)
        job.poll_at = self.clock.monotonic() + wait
        was_missing, job.is_missing = job.is_missing, False  # a missing job is polled next
        listed = parse_jobs(answer)
        if listed is None:
            return
        ours = next((status for status in listed if status.is_of(job.job_id, job.filename)), None)
        if ours is not None and ours.job_id and was_missing:
            self._update_status(job, ours.job_id, ours)
            job.poll_at = max(job.poll_at, self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS)
        elif ours is not None and ours.job_id:
            self._update_status(job, ours.job_id, JobStatus())  # the list has no counts of rows
            job.poll_at = self.clock.monotonic()
        elif job.job_id is None and not any(status.is_running for status in listed):
            job.end("lost", job.error or "The process ended before the answer came")

    def read_list_of_others(self, answer: Answer) -> None:
        listed, monotonic = parse_jobs(answer), self.clock.monotonic()
        if listed is None:
            self.pace.is_foreign_job_running = False  # the next upload shows whether one is running
            self._pause(answer.error or "the list of jobs cannot be read", answer.retry_after_seconds)
        elif any(status.is_running for status in listed) and not self.pace.has_waited_for_long(monotonic):
            self.pace.wait_for_foreign_job(monotonic + FOREIGN_JOB_POLL_SECONDS, self.pace.reason)
        else:
            self.pace.is_foreign_job_running, self.pace.reason = False, ""

    def _update_status(self, job: BulkJob, job_id: str, status: JobStatus) -> None:
        """Update a job from Userpilot's description; values that are missing from it do not change."""
        completed = job.completed_count if status.completed_rows is None else status.completed_rows
        if (status.state, completed, job_id) != (job.state, job.completed_count, job.job_id):
            job.moved_at = self.clock.monotonic()
        job.status, job.job_id, job.state, job.completed_count = "running", job_id, status.state, completed
        job.error, job.is_missing = None, False
        job.poll_at = self.clock.monotonic() + self._poll_seconds(job)
        if status.state == "completed":
            self._completed(job, status)
        elif status.state == "failed":
            job.end("failed", "Userpilot's bulk job failed")
            self._pause("a bulk job failed")
        if job.is_over:
            logs.event(
                log,
                logging.INFO if job.is_completed else logging.WARNING,
                f"bulk job {job.status}",
                rows=job.row_count,
                request_id=job.request_id,
                seconds=round(self.clock.monotonic() - job.submitted_at, 1),
            )

    def _completed(self, job: BulkJob, status: JobStatus) -> None:
        counts = [count for count in (status.total_rows, status.completed_rows) if count is not None]
        least = min(counts, default=job.row_count)
        if least < job.row_count:
            job.end("failed", f"Userpilot's bulk job completed {least} of {job.row_count} rows")
            self._pause("a bulk job completed with rows missing")
            return
        job.end("completed")
        self.pace.completed()
        if job.row_count >= MEASURED_ROWS:
            self.pace.measured(job.row_count / max(0.001, self.clock.monotonic() - job.submitted_at))

    def give_up_stalled(self, job: BulkJob) -> None:
        """End a job that has shown no progress for too long."""
        patience = max(STALLED_JOB_SECONDS, 4 * job.row_count / self.pace.rows_per_second)
        if self.clock.monotonic() - job.moved_at > patience:
            job.end("lost", f"Given up: the bulk job showed no progress for {round(patience / 60)} minutes")
            self._wait_for_foreign_job("a bulk job that was given up may still run")

    def _poll_seconds(self, job: BulkJob) -> float:
        """Return the seconds until the next poll: fewer near the expected end."""
        left = job.ends_at(self.pace.rows_per_second) - self.clock.monotonic()
        return min(LONGEST_POLL_SECONDS, max(SHORTEST_POLL_SECONDS, left / 2 if left > 0 else -left / 20))

    def _wait_for_foreign_job(self, reason: str) -> None:
        monotonic = self.clock.monotonic()
        self.pace.foreign_job_since = monotonic
        self.pace.wait_for_foreign_job(monotonic + FOREIGN_JOB_POLL_SECONDS, reason)
        logs.event(log, logging.WARNING, "bulk lane waits for another job")

    def _pause(self, reason: str, seconds: float | None = None) -> None:
        seconds = self.pace.pause(self.clock.monotonic(), reason, seconds)
        logs.event(log, logging.WARNING, "bulk lane pauses", seconds=seconds)
