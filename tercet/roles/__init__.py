"""The data path, one file a stop: gateway, router, prefill, decode, aggregated."""
