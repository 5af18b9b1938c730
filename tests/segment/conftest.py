"""The command line and the tracking API, for Segment's libraries to send to."""

from tests.acceptance.conftest import forker, start  # noqa: F401  (fixtures)
from tests.intake.conftest import make_app, serving  # noqa: F401  (fixtures)
