"""An OpenAI-compatible server and a page, around one engine. Needs the extra `serve`."""

from hermes_async.server.app import create_app
from hermes_async.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
