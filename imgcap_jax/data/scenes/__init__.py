"""The built-in dataset of drawn scenes: the scenes, their caption grammar, truth scores, and the TFDS builder."""
