"""Files: written whole or not at all, and read within bounds when they are somebody else's."""
