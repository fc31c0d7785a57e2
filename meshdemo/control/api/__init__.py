"""The control plane's HTTP API, for the command line, watch and the dashboard: Flask, on threads.

The application is put together in app.py from views by subject (state, faults, changes, signals), which speak
to the mesh through `Control` (mesh.py) and read their requests with request.py.
"""
