"""watch: judge -> localise -> choose -> act -> verify, with guardrails and a journal.

The core (`stats`, `judge`, `localise`, `choose`, `guardrails`, `core`, `canary`) is pure: signals and a clock
in, decisions out. `controller` and `remedies` are its edge, the only places with I/O.
"""
