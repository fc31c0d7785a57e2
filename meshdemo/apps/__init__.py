"""App definitions as data, and their loader."""
