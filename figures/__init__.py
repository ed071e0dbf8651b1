"""What runs left behind, read and drawn: `plots.py` chooses and calls."""
