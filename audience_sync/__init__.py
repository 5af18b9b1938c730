"""audience-sync computes audiences in a database and keeps them up to date in Userpilot."""

__version__ = "0.1.0"
