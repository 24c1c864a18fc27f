"""The KV mover: a protocol without I/O (inbound, outbound), layouts, and one file a transport."""
