"""Caption metrics in plain Python and numpy, equal to the official COCO tools, without Java."""
