"""audience-sync keeps audiences computed in a database true in Userpilot."""

__version__ = "0.1.0"
