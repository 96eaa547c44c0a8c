"""The page of ``imgcap report``: curves, scores and captions of runs."""
