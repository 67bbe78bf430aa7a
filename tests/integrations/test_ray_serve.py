"""Replicas on Ray Serve, on a real cluster of two nodes on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import yaml

from hermes_async import Engine, SamplingParams
from hermes_async.demo import MODEL_PATH
from hermes_async.errors import ConfigError
from tests.docs.pages import code_blocks
from tests.project import ROOT

pytest.importorskip("ray", reason="Ray is not installed: pip install 'hermes-async[ray]'")
openai = pytest.importorskip("openai", reason="the client is not installed")
pytestmark = [
    pytest.mark.ray,
    # Ray's own modules declare fields as older versions of pydantic wanted it; they are imported in the tests.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

PROMPT = "ROMEO:"
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SHORT, LONG = 24, 400
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "hermes_async.integrations.ray_proxy:middlewares",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    "HERMES_ASYNC_API_KEY": "the key",
}
"""What the guide sets on every node."""

OF_THE_TESTS = {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_agent_register_timeout_ms": "240000"}  # cores are busy here


class Cluster:
    """The process with the cluster, and a service on it."""

    def __init__(self, args: dict[str, Any], log: Path) -> None:
        self.args = args
        self._log = log
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | ENVIRONMENT | OF_THE_TESTS | {"PYTHONPATH": python_path}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.integrations.ray_cluster"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.base_url = f"http://127.0.0.1:{self('deploy', args=args)}"

    def __call__(self, command: str, **args: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"command": command, **args}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"{command}: {self._log.read_text()[-3000:]}"
        return json.loads(line)

    def stop(self) -> None:
        with self._process:
            left = self("stop")
        for process_id in left:
            os.kill(process_id, signal.SIGKILL)
        assert not left, "processes of the cluster were left"

    def client(self, **options: Any) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key="the key", timeout=120, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32: its tokens do not depend on how many share a sweep."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("replicas") / "demo"
    shutil.copytree(MODEL_PATH, path, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    args = {
        "model": str(model),
        "memory": "96MiB",
        "engine": {"kv_budget": "48MiB"},
        "num_replicas": 2,
        "num_threads": 1,
        "served_model_name": "demo",
    }
    running = Cluster(args, tmp_path_factory.mktemp("log") / "ray.log")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    """What the model generates after the prompt, by an engine without Ray."""

    async def generate() -> str:
        async with Engine(model, memory_budget="96MiB") as engine:
            return (await engine.complete(PROMPT, SamplingParams(max_tokens=SHORT, **GREEDY))).text

    return asyncio.run(generate())


async def stream_of(client: Any, num_tokens: int) -> Any:
    return await client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )


async def text_of(stream: Any, num_tokens: int) -> str:
    """Takes a stream to its end, which must say that all tokens came."""
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.completion_tokens == num_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


# --- a service of two replicas; the last test kills a node ---


class TestService:
    @pytest.mark.anyio
    async def test_it_is_the_app_of_serve(self, cluster: Cluster, expected: str) -> None:
        async with cluster.client() as client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            whole = await client.completions.create(
                model="demo", prompt=PROMPT, max_tokens=SHORT, temperature=0, extra_body={"ignore_eos": True}
            )
            assert whole.choices[0].text == expected
            messages = [{"role": "user", "content": PROMPT}]
            chat = await client.chat.completions.create(model="demo", messages=messages, max_tokens=4)
            assert chat.usage.completion_tokens <= 4
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.completions.create(model="another", prompt=PROMPT)
            with pytest.raises(openai.UnprocessableEntityError, match="best_off"):
                await client.completions.create(model="demo", prompt=PROMPT, extra_body={"best_off": 2})

    @pytest.mark.anyio
    async def test_the_key_comes_from_the_environment(self, cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.base_url) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401

    @pytest.mark.anyio
    async def test_many_streams_at_once_on_both_replicas(self, cluster: Cluster, expected: str) -> None:
        before = cluster("tokens_when_idle", num_replicas=2)

        async def one() -> str:
            return await text_of(await stream_of(client, SHORT), SHORT)

        async with cluster.client(max_retries=0) as client:
            assert set(await asyncio.gather(*(one() for _ in range(50)))) == {expected}
        assert cluster("tokens_when_idle", num_replicas=2) == before + 50 * SHORT

    def test_streams_through_a_handle(self, cluster: Cluster, expected: str) -> None:
        result = cluster("generate", prompt=PROMPT, params={"max_tokens": SHORT, **GREEDY})
        assert (result["text"], result["finish_reason"]) == (expected, "length")
        assert result["num_chunks"] > 1
        refused = cluster("generate", prompt=PROMPT * 1000, params={})
        assert refused == {"error": "ContextLengthError"}

    def test_a_cancelled_stream_of_a_handle_frees_its_request(self, cluster: Cluster) -> None:
        before = cluster("tokens_when_idle", num_replicas=2)
        cluster("generate", prompt=PROMPT, params={"max_tokens": LONG, **GREEDY}, most=1)
        assert cluster("tokens_when_idle", num_replicas=2) < before + LONG

    @pytest.mark.anyio
    async def test_a_client_that_goes_away_frees_its_request(self, cluster: Cluster) -> None:
        before = cluster("tokens_when_idle", num_replicas=2)
        async with cluster.client() as client:
            stream = await stream_of(client, LONG)
            await anext(aiter(stream))
            await stream.close()
            whole = asyncio.create_task(
                client.completions.create(
                    model="demo", prompt=PROMPT, max_tokens=LONG, temperature=0, extra_body={"ignore_eos": True}
                )
            )
            await asyncio.wait([whole], timeout=0.5)
            whole.cancel()
            await asyncio.gather(whole, return_exceptions=True)
        assert cluster("tokens_when_idle", num_replicas=2) < before + 2 * LONG

    @pytest.mark.anyio
    async def test_an_update_drops_nothing_that_has_begun(self, cluster: Cluster, expected: str) -> None:
        before = cluster("replicas", num_replicas=2)
        async with cluster.client(max_retries=0) as client:
            streams = await asyncio.gather(*(stream_of(client, LONG) for _ in range(8)))
            for stream in streams:
                await anext(aiter(stream))
            update = asyncio.create_task(
                asyncio.to_thread(cluster, "deploy", args=cluster.args | {"default_max_tokens": 8})
            )
            taken = [asyncio.create_task(text_of(stream, LONG)) for stream in streams]
            while not update.done():  # new requests find a replica all the time
                assert await text_of(await stream_of(client, SHORT), SHORT) == expected
                await asyncio.wait([update], timeout=1)  # which needs the cores
            texts = await asyncio.gather(*taken)
            assert len(set(texts)) == 1
            assert texts[0].startswith(expected[1:])  # the first chunk was taken above
            messages = [{"role": "user", "content": PROMPT}]
            chat = await client.chat.completions.create(
                model="demo", messages=messages, temperature=0, extra_body={"ignore_eos": True}
            )
            assert chat.usage.completion_tokens == 8
        assert not set(before) & set(cluster("replicas", num_replicas=2))

    @pytest.mark.anyio
    async def test_streams_of_a_killed_node_say_retry_and_new_ones_go_on(self, cluster: Cluster, expected: str) -> None:
        async with cluster.client(max_retries=0) as client:
            streams = await asyncio.gather(*(stream_of(client, LONG) for _ in range(16)))
            for stream in streams:
                await anext(aiter(stream))
            await asyncio.to_thread(cluster, "kill_node")
            results = await asyncio.gather(*(text_of(stream, LONG) for stream in streams), return_exceptions=True)
            lost = [result for result in results if isinstance(result, BaseException)]
            assert 0 < len(lost) < len(results)
            assert {(type(error), error.code) for error in lost} == {(openai.APIError, "replica_lost")}
            assert "send the request again" in str(lost[0])
            assert await text_of(await stream_of(client, SHORT), SHORT) == expected


# --- arguments ---


def test_arguments_come_as_texts_from_the_command_line() -> None:
    from hermes_async.integrations.ray_serve import Arguments, build_app

    args = {"model": "m", "engine": '{"max_sequences": 8}', "num_replicas": "3", "no_auth": "true"}
    arguments = Arguments.model_validate(args)
    assert (arguments.num_replicas, arguments.engine_config().max_sequences, arguments.no_auth) == (3, 8, True)
    assert build_app(args) is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model: Field required"),
        ({"model": "m", "replicas": 2}, "replicas: Extra inputs are not permitted"),
        ({"model": "m", "num_replicas": 0}, "num_replicas: "),
        ({"model": "m", "num_replicas": 2, "max_replicas": 3}, "either num_replicas"),
        ({"model": "m", "min_replicas": 2}, "min_replicas needs max_replicas"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "max_replicas must be at least"),
        ({"model": "m", "engine": {"max_sequenzes": 2}}, "engine: .*max_sequenzes"),
        ({"model": "m", "engine": {"max_sequences": 0}}, "max_sequences must be"),
        ({"model": "m", "engine": "{"}, "engine: "),
    ],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], message: str) -> None:
    from hermes_async.integrations.ray_serve import build_app

    with pytest.raises(ConfigError, match=message):
        build_app(args)


def test_a_replica_without_a_key_needs_no_auth() -> None:
    from hermes_async.integrations.ray_serve import Arguments

    with pytest.raises(ConfigError, match="HERMES_ASYNC_API_KEY"):
        Arguments(model="m").settings({})
    assert Arguments(model="m", no_auth=True).settings({}).api_key is None
    assert Arguments(model="m").settings({"HERMES_ASYNC_API_KEY": "k"}).api_key == "k"
    assert Arguments(model="m", api_key_env="OTHER").settings({"OTHER": "k"}).api_key == "k"


@pytest.mark.parametrize(
    ("running", "waiting", "queued", "replicas", "wanted"),
    [
        (0, 0, 0, 3, 1),  # nobody is there
        (64, 0, 0, 1, 1),  # many share the sweeps of one, and none waits
        (20, 0, 0, 3, 2),  # 16 fit into each
        (64, 64, 0, 1, 2),  # as many wait as run
        (64, 0, 128, 1, 3),  # in the proxies
        (0, 1, 0, 1, 2),
    ],
)
def test_replicas_become_more_while_requests_wait(
    running: int, waiting: int, queued: int, replicas: int, wanted: int
) -> None:
    from hermes_async.integrations.ray_serve import scale_on_waiting

    context = SimpleNamespace(
        aggregated_metrics={"num_running": {"a": running}, "num_waiting": {"a": waiting}},
        current_num_replicas=replicas,
        total_queued_requests=queued,
        config=SimpleNamespace(target_ongoing_requests=16),
    )
    assert scale_on_waiting(context) == (wanted, {})


# --- the guide ---


def configs_of_the_guide() -> list[dict[str, Any]]:
    blocks = [block.code for block in code_blocks(ROOT / "docs" / "guides" / "scale.md") if block.language == "yaml"]
    return [yaml.safe_load(block) for block in blocks]


def test_the_guides_config_files_can_be_deployed() -> None:
    from ray.serve.schema import ServeDeploySchema

    from hermes_async.integrations.ray_serve import DEPLOYMENT, build_app

    config, service = configs_of_the_guide()
    for each in (config, yaml.safe_load(service["spec"]["serveConfigV2"])):
        (application,) = ServeDeploySchema.model_validate(each).applications
        module, _, name = application.import_path.partition(":")
        assert (module, name) == (build_app.__module__, build_app.__name__)
        build_app(application.args)
        assert {deployment.name for deployment in application.deployments} <= {DEPLOYMENT}


def test_the_guides_manifest_has_the_fields_of_kuberay() -> None:
    _, service = configs_of_the_guide()
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(workers) == {*head, "groupName", "replicas", "minReplicas", "maxReplicas"}
    assert all(isinstance(value, str) for group in (head, workers) for value in group["rayStartParams"].values())
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        names = {variable["name"] for variable in container["env"]}
        assert names == set(ENVIRONMENT)
