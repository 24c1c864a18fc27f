"""gRPC: generated stubs, codecs between messages and nouns, and both ends of the worker stream."""
