"""The mode "eval"."""
