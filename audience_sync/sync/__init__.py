"""START HERE: from a definition to deliveries, in `runs.sync`."""
