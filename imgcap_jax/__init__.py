"""Image captioning in JAX, from the first pixel to the published score."""
