"""Long tests, and those that need root or strace: `make soak`. Their fixtures are those of the other tests."""

import itertools
import shutil

import pytest

pytest_plugins = ["tests.conftest", "tests.acceptance.conftest"]


@pytest.fixture
def fresh_url(tmp_path, request):
    """Makes the URLs of migrated databases."""
    numbers = itertools.count()

    def make(backend):
        if backend == "postgresql":
            server = request.getfixturevalue("postgres")
            return server.url(server.create(request.getfixturevalue("_postgres_template")))
        path = tmp_path / f"{next(numbers)}.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        return f"sqlite:///{path}"

    return make
