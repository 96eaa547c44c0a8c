"""Image captioning in JAX, from the first pixel to the published score."""

__version__ = "0.1.0"
