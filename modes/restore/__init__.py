"""The mode "restore"."""
