"""The training loop and how its programs start."""
