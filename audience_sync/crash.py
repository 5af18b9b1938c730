"""Named points at which a test can kill this process, to show that nothing is lost.

AUDIENCE_SYNC_CRASH_AT=NAME kills it at that point, NAME:3 at the third time. Otherwise a point costs one comparison.
"""

import os
import signal

_name, _, _count = os.environ.get("AUDIENCE_SYNC_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def at(name: str) -> None:
    global _left  # noqa: PLW0603  (one countdown for the process)
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
