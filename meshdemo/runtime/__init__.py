"""Where instances run: `local` (processes) or `kubernetes` (any cluster)."""
