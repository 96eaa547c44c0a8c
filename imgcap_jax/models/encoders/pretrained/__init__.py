"""Pretrained weights: their sources, the file formats and the tensor names."""
