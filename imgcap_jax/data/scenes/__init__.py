"""Drawn scenes: a world, its language, the truth of captions, and the builder of the dataset."""
