"""The queue, in which deliveries become accepted, dead or cancelled. Start in `worker.py`."""
