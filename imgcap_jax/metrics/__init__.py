"""Caption metrics in plain Python and numpy, equal to those of the official COCO tools, without Java."""
