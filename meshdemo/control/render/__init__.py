"""The mesh and its intent -> what each sidecar should have, through the templates in `templates/envoy`.

`Renderer` (renderer.py) puts snapshots together from what all sidecars share (outbound.py), what the
instances of one service share (inbound.py), what pods with redirected traffic have besides (redirected.py)
and what the gateway has (edge.py). Which routes there are, and who gets which share, is decided without Envoy
(routes.py, split.py). What was made is remembered (cache.py): a change of one service renders that service's
part alone, and a thousand sidecars share the encoded result. What differs from instance to instance
(addresses, ports) is no text at all: it is filled into a copy of the parsed message.
"""
