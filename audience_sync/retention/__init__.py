"""Pruning and erasure: the only modules that delete rows of other packages."""
