"""Studies: ablations that `imgcap ablate NAME` runs."""
