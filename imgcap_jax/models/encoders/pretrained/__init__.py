"""Pretrained weights: where they come from, how files are read, how names are mapped."""
