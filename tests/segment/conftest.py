"""The command line, for Segment's libraries to send to."""

from tests.acceptance.conftest import forker, start  # noqa: F401  (fixtures)
