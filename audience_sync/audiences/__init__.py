"""From a definition to committed changes. Start in `runs.py`."""
