"""The Valkey that comes along when ``GATEWAY_REDIS_URL`` is unset."""

from gateway.embedded.host import EmbeddedError
from gateway.embedded.server import EmbeddedValkey

__all__ = ["EmbeddedError", "EmbeddedValkey"]
