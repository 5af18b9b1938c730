"""A fast start of the command line for the tests of its output."""

from tests.acceptance.conftest import forker  # noqa: F401  (a fixture)
