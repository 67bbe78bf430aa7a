"""Replicas on Ray Serve: an engine on each node of a cluster, behind one address. Needs the extra `ray`.

    serve run hermes_async.integrations.ray_serve:build_app model=MODEL num_replicas=3

Each replica runs the application of `hermes-async serve` around an engine of its own. Ray Serve starts and replaces
replicas, and sends each request to one that has few.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Self

import anyio
import ray
from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, BackpressureConfig

from hermes_async import Chunk, Engine, EngineConfig, EngineStatistics, SamplingParams
from hermes_async.errors import ConfigError, EngineClosedError
from hermes_async.server import ServerSettings, create_app

DEPLOYMENT = "HermesAsync"
"""The deployment's name, for the section `deployments` of a config file and for handles."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def _from_json(value: Any) -> Any:
    """The command line has only texts; there, a mapping is written as JSON."""
    return json.loads(value) if isinstance(value, str) else value


class Arguments(BaseModel):
    """The arguments of `build_app`, from a config file or from `serve run ... NAME=VALUE`.

    Attributes:
        model: A checkpoint's directory, which all nodes have, or an id on the Hugging Face hub.
        memory: The budget of each engine, such as "3GiB". "auto" takes what its node has free, and follows it.
        engine: Options of each engine: the fields of `EngineConfig`.
        draft_model: As for `Engine`.
        revision: As for `Engine`.
        cache_dir: As for `Engine`.
        served_model_name: The model's name in requests; by default, that of the hub or of the folder.
        api_key_env: The environment variable of the nodes that holds the key which clients must send. The key itself
            is not an argument, as Ray shows arguments to everybody who sees its dashboard.
        no_auth: Answers everybody who reaches a proxy, without a key.
        request_timeout_s: Seconds after which a request ends with an error; by default, there is no limit.
        default_max_tokens: The most tokens of a chat answer, if the request does not say.
        from_model: Sampling values that a request leaves out are those of the checkpoint's `generation_config.json`.
        page: Serves the page at `/`. It shows only the replica that Ray has chosen for it, and while somebody looks at
            it, this replica counts as busy.
        num_replicas: The number of replicas, where it is fixed.
        min_replicas: With `max_replicas`: the fewest replicas.
        max_replicas: The most replicas; their number then follows the requests that wait (`scale_on_waiting`).
        target_running_requests: Replicas become fewer when, on average, those that stay run at most this many requests.
        max_replicas_per_node: None sets no limit. Replicas of one node share its disk.
        num_cpus: CPUs that Ray reserves on the node for a replica.
        num_threads: Threads that compute in a replica. None takes all cores of the node, whatever Ray reserves.
        max_ongoing_requests: The most requests that a replica has at once, those that wait in its engine included. All
            others wait in the proxies, from where they go to the first replica that is free, also to a new one.
        max_queued_requests: The most requests that may wait in a proxy. One more gets 429; -1 sets no limit.
        shutdown_timeout_s: Seconds that running requests may go on when their replica is to stop, such as in an update.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[str, Field(min_length=1)]
    memory: int | str = "auto"
    engine: Annotated[dict[str, Any], BeforeValidator(_from_json)] = {}
    draft_model: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    served_model_name: str | None = None
    api_key_env: Annotated[str, Field(min_length=1)] = "HERMES_ASYNC_API_KEY"
    no_auth: bool = False
    request_timeout_s: float | None = None
    default_max_tokens: int = 1024
    from_model: bool = False
    page: bool = False
    num_replicas: Annotated[int, Field(ge=1)] = 1
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    target_running_requests: Annotated[float, Field(gt=0)] = 16
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_threads: Annotated[int, Field(ge=1)] | None = None
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 256
    max_queued_requests: Annotated[int, Field(ge=-1)] = 1024
    shutdown_timeout_s: Annotated[float, Field(ge=0)] = 600.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_replicas is not None:
            if "num_replicas" in self.model_fields_set:
                raise ValueError("give either num_replicas, or min_replicas and max_replicas")
            if self.max_replicas < self.min_replicas:
                raise ValueError("max_replicas must be at least min_replicas")
        elif "min_replicas" in self.model_fields_set:
            raise ValueError("min_replicas needs max_replicas")
        return self

    def engine_config(self) -> EngineConfig:
        """The options of each engine.

        Raises:
            ConfigError: There is no such option, or its value is out of its range.
        """
        try:
            return EngineConfig(**self.engine)
        except TypeError as error:
            raise ConfigError(f"engine: {error}") from error

    def settings(self, environment: Mapping[str, str]) -> ServerSettings:
        """The settings of each replica's server.

        Args:
            environment: The replica's environment variables.

        Raises:
            ConfigError: There is no key, and `no_auth` is not set; or a value is out of its range.
        """
        key = environment.get(self.api_key_env) or None
        if key is None and not self.no_auth:
            raise ConfigError(
                f"the environment variable {self.api_key_env} of the node has no key for clients to send; set it, or "
                "set no_auth to answer everybody who reaches a proxy"
            )
        return ServerSettings(
            served_model_name=self.served_model_name,
            api_key=None if self.no_auth else key,
            request_timeout_s=self.request_timeout_s,
            default_max_tokens=self.default_max_tokens,
            from_model=self.from_model,
            page=self.page,
        )


# --- the application ---


def build_app(args: Mapping[str, Any]) -> Application:
    """The application for `serve run`, for a config file's `import_path` and for `serve.run`.

    Args:
        args: As `Arguments`.

    Raises:
        ConfigError: An argument is missing, not known, or has a value that is not allowed.
    """
    try:
        arguments = Arguments.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: {first['msg']}" if place else first["msg"]) from error
    arguments.engine_config()
    deploy = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": arguments.num_cpus},
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        graceful_shutdown_timeout_s=arguments.shutdown_timeout_s,
        **_number_of_replicas(arguments),
    )
    app: Application = deploy(serve.ingress()(Replica)).bind(arguments.model_dump(exclude_unset=True))
    return app


def _number_of_replicas(arguments: Arguments) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if arguments.max_replicas_per_node is not None:
        options["max_replicas_per_node"] = arguments.max_replicas_per_node
    if arguments.max_replicas is None:
        return options | {"num_replicas": arguments.num_replicas}
    policy = f"{__name__}:{scale_on_waiting.__name__}"
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_running_requests,
            policy=AutoscalingPolicy(policy_function=policy),  # type: ignore[no-untyped-call]
        )
    }


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """What one replica says of itself.

    Attributes:
        replica_id: Ray's id of the replica.
        node_id: Ray's id of its node.
        process_id: Its process on that node.
        engine: Counts of its engine.
    """

    replica_id: str
    node_id: str
    process_id: int
    engine: EngineStatistics


class Replica:
    """One engine with its server; what Ray Serve calls, and what others call through a handle.

    Entering the engine is part of the start, so that `serve status` shows an error of it. A replica takes requests when
    the weights that stay in memory are loaded.

    Args:
        args: As `Arguments`.
    """

    async def __init__(self, args: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        arguments = Arguments.model_validate(dict(args))
        self._settings = arguments.settings(os.environ)
        _set_num_threads(arguments.num_threads)
        self._engine = Engine(
            arguments.model,
            memory_budget=arguments.memory,
            draft_model=arguments.draft_model,
            config=arguments.engine_config(),
            revision=arguments.revision,
            cache_dir=arguments.cache_dir,
        )
        self._exits = AsyncExitStack()
        await self._exits.enter_async_context(self._engine)
        try:
            await self._engine.wait_ready()
        except BaseException:
            await self._exits.aclose()
            raise

    async def __del__(self) -> None:
        """Ray Serve awaits it when the requests have ended, or the time for them is over."""
        if hasattr(self, "_exits"):
            await self._exits.aclose()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application for HTTP requests; Ray Serve asks for it once."""
        return create_app(self._engine, self._settings)

    # --- what others call through a handle ---

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """As `Engine.generate`, for a handle with `stream=True`.

            handle = serve.get_app_handle("default").options(stream=True)
            async for chunk in handle.generate.remote("Once upon a time", SamplingParams(max_tokens=64)):
                print(chunk.text, end="", flush=True)

        Args:
            timeout_s: Seconds after which the request ends with an error.

        Raises:
            HermesError: As `Engine.generate`.
            RayActorError: The replica was lost. Send the request again.

        Cancellation: `cancel` of what `remote` returned ends the request within one stage, and so does the end of the
        Serve request that called it. After `break`, call `cancel`.
        """
        deadline = None if timeout_s is None else anyio.current_time() + timeout_s
        stream = self._engine.stream(
            prompt,
            params,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            request_id=request_id,
            deadline=deadline,
        )
        async with stream as chunks:
            async for chunk in chunks:
                yield chunk

    async def statistics(self) -> ReplicaStatistics:
        """Counts of one replica's engine: of the one that Ray Serve has chosen for this call."""
        return ReplicaStatistics(
            replica_id=serve.get_replica_context().replica_id.unique_id,
            node_id=ray.get_runtime_context().get_node_id(),
            process_id=os.getpid(),
            engine=self._engine.statistics(),
        )

    # --- what Ray Serve calls ---

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this has raised three times.

        Raises:
            EngineClosedError: The engine has stopped.
        """
        if not self._engine.is_open:
            raise EngineClosedError("the engine has stopped; the replica's log says why")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scale_on_waiting` knows of the replica."""
        statistics = self._engine.statistics()
        return {"num_running": float(statistics.num_running), "num_waiting": float(statistics.num_waiting)}


def _set_num_threads(num_threads: int | None) -> None:
    """Sets how many threads compute, before torch is imported. Ray has set as many as CPUs are reserved."""
    if num_threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


# --- how many replicas ---


def scale_on_waiting(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas there should be: more only while requests wait, fewer when the rest can run all requests.

    Running requests share the reading of weights, so many of them are no reason for another replica. Requests that wait
    are: there is no memory or no place for them. Each new replica is expected to run as many as one does now. Ray
    applies the limits and delays of its `AutoscalingConfig` to the result.
    """
    metrics, num_replicas = context.aggregated_metrics or {}, context.current_num_replicas
    running = sum(metrics.get("num_running", {}).values())
    waiting = sum(metrics.get("num_waiting", {}).values()) + (context.total_queued_requests or 0)
    if waiting >= 1:
        each = max(1.0, running / max(1, num_replicas))
        return num_replicas + math.ceil(waiting / each), {}
    assert context.config is not None
    return max(1, min(num_replicas, math.ceil(running / context.config.target_ongoing_requests))), {}
