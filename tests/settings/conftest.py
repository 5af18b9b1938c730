"""Configuration files, loaded or refused."""

import re

import pytest

from audience_sync import settings
from audience_sync.errors import ConfigError

AUDIENCE = "[[audiences]]\nname = 'VIPs'\nsql = 'SELECT user_id FROM vips'\n"
TRAIT = "[[traits]]\nname = 'A'\nsql = 's'\n"
KEY = "[destination]: api_key: expected printable ASCII without spaces or line ends, and not empty"
HASH = "$scrypt$ln=15,r=8,p=3$AAAAAAAAAAAAAAAAAAAAAA$" + "s3cret/A" * 5 + "AAA"  # of nothing
USER = f"[[web.users]]\nname = 'Ann'\npassword = '{HASH}'\nrole = 'read'\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="audience_sync.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def load(write):
    def load(text, environ=None, name="audience_sync.toml"):
        return settings.load(write(text, name), environ or {})

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The error's message without the file at its beginning; it never contains a value."""

    def refused(text, environ=None):
        with pytest.raises(ConfigError) as error:
            load(text, environ)
        path, _, message = str(error.value).partition(": ")
        assert path == str(tmp_path / "audience_sync.toml")
        assert not re.search("s3cret|8675309", message, re.IGNORECASE)
        return message

    return refused
