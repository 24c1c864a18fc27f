"""What `make demo` does once the cluster is ready: one question over HTTP, its answer as it comes, one table."""

from __future__ import annotations
