"""Chromium and `serve`, in separate processes."""

import contextlib
import os
import re
import subprocess
import sys

from playwright.sync_api import sync_playwright

from tests.acceptance.conftest import clean

ARGUMENTS = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)


@contextlib.contextmanager
def chromium(executable):
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*ARGUMENTS.split(), *root])
        yield browser
        browser.close()


@contextlib.contextmanager
def served(configuration):
    command = [sys.executable, "-m", "audience_sync", "--config", str(configuration), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean()) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        finally:
            process.kill()
