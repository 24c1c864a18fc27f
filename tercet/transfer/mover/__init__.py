"""Both ends of the KV mover: the protocol's machines, run by threads over links and transports."""
