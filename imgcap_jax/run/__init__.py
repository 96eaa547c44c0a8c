"""What one does with a run: its folder, its features, its captions and their scores."""
