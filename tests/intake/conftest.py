"""The command line, which takes in files, and applications."""

from tests.acceptance.conftest import forker, start  # noqa: F401  (fixtures)
from tests.web.conftest import make_app  # noqa: F401  (a fixture)
