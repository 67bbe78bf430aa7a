"""`hermes-async serve`: an OpenAI-compatible server and a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hermes_async.cli import options
from hermes_async.cli.progress import with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.errors import ConfigError
from hermes_async.storage.file_kinds import exists
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async.server import ServerSettings

_ENVIRONMENT = "HERMES_ASYNC_"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's directory, a GGUF file, or an id on the Hugging Face hub.",
            envvar=f"{_ENVIRONMENT}MODEL",
            show_default=False,
        ),
    ],
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            envvar=f"{_ENVIRONMENT}MEMORY",
            help="The budget for weights, buffers, KV caches and workspace: 3GiB, 512MiB, or auto.",
        ),
    ] = "auto",
    host: Annotated[
        str,
        typer.Option(
            envvar=f"{_ENVIRONMENT}HOST",
            help="The address to listen on. One that other machines reach needs --api-key or --no-auth.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(envvar=f"{_ENVIRONMENT}PORT", min=0, max=65535, help="The port to listen on; 0 takes a free one."),
    ] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}UDS",
            metavar="FILE",
            help="Listen on this Unix domain socket instead.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}API_KEY",
            help="The key that clients must send. Others on this machine can see it here; the variable is safer.",
            show_default=False,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            envvar=f"{_ENVIRONMENT}NO_AUTH",
            help="Answer everybody who reaches the address, without a key.",
        ),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}ALLOWED_HOST",
            metavar="NAME",
            help="A host name in clients' addresses that is answered; may be given more than once. By default all are, "
            "but only this machine's own on a loopback address without a key.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}SERVED_MODEL_NAME",
            metavar="NAME",
            help="The model's name for clients; by default, that of the hub or of the folder.",
            show_default=False,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            envvar=f"{_ENVIRONMENT}MAX_WAITING", min=0, help="The most requests that may wait; one more is refused."
        ),
    ] = 1024,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}REQUEST_TIMEOUT",
            metavar="SECONDS",
            help="The longest that a request may take; by default, there is no limit.",
            show_default=False,
        ),
    ] = None,
    read_timeout: Annotated[
        float | None,
        typer.Option(
            envvar=f"{_ENVIRONMENT}READ_TIMEOUT",
            metavar="SECONDS",
            help="The longest that a read of weights may take, before the requests that wait for it get an error; by "
            "default, there is no limit.",
            show_default=False,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            envvar=f"{_ENVIRONMENT}SHUTDOWN_TIMEOUT",
            metavar="SECONDS",
            min=0,
            help="How long running requests may go on after SIGTERM or Ctrl-C.",
        ),
    ] = 30.0,
    default_max_tokens: Annotated[
        int,
        typer.Option(
            envvar=f"{_ENVIRONMENT}DEFAULT_MAX_TOKENS",
            min=1,
            help="The most tokens of a chat answer, if the request does not say.",
        ),
    ] = 1024,
    from_model: Annotated[
        bool,
        typer.Option(
            "--from-model",
            envvar=f"{_ENVIRONMENT}FROM_MODEL",
            help="Sample as the checkpoint's generation_config.json says, where a request does not say.",
        ),
    ] = False,
    root_path: Annotated[
        str,
        typer.Option(
            envvar=f"{_ENVIRONMENT}ROOT_PATH",
            metavar="PATH",
            help="The path below which a proxy serves this server, such as /llm.",
        ),
    ] = "",
    page: Annotated[
        bool, typer.Option("--page/--no-page", envvar=f"{_ENVIRONMENT}PAGE", help="Serve the page at /.")
    ] = True,
    draft_model: options.DraftModel = None,
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    kernels: options.Kernels = "auto",
    dtype: options.Dtype = "auto",
    lock_memory: options.LockMemory = "auto",
    context_length: options.ContextLength = None,
    trace: options.Trace = None,
    log_level: options.LogLevel = "info",
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API, a page that shows the engine at work, and metrics."""
    with errors_in_one_line():
        try:
            from hermes_async.cli.server_process import serve_until_stopped
            from hermes_async.server import ServerSettings
        except ImportError as error:
            raise ConfigError(f"serve needs more packages: pip install 'hermes_async[serve]' ({error})") from error
        is_local = uds is not None or host in _LOOPBACK
        if not is_local and api_key is None and not no_auth:
            raise ConfigError(
                f"other machines can reach {host}: give --api-key (or {_ENVIRONMENT}API_KEY), or --no-auth to answer "
                "everybody"
            )
        hosts = tuple(allowed_host) if allowed_host else None
        if hosts is None and is_local and uds is None and api_key is None and not no_auth:
            hosts = _LOOPBACK_HOSTS
        settings = ServerSettings(
            served_model_name=served_model_name,
            api_key=api_key,
            allowed_hosts=hosts,
            request_timeout_s=request_timeout,
            default_max_tokens=default_max_tokens,
            from_model=from_model,
            page=page,
        )
        config = options.engine_config(
            loading_agents,
            max_resident_layers,
            kernels=kernels,
            dtype=dtype,
            lock_memory=lock_memory,
            context_length=context_length,
            max_waiting=max_waiting,
            read_timeout=read_timeout,
        )
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))
        draft = None if draft_model is None else find_checkpoint(draft_model, HubOptions(None, token, cache_dir))

        async def work(interrupts: Interrupts) -> None:
            from hermes_async import Engine
            from hermes_async.server import create_app

            engine = Engine(path, memory_budget=memory, config=config, draft_model=draft, trace=trace)
            app = create_app(engine, _named(settings, model, path))
            serving = serve_until_stopped(
                app,
                interrupts,
                host=host,
                port=port,
                uds=uds,
                root_path=root_path,
                shutdown_timeout_s=shutdown_timeout,
                started=lambda address: print(f"hermes-async: listening on {address}", file=sys.stderr, flush=True),
            )
            await with_progress(engine, lambda _: serving)

        run(work)


def _named(settings: ServerSettings, model: str, path: Path) -> ServerSettings:
    """The settings with a name for the model: the hub's id, or the name of the folder or file."""
    from dataclasses import replace

    if settings.served_model_name is not None:
        return settings
    name = model if not exists(Path(model)) else path.name
    return replace(settings, served_model_name=name)
