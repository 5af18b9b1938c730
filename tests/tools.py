"""Programs other than Python that some tests need."""

import os
import shutil

import pytest


def required(program, advice):
    """Path of a program. If it is missing, the test fails in CI and is skipped elsewhere."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        wanted = f"{program} is not installed: {advice}"
        pytest.fail(wanted) if os.environ.get("CI") else pytest.skip(wanted)
    return path
