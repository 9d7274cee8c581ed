"""The noise-conditional classifier: its loss, training, accuracy, and guidance by its gradient."""
