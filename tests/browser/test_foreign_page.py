"""Pages of other origins in Chromium: what they can do to a service on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright
from tests.browser.visit import CHROMIUM, DESKTOP, FLAGS, open_visit
from tests.support.serving import serve_handler

pytestmark = pytest.mark.asyncio(loop_scope="module")
ATTACK = """
async ([base, job, name]) => {
  const body = JSON.stringify({ prompt: "stolen", width: 64, height: 64, steps: 1 });
  const attempt = (path, options) =>
    fetch(base + path, options).then(
      async (answer) => [answer.status, await answer.text()],
      () => ["blocked", ""],
    );
  const events = new Promise((resolve) => {
    const source = new EventSource(`${base}/alpha/v1/jobs/${job}/events`);
    source.onopen = () => resolve(["read", ""]);
    source.onerror = () => { source.close(); resolve(["blocked", ""]); };
  });
  const json = { "Content-Type": "application/json" };
  const simple = { method: "POST", mode: "no-cors", referrerPolicy: "no-referrer" };
  await attempt("/alpha/v1/jobs", { ...simple, headers: { "Content-Type": "text/plain" }, body });
  await attempt("/sdapi/v1/interrupt", simple);
  await attempt("/sdapi/v1/skip", { method: "POST", mode: "no-cors" });
  navigator.sendBeacon(`${base}/sdapi/v1/interrupt`);
  const headers = { "X-Forwarded-Host": "localhost", "X-Forwarded-Prefix": "/x" };
  return {
    submit: await attempt("/alpha/v1/jobs", { method: "POST", headers: json, body }),
    cancel: await attempt(`/alpha/v1/jobs/${job}`, { method: "DELETE" }),
    list: await attempt("/alpha/v1/jobs"),
    disguised: await attempt("/alpha/v1/jobs", { headers, referrerPolicy: "no-referrer" }),
    tool: await attempt("/mcp/", { method: "POST", body: "{}" }),
    image: await attempt(`/alpha/v1/file/${name}`),
    events: await events,
  };
}
"""
"""Script of a hostile page. It returns what each attempt could read."""
EMBED = """
(url) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve(image.naturalWidth);
  image.onerror = () => resolve(0);
  image.src = url;
})
"""


class _ForeignSite(BaseHTTPRequestHandler):
    """Page of another origin."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>a foreign page</title>")

    def log_message(self, *_parts: Any, **_named: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def foreign_site() -> Iterator[str]:
    with serve_handler(_ForeignSite) as address:
        yield address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rebound_browser() -> AsyncIterator[Browser]:
    """Yield a browser for which the names of the attacker lead to this machine."""
    if not CHROMIUM:
        pytest.skip("needs Chromium (or its path in CHROMIUM)")
    rules = "--host-resolver-rules=MAP *.evil.test 127.0.0.1"
    # Chromium's own check of private networks must not hide the service's
    checks = "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, rules, checks]
        )
        yield chromium
        await chromium.close()


def _running_job(service: httpx.Client) -> str:
    body = {"prompt": "mine", "width": 64, "height": 64, "steps": 150}
    return service.post("/alpha/v1/jobs", json=body).json()["id"]


def _prompts(service: httpx.Client) -> int:
    return len(service.get("/alpha/v1/jobs").json()["jobs"])


async def _attack(page: Page, service: httpx.Client, base: str) -> dict[str, list[Any]]:
    """Run the hostile script, and check that it had no effect."""
    small = {"prompt": "mine", "width": 64, "height": 64, "steps": 1}
    name = service.post("/alpha/v1/txt2img", json=small).json()["filename"]
    job, before = _running_job(service), _prompts(service)
    result = await page.evaluate(ATTACK, [base, job, name])
    after = service.get(f"/alpha/v1/jobs/{job}").json()
    assert after["state"] in ("queued", "running"), "the page cancelled a job"
    assert _prompts(service) == before, "the page submitted a job"
    service.delete(f"/alpha/v1/jobs/{job}")
    return result


async def test_foreign_page_reads_and_changes_nothing(
    rebound_browser: Browser, service: httpx.Client, foreign_site: str
):
    page = await rebound_browser.new_page()
    base = str(service.base_url).rstrip("/")
    for site in (foreign_site, foreign_site.replace("127.0.0.1", "www.evil.test")):
        await page.goto(site)
        result = await _attack(page, service, base)
        assert {name: status for name, (status, _) in result.items()} == dict.fromkeys(
            result, "blocked"
        )
        url = service.get("/alpha/v1/jobs", params={"state": "done"}).json()["jobs"][0]["images"]
        assert await page.evaluate(EMBED, url[0]["url"]) == 64, "images can be embedded"
    await page.close()


async def test_rebound_page_reads_and_changes_nothing(
    rebound_browser: Browser, service: httpx.Client
):
    page = await rebound_browser.new_page()
    base = f"http://rebound.evil.test:{service.base_url.port}"
    # the name led to the attacker's server at first, and to this machine from now on
    await page.route(f"{base}/page", lambda route: route.fulfill(body="", content_type="text/html"))
    await page.goto(f"{base}/page")
    result = await _attack(page, service, base)
    statuses = {name: status for name, (status, _) in result.items()}
    assert statuses.pop("events") == "blocked"
    assert statuses == dict.fromkeys(statuses, 421)
    await page.close()


async def test_own_page_generates_below_a_prefix(browser: Browser, service: httpx.Client):
    """Behind a proxy that removes the prefix, for the page and Swagger UI."""

    class Proxy(BaseHTTPRequestHandler):
        """Proxy that serves the service below /pics."""

        def do_GET(self) -> None:
            self.forward()

        def do_POST(self) -> None:
            self.forward()

        def forward(self) -> None:
            url = str(service.base_url).rstrip("/") + self.path.removeprefix("/pics")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {**self.headers, "X-Forwarded-Prefix": "/pics"}
            with httpx.stream(
                self.command, url, headers=headers, content=body, trust_env=False, timeout=60
            ) as answer:
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                for part in answer.iter_raw():
                    self.wfile.write(part)

        def log_message(self, *_parts: Any, **_named: Any) -> None:
            """Log nothing."""

    with serve_handler(Proxy) as proxy:
        context = await browser.new_context(viewport=DESKTOP)
        visit = await open_visit(context, f"{proxy}/pics/")
        await visit.render(prompt="below a prefix")
        await visit.page.goto(f"{proxy}/pics/docs")
        await visit.page.get_by_text("/alpha/v1/txt2img").first.wait_for()
        assert visit.errors == []
        assert visit.external_requests == []
        await context.close()


async def test_page_and_docs_cannot_be_framed(
    browser: Browser, service: httpx.Client, foreign_site: str
):
    page = await browser.new_page()
    await page.goto(foreign_site)
    for path in ("", "docs"):
        async with page.expect_event("requestfailed", timeout=5000) as failed:
            await page.evaluate(
                "(url) => document.body.append("
                "Object.assign(document.createElement('iframe'), { src: url }))",
                f"{service.base_url}/{path}",
            )
        assert "BLOCKED" in str((await failed.value).failure)
    await page.close()
