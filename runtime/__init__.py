"""What happens while a run is on: programs, loops, the workdir, progress."""
