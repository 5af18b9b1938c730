"""Programs beside Python that some tests need."""

import os
import shutil

import pytest


def required(program, advice):
    """Path of a program. Where it is missing, CI fails; at home, where Python alone is enough, the test is skipped."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        wanted = f"{program} is not installed: {advice}"
        pytest.fail(wanted) if os.environ.get("CI") else pytest.skip(wanted)
    return path
