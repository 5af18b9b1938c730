"""The queue: a delivery becomes accepted, dead or cancelled. Start in `worker.py`."""
