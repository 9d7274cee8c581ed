"""Write files atomically, and read files of others safely."""
