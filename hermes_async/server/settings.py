"""What an operator can set for the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hermes_async.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Options of the server.

    Attributes:
        served_model_name: The model's name in requests and answers. None takes the hub's id, or the folder's name.
        api_key: The key that every route but `/health` asks for. None asks for none.
        allowed_hosts: The values of the `Host` header that are answered, without ports; None answers all. It protects a
            server without a key from web pages in a browser on the same machine (DNS rebinding).
        request_timeout_s: Seconds after which a request ends with an error. None sets no limit.
        keep_alive_s: Seconds without data after which a stream sends a comment line.
        send_timeout_s: Seconds that a client may take to read one event, before its request is ended.
        default_max_tokens: The most tokens of a chat answer, if the request does not say. Where there is less KV memory
            than that takes, the answer gets what there is.
        from_model: Sampling values that a request leaves out are those of the checkpoint's `generation_config.json`.
        max_body_bytes: The largest request body.
        max_choices: The most answers of one request: `n` times the number of prompts.
        page: Serves the page at `/`.

    Raises:
        ConfigError: A value is out of its range; the message names it.
    """

    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    request_timeout_s: float | None = None
    keep_alive_s: float = 10.0
    send_timeout_s: float = 60.0
    default_max_tokens: int = 1024
    from_model: bool = False
    max_body_bytes: int = 4 * 1024**2
    max_choices: int = 64
    page: bool = True

    def __post_init__(self) -> None:
        if self.served_model_name is not None and not (
            isinstance(self.served_model_name, str) and self.served_model_name
        ):
            raise ConfigError("served_model_name must be a text that is not empty, or None")
        if self.api_key is not None and not (isinstance(self.api_key, str) and self.api_key.isascii() and self.api_key):
            raise ConfigError("api_key must be a text of ASCII characters that is not empty")
        for name in ("request_timeout_s", "keep_alive_s", "send_timeout_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
        for name in ("default_max_tokens", "max_body_bytes", "max_choices"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an int of at least 1, not {value!r}")
