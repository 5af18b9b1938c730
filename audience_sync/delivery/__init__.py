"""From the queue to Userpilot: `worker.deliver` claims, merges, paces, sends and settles."""
