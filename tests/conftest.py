"""What holds for all tests."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# A loaded machine is slow: no example fails for that. (With CI=true, hypothesis has a profile that says so, and
# the same examples each time.)
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if "CI" not in os.environ:
    settings.load_profile("any machine")

# Whoever starts the tests in a script's background has Ctrl-C ignored, and so would all that they start: tests
# that end a command as a user does would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
