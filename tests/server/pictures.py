"""Takes the pictures of the page for the documents: `python -m tests.server.pictures docs/images`.

The figures in them are those of this machine, so nothing else should run on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hermes_async import Engine, EngineConfig
from hermes_async.demo import MODEL_PATH
from tests.server.browser import OpenPage, chromium, serving

PROMPTS = ("What is the news from Rome?", "Who shall be king, and who shall serve?")
ANSWERS_ARE_LONG = """
() => {
    const answers = [...document.querySelectorAll(".message[data-role=assistant] .text")];
    return answers.every((answer) => answer.textContent.length > 170);
}
"""
SWEEP_IS_HALFWAY = """
() => {
    const states = [...document.querySelectorAll("#strip .cell")].map((cell) => cell.dataset.state).join("");
    const computing = states.indexOf("c") / states.length;
    return states.includes("l") && computing > 0.35 && computing < 0.7;
}
"""


def main(folder: Path) -> None:
    config = EngineConfig(num_loading_agents=3, max_tokens_per_sweep=16, max_sequences=6, kv_budget=1_300_000)
    engine = Engine(MODEL_PATH, memory_budget="4.2MiB", config=config)
    with serving(engine, "hermes-async-demo") as url, chromium() as browser:
        for scheme in ("light", "dark"):
            page = OpenPage(browser, url, viewport={"width": 1440, "height": 1080}, color_scheme=scheme).open()
            page.tab.get_by_role("button", name="New conversation").click()
            for number, prompt in enumerate(PROMPTS, start=1):
                page.send(prompt, number, max_tokens=200)
            page.tab.wait_for_function(ANSWERS_ARE_LONG, timeout=600_000)
            page.tab.wait_for_function(SWEEP_IS_HALFWAY, polling=20)
            path = folder / f"page-{scheme}.png"
            page.tab.screenshot(path=path)
            page.context.close()
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
