"""emoji: the catalogue, over gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from meshdemo.workloads.emojivoto import rpc
from meshdemo.workloads.emojivoto.catalogue import CATALOGUE
from meshdemo.workloads.emojivoto.rpc import pb


def list_all(_: Any, __: grpc.ServicerContext) -> Any:
    """All emoji, in the order of the catalogue."""
    return pb.ListReply(emoji=[pb.Emoji(shortcode=code, unicode=text) for code, text in CATALOGUE.items()])


def find(request: Any, context: grpc.ServicerContext) -> Any:
    """The emoji of one shortcode; NOT_FOUND where there is none."""
    text = CATALOGUE.get(request.shortcode)
    if text is None:
        context.abort(grpc.StatusCode.NOT_FOUND, f"no emoji {request.shortcode!r}")
    return pb.Emoji(shortcode=request.shortcode, unicode=text)


if __name__ == "__main__":
    rpc.serve("EmojiService", {"List": list_all, "Find": find})
