"""Both ends of the KV mover: the protocol's state machines, run by threads over links and transports."""
