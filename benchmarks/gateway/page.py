"""What does the gateway's page look like? Takes the pictures of docs/: idle, loaded, with a dead stage, and a chat.

The pictures are taken with Chromium (needs playwright) from a served plan. The file of the dead stage is renamed, so
that its node cannot be replaced until the file is back. A plan with a decoder is asked a question in the chat box, and
gives the picture of the chat only.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from served import Served

from benchmarks import harness
from onnxsplit.plan_files import load_plan

if TYPE_CHECKING:
    from playwright.sync_api import Page

TAKES = "2 min"

DOCS = harness.ROOT / "docs"
QUESTION = "Why is the sky blue?"


def take_chat(page: Page, server: Served) -> None:
    """Take the picture of an answer that is on its way."""
    page.goto(server.http)
    page.wait_for_selector("#chat:not([hidden])")
    page.fill("#chat-temperature", "0.3")
    page.fill("#chat-tokens", "1000")
    page.fill("#chat-message", QUESTION)
    page.press("#chat-message", "Enter")
    time.sleep(4)
    page.screenshot(path=DOCS / "page-chat.png", full_page=True)


def take_states(page: Page, server: Served, plan: Path) -> None:
    """Take the pictures of an idle server, of one under load, and of one with a dead stage."""
    from playwright.sync_api import expect

    name = plan.name.removesuffix(".plan")
    _, headers, body = server.ask(f"/example/{name}")
    length = headers["inference-header-content-length"]
    path = f"/v2/models/{name}/infer"
    ending = threading.Event()

    def ask() -> None:
        while not ending.is_set():
            server.ask(path, body, Inference_Header_Content_Length=length)

    page.goto(server.http)
    page.wait_for_selector(".graph .box")
    time.sleep(4)
    page.screenshot(path=DOCS / "page-idle.png")
    callers = [threading.Thread(target=ask) for _ in range(6)]
    for caller in callers:
        caller.start()
    time.sleep(25)
    page.screenshot(path=DOCS / "page-loaded.png", full_page=True)
    stage = plan / "stage0.onnx"
    hidden = stage.rename(stage.with_suffix(".away"))
    title = page.locator("table tbody tr").first.locator("td").first.get_attribute("title") or ""
    os.kill(int(title.split()[1]), signal.SIGKILL)
    page.wait_for_selector(".graph .box.down", timeout=20_000)
    time.sleep(4)
    page.evaluate(  # hide the name of the folder
        "folder => { for (const part of document.querySelector('.trouble').childNodes)"
        " part.textContent = part.textContent.replaceAll(folder, '…'); }",
        str(plan.parent),
    )
    page.screenshot(path=DOCS / "page-dead.png", full_page=True)
    hidden.rename(stage)
    expect(page.locator("#health")).to_have_text("ready", timeout=90_000)
    ending.set()
    for caller in callers:
        caller.join()


def main() -> None:
    """Take the pictures."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("plan", type=Path, metavar="MODEL.plan")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    report = harness.Report(given)
    folder = Path(tempfile.mkdtemp())
    plan = folder / given.plan.name
    shutil.copytree(given.plan, plan)
    decodes = load_plan(plan).decoder is not None
    options = ("--cache-bytes", "1G") if decodes else ("--replicas", "1=2")
    with (
        Served(plan.name, *options, environment=dict(os.environ), folder=folder) as server,
        sync_playwright() as started,
    ):
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 720}, device_scale_factor=1)
        if decodes:
            take_chat(page, server)
        else:
            take_states(page, server, plan)
        browser.close()
    shutil.rmtree(folder)
    written = sorted(str(path) for path in DOCS.glob("page-*.png"))
    report.row({"written": written}, f"Wrote {', '.join(written)}")


if __name__ == "__main__":
    main()
