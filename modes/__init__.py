"""One file or package for each --mode."""
