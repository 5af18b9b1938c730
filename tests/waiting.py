"""Waiting for what other processes and threads do: long enough for a machine that is busy with ten times its work."""

import time

PATIENCE_SECONDS = 180


def until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()
