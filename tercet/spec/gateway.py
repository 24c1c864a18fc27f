"""What a spec says of the gateway: its ports, who may come in, and how much of anything."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from tercet.spec.base import Frozen, Host, Port, Positive, Seconds, Text


class ListenSpec(Frozen):
    host: Host = "127.0.0.1"
    port: Port  # 0: any free one; if only the host is said, 8000 for http and 50051 for grpc


def _port(default: int) -> BeforeValidator:
    """The port of a listener of which only the host is given."""
    return BeforeValidator(lambda given: {"port": default, **given} if isinstance(given, dict) else given)


# A name, or *. and a name for all below it; a port, if it is neither 80 nor 443
Domain = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*(:[0-9]{1,5})?$")]


class GatewayImagesSpec(Frozen):
    # Hosts that images may be fetched from (img.example.com, *.example.com, img.example.com:8080). Empty: none
    allowed_media_domains: list[Domain] = Field(default_factory=list)
    fetch_timeout_s: Seconds = 10.0  # of one image, redirects included
    max_fetch_bytes: Positive = 8 * 1024 * 1024  # of one image
    max_fetches: Positive = 16  # at once; clients take turns
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3  # of one image; each is checked as the first address is
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024  # of images that clients have named by a uuid


class TlsSpec(Frozen):
    """Files in PEM. New ones are read without a restart."""

    certificate: Text  # the gateway's, with those that lead to its authority
    key: Text


class GatewaySpec(Frozen):
    http: Annotated[ListenSpec, _port(8000)] = ListenSpec(port=8000)
    grpc: Annotated[ListenSpec, _port(50051)] = ListenSpec(port=50051)
    # File of keys (`tercet keys add`), for both ports. null: whoever reaches a port may call
    api_keys: Text | None = None
    tls: TlsSpec | None = None  # of both ports
    cors_origins: list[Text] = Field(default_factory=list)  # whose pages may call; "*": any. Empty: none
    images: GatewayImagesSpec = GatewayImagesSpec()


class LimitsSpec(Frozen):
    request_timeout_s: Seconds = 300.0  # the longest deadline that a client may ask for, and the default
    max_inflight_requests: Positive = 256  # a client below its share is let in beyond this, up to twice as many
    max_n: Positive = 16  # choices of a request
    max_chars_per_token: Positive = 16  # of a prompt, times model.max_context; more are refused before they are read
    max_body_bytes: Positive = 4 * 1024 * 1024  # of a request; this and the next six are for HTTP and gRPC together
    max_held_bytes: Positive = 64 * 1024 * 1024  # bodies that come, or wait for their turn; at least one body
    body_grace_s: Seconds = 10.0  # for a body; a second more for each min_body_rate bytes of it that came
    min_body_rate: Positive = 16 * 1024  # bytes/s
    head_timeout_s: Seconds = 10.0  # for a request's head, from its first byte
    idle_timeout_s: Seconds = 75.0  # of a connection between two requests
    max_connections: Positive = (
        2048  # or as many as the process may open files; the longest idle is closed for a new one
    )
    retries: Annotated[int, Field(ge=0, le=10)] = 3  # new plans for a request whose worker died
    worker_wait_s: Seconds = 30.0  # how long a request waits for a role without a live worker (a restart)
    drain_timeout_s: Seconds = 20.0  # what is not done then goes on elsewhere, or ends when the cluster does
