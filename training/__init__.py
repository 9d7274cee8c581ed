"""The training loop, what it trains, and what happens when it diverges."""
