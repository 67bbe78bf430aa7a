"""`/tokenize` and `/detokenize`: token ids as the engine uses them, with vLLM's fields."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from hermes_async.demo import MODEL_PATH
from tests.server.running import MODEL, RunningServer

TEXT = "Speak, good friends."
MESSAGES = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def post(server: RunningServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def test_a_text(server: RunningServer, tokenizer: Any) -> None:
    for special in (True, False):
        expected = tokenizer(TEXT, add_special_tokens=special)["input_ids"]
        answer = post(server, "/tokenize", model=MODEL, prompt=TEXT, add_special_tokens=special).json()
        context = server.portal.call(lambda: server.engine.plan).context_length
        assert answer == {"count": len(expected), "max_model_len": context, "tokens": expected, "token_strs": None}
    assert post(server, "/tokenize", prompt=TEXT).json()["tokens"] == tokenizer(TEXT)["input_ids"]
    assert post(server, "/tokenize", prompt="", add_special_tokens=False).json()["count"] == 0


def test_messages(server: RunningServer, tokenizer: Any) -> None:
    for prompt in (True, False):
        rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        answer = post(
            server, "/tokenize", messages=MESSAGES, add_generation_prompt=prompt, return_token_strs=True
        ).json()
        assert answer["tokens"] == expected
        assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(expected)
    usage = post(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == post(server, "/tokenize", messages=MESSAGES).json()["count"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    answer = post(server, "/tokenize", messages=MESSAGES, tools=[tool], chat_template_kwargs={"enable_thinking": False})
    assert answer.status_code == 200


def test_back_to_text(server: RunningServer, tokenizer: Any) -> None:
    token_ids = tokenizer(TEXT)["input_ids"]
    assert post(server, "/detokenize", model=MODEL, tokens=token_ids).json() == {
        "prompt": tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    }
    assert post(server, "/detokenize", tokens=[]).json() == {"prompt": ""}
    answer = post(server, "/detokenize", tokens=[2**30])
    assert answer.status_code == 400
    assert "token id" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, None),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, None),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, None),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, None),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ x }}"}, "chat_template"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**40]}, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [], "skip_special_tokens": True}, "skip_special_tokens"),
    ],
)
def test_what_is_refused(server: RunningServer, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = post(server, path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
