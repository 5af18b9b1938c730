"""Identify, track and group calls: their validation, what they send to Userpilot, and how they are stored.

A call passes through `validation`, `mappings` (with `directives` and `fql`) and `records`, in this order. The first two
do not use the database. Next: queue/deliveries.py, which queues the deliveries.
"""
