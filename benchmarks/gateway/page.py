"""What does the gateway's page look like? Takes the pictures of docs/: idle, loaded, with a dead stage, and a chat.

The pictures are taken with Chromium (needs playwright and pillow) from a served plan. The loaded page is also shown
dark, and on a phone. The file of the dead stage is renamed, so that its node cannot be replaced until the file is back.
A plan with a decoder is asked a question in the chat box, and gives the picture of the chat only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from served import Served

from benchmarks import harness
from onnxsplit.plan_files import load_plan

if TYPE_CHECKING:
    from playwright.sync_api import Page

TAKES = "3 min"

DOCS = harness.ROOT / "docs"
QUESTION = "Why is the sky blue?"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
COLOURS, APART = 200, 12  # of a picture, so that it stays small

HIDE = """(folder) => {
  const hide = () => {
    for (const place of document.querySelectorAll(".trouble, .quiet"))
      for (const part of place.childNodes)
        if (part.textContent.includes(folder)) part.textContent = part.textContent.replaceAll(folder, "…");
  };
  new MutationObserver(hide).observe(document.body, { childList: true, subtree: true });
  hide();
}"""
"""Hides the name of the folder, now and whenever the page changes."""


def take(page: Page, name: str, *, full_page: bool = True) -> None:
    """Take a picture of a page, with a palette of its most frequent colours."""
    from PIL import Image

    path = DOCS / name
    page.screenshot(path=path, full_page=full_page)
    with Image.open(path) as taken:
        pixels = np.asarray(taken.convert("RGB"))
    colours, which, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette: list[Any] = []
    for colour in colours[np.argsort(-counts)].astype(int):
        if len(palette) < COLOURS and all(abs(colour - one).sum() > APART for one in palette):
            palette.append(colour)
    nearest = np.abs(colours[:, None, :].astype(int) - np.array(palette)[None]).sum(axis=2).argmin(axis=1)
    small = Image.fromarray(nearest[which].reshape(pixels.shape[:2]).astype(np.uint8), "P")
    small.putpalette(np.array(palette, np.uint8).tobytes())
    small.save(path, optimize=True)


def take_chat(page: Page, server: Served) -> None:
    """Take the picture of an answer that is on its way."""
    page.goto(server.http)
    page.wait_for_selector("#chat:not([hidden])")
    page.fill("#chat-temperature", "0.3")
    page.fill("#chat-tokens", "1000")
    page.fill("#chat-message", QUESTION)
    page.press("#chat-message", "Enter")
    time.sleep(4)
    take(page, "page-chat.png")


def take_phone(page: Page, server: Served) -> None:
    """Take the picture of a phone's screen under load."""
    assert page.context.browser is not None
    context = page.context.browser.new_context(**PHONE)
    phone = context.new_page()
    phone.goto(server.http)
    phone.wait_for_selector(".graph .box")
    time.sleep(2)
    take(phone, "page-phone.png", full_page=False)
    context.close()


def in_binary(headers: dict[str, str], body: bytes) -> tuple[bytes, str]:
    """A request whose outputs are asked for as bytes, and the length of its JSON."""
    length = int(headers["inference-header-content-length"])
    head = json.dumps({**json.loads(body[:length]), "parameters": {"binary_data_output": True}}).encode()
    return head + body[length:], str(len(head))


def take_states(page: Page, server: Served, plan: Path) -> None:
    """Take the pictures of an idle server, of one under load, and of one with a dead stage."""
    from playwright.sync_api import expect

    name = plan.name.removesuffix(".plan")
    body, length = in_binary(*server.ask(f"/example/{name}")[1:])
    path = f"/v2/models/{name}/infer"
    ending = threading.Event()

    def ask() -> None:
        while not ending.is_set():
            server.ask(path, body, Inference_Header_Content_Length=length)

    page.goto(server.http)
    page.wait_for_selector(".graph .box")
    time.sleep(4)
    take(page, "page-idle.png")
    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    time.sleep(45)
    page.locator(".slow button").first.click()
    take(page, "page-loaded.png")
    page.emulate_media(color_scheme="dark")
    page.locator(".slow button").first.click()
    take(page, "page-dark.png")
    page.emulate_media(color_scheme="light")
    take_phone(page, server)
    stage = plan / "stage0.onnx"
    hidden = stage.rename(stage.with_suffix(".away"))
    title = page.locator("table tbody tr").first.locator("td").first.get_attribute("title") or ""
    os.kill(int(title.split()[1]), signal.SIGKILL)
    page.wait_for_selector(".graph .box.down", timeout=20_000)
    time.sleep(4)
    page.evaluate(HIDE, str(plan.parent))
    take(page, "page-dead.png")
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
