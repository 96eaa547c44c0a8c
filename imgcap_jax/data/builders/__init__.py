"""TFDS builders: the common base, folders of captioned images, and the official COCO captions."""
