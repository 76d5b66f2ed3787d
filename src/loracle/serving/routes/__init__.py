"""The HTTP routes: one file for each API. To add a route, write it and its request and answer models in one of them."""

from __future__ import annotations

from loracle.serving.routes import native, pages, vllm

ROUTERS = (native.router, vllm.router, pages.router)
