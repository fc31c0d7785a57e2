"""Measures what the mesh costs and how fast it heals, on this machine, next to the alternatives.

One module per suite (`overhead`, `fault`, `heal`, `controlplane`, `up`, `load`): each sets up what it
compares, takes its figures in turn (A B A B, so that a machine that slows down slows all of them), and gives
back values (`model`). The arithmetic on them (`stats`) is pure. `stage` owns everything that is started, and
removes it whatever happens. The product is used as its users do: real meshes, real control planes, the real
commands.
"""
