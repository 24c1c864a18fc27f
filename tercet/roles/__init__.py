"""The data path: gateway, router, and one file per kind of worker: encode, prefill, decode, aggregated. Of a worker of
several ranks: group (rank 0's side), rank (the other processes), joint (the movers of all ranks as one)."""
