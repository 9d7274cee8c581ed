"""Readers of files under inputs that were changed at random; see docs/security.md."""
