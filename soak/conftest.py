"""Long tests, and those that need root or strace: `make soak`. Their fixtures are those of the other tests."""

pytest_plugins = ["tests.conftest", "tests.acceptance.conftest"]
