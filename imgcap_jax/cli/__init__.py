"""The ``imgcap`` command."""
