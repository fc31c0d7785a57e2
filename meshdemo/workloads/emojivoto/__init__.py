"""emojivoto: a small voting app with a bug that the mesh helps to find.

web (HTTP, a page and an API) asks emoji (the catalogue) and voting (the votes) over gRPC; vote-bot votes.
"""
