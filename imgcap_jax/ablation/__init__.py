"""Runs studies: trains their runs, evaluates them, and writes the table of differences."""
