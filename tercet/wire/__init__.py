"""gRPC: generated stubs, codecs between messages and the types of core.py, and both ends of the worker stream."""
