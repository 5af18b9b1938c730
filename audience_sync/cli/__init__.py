"""The command line: start in main.py, which lists the commands."""

from audience_sync.cli.main import main

__all__ = ["main"]
