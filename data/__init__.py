"""Data modules, the built-in demo corpus and the demo model."""
