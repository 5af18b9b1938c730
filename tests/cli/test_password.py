"""`password`: the hash of a password, from a line or from a terminal."""

import fcntl
import os
import re
import subprocess
import sys
import termios

import pytest

from audience_sync.settings import passwords

PROGRAM = [sys.executable, "-m", "audience_sync", "password"]


def typed(*lines):
    """Run the command on a new terminal, on which a person types; return its exit code and all it shows."""
    ours, theirs = os.openpty()
    shown = b""
    with subprocess.Popen(
        PROGRAM,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (getpass opens it)
    ) as process:
        os.close(theirs)
        for prompt, line in zip((b"Password: ", b"Repeat the password: "), lines, strict=False):
            while not shown.endswith(prompt):
                shown += os.read(ours, 1000)
            os.write(ours, line.encode())
        try:
            while more := os.read(ours, 1000):
                shown += more
        except OSError:  # the terminal is closed
            pass
    os.close(ours)
    return process.returncode, shown.decode().replace("\r\n", "\n")


def given(line):
    done = subprocess.run(PROGRAM, input=line, capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_line_of_standard_input_is_hashed():
    code, hashed, said = given("pässword of a line\r\nanother line\n".encode())
    assert (code, said) == (0, "")
    assert re.fullmatch(passwords.PATTERN + "\n", hashed)
    assert passwords.is_password("pässword of a line", hashed.strip())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"too short\n", "The password is too short: use at least 10 characters."),
        (b"", "The password is too short: use at least 10 characters."),
        (b"\xff\xfe\xfd long enough\n", "The password is not UTF-8."),
    ],
)
def test_a_password_that_cannot_be_used_is_refused(line, message):
    assert given(line) == (2, "", f"audience-sync: {message}\n")


def test_a_terminal_asks_twice_and_shows_no_password():
    code, shown = typed("a good password\n", "a good password\n")
    assert code == 0
    assert re.fullmatch(rf"Password: \nRepeat the password: \n{passwords.PATTERN}\n", shown)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("a good password\n", "another password\n"),
            "The passwords differ. Run `audience-sync password` again.",
        ),
        (("\x04",), "No password was given."),
    ],
)
def test_a_terminal_may_close_or_give_two_different_passwords(lines, message):
    code, shown = typed(*lines)
    assert code != 0
    assert shown.endswith(f"audience-sync: {message}\n")
    assert "Traceback" not in shown
