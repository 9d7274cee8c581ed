"""The mode "doctor"."""
