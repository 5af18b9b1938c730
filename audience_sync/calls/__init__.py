"""Identify, track and group calls: what makes one valid, what it sends to Userpilot, and how it is stored.

A call passes through `validation`, `mappings` (with `directives` and `fql`) and `records`, in this order. Only
`records` uses the database; it queues the deliveries by `queue.deliveries`.
"""
