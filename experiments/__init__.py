"""Experiments that come with the package: one file an experiment."""
