"""What a configuration builds, and the compiled programs made of it."""
