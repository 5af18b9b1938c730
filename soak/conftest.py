"""Long tests, and tests that need root or strace (`make soak`), with the fixtures of the other tests."""

import itertools
import shutil

import pytest

pytest_plugins = ["tests.conftest", "tests.acceptance.conftest"]


@pytest.fixture
def fresh_url(tmp_path, request):
    """fresh_url(backend) creates a migrated database and returns its URL."""
    numbers = itertools.count()

    def make(backend):
        if backend == "postgresql":
            server = request.getfixturevalue("postgres")
            return server.url(server.create(request.getfixturevalue("_postgres_template")))
        path = tmp_path / f"{next(numbers)}.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        return f"sqlite:///{path}"

    return make
