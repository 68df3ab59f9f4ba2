"""The page at ``/`` in a real browser, over scripted workers; skipped where there is no Chromium or no Playwright."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from coordinator.http.keys import hash_key, make_key
from coordinator.http.page import FOLDER
from speculation.messages import SessionError, SessionErrorCode
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import TOY_LETTERS
from tests.http.conftest import PROMPT, FrontDoor, running_front_door
from tests.http.test_streams import fail_all

playwright_api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_MS = 30_000
"""A browser on a busy machine may take its time; nothing waits for it in vain."""

METRICS_DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[object]:
    async with playwright_api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


class Visit:
    """One tab on the page, and all that went wrong in it."""

    def __init__(self, page: object, door: FrontDoor, complaints: list[str]) -> None:
        self.page = page
        self.door = door
        self.complaints = complaints

    async def text(self, selector: str) -> str:
        return await self.page.text_content(selector)

    async def ask(self, num_tokens: int, **fields: str) -> None:
        """Fills in the form and runs it by the keyboard."""
        for name, value in {"max-tokens": str(num_tokens), "prompt": PROMPT, **fields}.items():
            await self.page.fill(f"#{name}", value)
        await self.page.press("#prompt", "Control+Enter")

    async def says(self, pattern: str, selector: str = "#status") -> None:
        await playwright_api.expect(self.page.locator(selector)).to_have_text(re.compile(pattern), timeout=PATIENCE_MS)


@contextlib.asynccontextmanager
async def visiting(
    browser: object, width: int = 1280, scheme: str = "light", **settings: object
) -> AsyncIterator[Visit]:
    async with running_front_door(**settings) as door:
        context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        await page.goto(door.url)
        try:
            yield Visit(page, door, complaints)
        finally:
            await context.close()


@needs_chromium
async def test_types_streams_and_compares(browser: object) -> None:
    async with visiting(browser) as visit:
        await visit.says("toy-target, drafted by toy-draft", "#deployment")
        await visit.page.click("summary:has-text('More settings')")
        await visit.page.check("#ignore-eos")
        await visit.ask(60)
        await visit.says("done, with seed 1")
        said = await visit.text("#speculative-text")
        assert said.startswith(PROMPT)
        assert set(said) <= set(TOY_LETTERS)
        assert await visit.text("#plain-text") == said
        assert "equal, character by character" in await visit.text("#verdict")
        assert re.search(r"\d\.\d\d times plain decoding", await visit.text("#verdict"))
        shown = {kind: await visit.page.locator(f"#speculative-text .{kind}").count() for kind in KINDS}
        assert shown == {kind: int(await visit.text(f"#count-{kind}")) for kind in KINDS}
        assert sum(shown.values()) == 60
        assert all(shown.values())
        assert await visit.page.locator("#plain-text .token:not(.own)").count() == 0
        assert await visit.page.locator("#timeline .proposal").count() > 0
        assert await visit.page.locator("#timeline .verify").count() > 0
        assert await visit.page.locator("#timeline .sign").count() > 0
        assert visit.complaints == []


KINDS = ("drafted", "branch", "own")


@needs_chromium
async def test_stops_the_work_and_keeps_the_text(browser: object) -> None:
    async with visiting(browser) as visit:
        visit.door.target.hold(num_turns=4)
        await visit.ask(1000)
        await visit.says(f"^{PROMPT}.+", "#speculative-text")
        await visit.page.click("#stop")
        await visit.says("^stopped$")
        await eventually(lambda: visit.door.num_worker_sessions == 0, "the workers have stopped too")
        assert len(await visit.text("#speculative-text")) > len(PROMPT)
        assert await visit.page.is_enabled("#run")
        assert visit.complaints == []


@needs_chromium
async def test_shows_errors_before_and_within_an_answer(browser: object) -> None:
    async with visiting(browser) as visit:
        visit.door.target.fail_next_open = SessionError(SessionErrorCode.OUT_OF_MEMORY, "no memory is left")
        await visit.ask(10)
        await visit.says("no memory is left", "#error")
        visit.door.target.hold(num_turns=3)
        await visit.ask(1000)
        await visit.says(f"^{PROMPT}.+", "#speculative-text")
        fail_all(visit.door.target)
        await visit.says("gave up this request", "#error")
        visit.door.target.release()
        await visit.ask(10)
        await visit.says("^done")
        assert not await visit.page.is_visible("#error")


@needs_chromium
async def test_bad_fields_are_the_forms_or_the_servers_to_tell(browser: object) -> None:
    async with visiting(browser) as visit:
        await visit.ask(10, temperature="-1")
        assert await visit.page.locator("#temperature:invalid").count() == 1
        await visit.ask(99999, temperature="0")
        await visit.says("max_tokens: .*at most", "#error")


@needs_chromium
async def test_tells_of_a_token_by_pointer_and_by_keyboard(browser: object) -> None:
    async with visiting(browser) as visit:
        await visit.ask(20)
        await visit.says("^done")
        await visit.page.hover("#speculative-text .drafted >> nth=0")
        assert re.search(r"drafted, accepted.*75\.0 %.*Step \d+: \d of \d drafted", await visit.text("#tip"))
        await visit.page.focus("#speculative-text")
        await visit.page.keyboard.press("End")
        await visit.says(r"Token \d+: .*Step")
        assert await visit.page.is_visible("#tip")
        await visit.page.keyboard.press("Escape")
        assert not await visit.page.is_visible("#tip")


@needs_chromium
@pytest.mark.parametrize(("width", "scheme", "beside"), [(390, "dark", False), (1280, "light", True)])
async def test_fits_a_phone_and_a_desk(browser: object, width: int, scheme: str, beside: bool) -> None:
    async with visiting(browser, width, scheme) as visit:
        await visit.ask(60)
        await visit.says("^done")
        for details in await visit.page.query_selector_all("summary"):
            await details.click()
        wide = await visit.page.evaluate("document.scrollingElement.scrollWidth")
        assert wide == width
        left, right = [await visit.page.locator(f"#{arm}-text").bounding_box() for arm in ("speculative", "plain")]
        assert (right["y"] == left["y"]) == beside
        background = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"dark": "rgb(20, 24, 28)", "light": "rgb(251, 251, 249)"}[scheme]


@needs_chromium
async def test_asks_for_the_key_and_keeps_it_in_the_tab(browser: object, tmp_path: Path) -> None:
    key = make_key()
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{hash_key(key)}\n")
    async with visiting(browser, api_keys=keys) as visit:
        await visit.page.fill("#key", key)
        await visit.page.press("#key", "Enter")
        await visit.says("toy-target", "#deployment")
        await visit.ask(10)
        await visit.says("^done")
        assert await visit.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        await visit.page.reload()
        await visit.says("toy-target", "#deployment")


async def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    async with running_front_door() as door, httpx.AsyncClient(base_url=door.url) as web:
        page = await web.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = await web.get("/", headers={"if-none-match": page.headers["etag"]})
        assert again.status_code == 304
        for path in re.findall(r'"(/static/[^"]+)"', page.text):
            assert (await web.get(path)).status_code == 200
        assert (await web.get("/static/../page.py")).status_code == 404
        assert (await web.get("/static/nothing.js")).json()["error"]["type"] == "invalid_request_error"
        assert (await web.post("/")).status_code == 405
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page.text)
    for file in FOLDER.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file


async def test_the_line_of_promql_is_that_of_the_document() -> None:
    line = re.search(r'<code id="promql-line">(.*?)</code>', (FOLDER / "index.html").read_text(), re.DOTALL)
    assert line is not None
    assert f"```promql\n{line[1]}\n```" in METRICS_DOCUMENT.read_text()
