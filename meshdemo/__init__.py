"""meshdemo: bring up a small but real service mesh, break it on purpose, see it and heal it."""

__version__ = "0.1.0"
