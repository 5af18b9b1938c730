"""A definition becomes committed changes. Start in runs.py."""
