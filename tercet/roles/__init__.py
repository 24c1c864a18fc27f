"""The data path: gateway, router, and one file per kind of worker: prefill, decode, aggregated."""
