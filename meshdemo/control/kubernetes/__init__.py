"""The control plane's side of Kubernetes: who is there, whose token this is, and where things are kept.

A reflector (reflector.py) keeps a copy of the objects of one kind. Pods, EndpointSlices and Services together
are the instances of the mesh (state.py, pure), as source.py puts them together whenever something changes.
tokens.py tells sidecars by their tokens; kept.py and handouts.py write to the cluster.
"""
