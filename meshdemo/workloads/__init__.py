"""The programs that run inside the mesh. They import nothing of the rest of meshdemo.

Each is started with `python -m meshdemo.workloads.<program>` and is told everything by its environment, so
that it runs the same as a local process and in an image that holds nothing but itself.
"""
