"""The KV mover: how a block of KV gets from a prefill worker's cache into a decode worker's.

    prefill engine     sender, outbound                   receiver, inbound      decode engine
          │                   │                                   │ <───admit(blocks)─── │  blocks are leased
          │ ───────open─────> │ ───────────OFFER(units)─────────> │                      │
          │ <─────Granted──── │ <───GRANT(first unit, blocks)──── │                      │
     a layer is computed      │                                   │                      │
          │ ───push(layer)──> │ loader: a parcel of the block,    │                      │
          │                   │ with its digests; outlet:         │                      │
          │                   │ ──────────DATA, bytes───────────> │ inlet and lander:    │
          │                   │                                   │ placed, verified     │
          │                   │ <──RESEND, if a digest is wrong── │                      │
          │ ──finish(note)──> │ when the last write has ended:    │                      │
          │                   │ ──────WRITTEN(bytes, note)──────> │ ───────Noted───────> │  first token out
          │                   │                                   │ ─────Complete──────> │  blocks are owned
          │ <Released,OpDone─ │ <────────────RELEASE───────────── │                      │
     source blocks free

A ticket may have several sources and several destinations, each with a part of the layers and heads: then every part
has an exchange of its own, and both engines hear of one.

Floors, enforced by import-linter; each imports only those below it in this list:

    mover       both ends, with their threads: sender and receiver, dialer and acceptor, loader and lander
    transports  what a way to move bytes must do (contract.py), and one file each
    links       sockets that carry frames
    protocol    the messages and the two state machines (outbound, inbound): no I/O, no thread, no clock
    memory      layouts, the region that holds a cache, gathering and digesting
"""
