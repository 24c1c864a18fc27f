"""Sockets that carry frames."""
