"""Definitions, and the runs that turn them into committed changes. Start in runs.py."""
