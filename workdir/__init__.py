"""The folder of a run: its layout, checkpoints, results that resume, locks, log and progress."""
