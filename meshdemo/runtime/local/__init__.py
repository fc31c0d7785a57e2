"""The local runtime: every instance is a process on loopback, kept alive by one supervisor.

`meshdemo up` starts the supervisor (supervisor.py) in the background; it starts the control plane, and for
each instance a workload and its sidecar, and restarts what dies. A guard (guard.py) kills all of it if the
supervisor itself is killed. LocalRuntime (runtime.py) is what commands use; it speaks to the supervisor over
a Unix socket (client.py).
"""
