"""TFDS builders: the drawn scenes, any folder of captioned images, and the official COCO captions."""
