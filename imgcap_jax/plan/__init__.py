"""What a program costs on a machine that need not be present: compiled, not run."""
