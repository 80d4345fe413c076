"""The chat page in headless Chromium: a message is sent, the answer streams in."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from qat.serve.prompts import Prompts
from tests.qat.serve.serving import idle, running, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 30_000
"""How long a page may take to show something, in Playwright's milliseconds."""


@pytest.fixture(scope="module")
def browser():
    required = os.environ.get("QAT_REQUIRE_CHROMIUM") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        if required:
            raise
        pytest.skip("no playwright: pip install playwright")
    if CHROMIUM is None:
        assert not required, "QAT_REQUIRE_CHROMIUM=1, but there is no chromium on the PATH"
        pytest.skip("no chromium on the PATH")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A fresh page; the test fails when a script on it does, or when it asks for other sites."""
    made = browser.new_page(viewport={"width": 1000, "height": 760})
    problems, addresses = [], set()
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("request", lambda request: addresses.add(re.match(r"\w+:(//[^/]*)?", request.url)[0]))
    yield made
    # an API key that is refused is logged by the browser and no problem of the page
    made.close()
    assert problems == []
    assert len(addresses - {"data:"}) == 1


@pytest.fixture
def output(tmp_path):
    """Where screenshots go: $QAT_TEST_OUTPUT, or a temporary directory."""
    directory = Path(os.environ.get("QAT_TEST_OUTPUT", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def shoot(page, output, name):
    path = output / f"{name}.png"
    page.screenshot(path=str(path))
    assert path.stat().st_size > 5000
    print(f"screenshot: {path}")


def expect(locator):
    from playwright.sync_api import expect

    # five seconds, its default, are short on a busy machine
    expect.set_options(timeout=SECONDS)
    return expect(locator)


def settings(page, tokens, temperature="0"):
    page.click("summary")
    page.fill("#max-tokens", str(tokens))
    page.fill("#temperature", temperature)


def test_a_chat(page, server, client, output):
    page.goto(server.url)
    expect(page.locator("#model")).to_have_value("demo")
    expect(page.locator("#empty")).to_have_text("Ask something.")
    expect(page.locator("#key-form")).to_be_hidden()
    settings(page, 32)
    page.fill("#system", "Answer briefly.")
    page.fill("#prompt", "What does this <b>function</b> return?")
    page.press("#prompt", "Enter")
    speed = page.locator("#speed")
    expect(speed).to_contain_text(re.compile(r"^32 tokens, [\d.]+ tokens/s"))
    first = {"role": "user", "content": "What does this <b>function</b> return?"}
    turns = [{"role": "system", "content": "Answer briefly."}, first]
    options = {"model": "demo", "temperature": 0, "max_tokens": 32}
    answer = client.chat.completions.create(messages=turns, **options).choices[0].message.content
    assert page.locator(".user").inner_text() == first["content"]
    assert page.locator(".assistant").text_content() == answer
    # the next turn carries the whole conversation
    page.fill("#prompt", "And then?")
    page.click("#send")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(speed).to_contain_text("32 tokens")
    expect(page.locator("#send")).to_be_visible(timeout=SECONDS)
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(messages=turns, **options).choices[0].message.content
    assert page.locator(".assistant").nth(1).text_content() == second
    shoot(page, output, "chat")
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


STOP_AT_FIRST_WORDS = """() => new MutationObserver((_, observer) => {
    const answer = document.querySelector(".assistant");
    if (!answer || !/\\w{3}/.test(answer.textContent)) return;
    observer.disconnect();
    const stop = document.querySelector("#stop");
    document.body.dataset.stop = stop.offsetParent === null ? "hidden" : "visible";
    stop.click();
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""


def never_ends(route):
    """The page's own request, but for an answer that no end-of-text token ends."""
    body = route.request.post_data_json | {"ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


def test_stop_and_errors(page, server, engine, output):
    page.goto(server.url)
    settings(page, 900, "1")
    page.route("**/v1/chat/completions", never_ends)
    # clicked inside the page: on a busy machine the answer could end before a click from outside
    page.evaluate(STOP_AT_FIRST_WORDS)
    page.fill("#prompt", "Go on")
    page.click("#send")
    expect(page.locator("body")).to_have_attribute("data-stop", "visible")
    expect(page.locator("#speed")).to_contain_text("(stopped)")
    expect(page.locator("#send")).to_be_visible()
    wait_until(lambda: idle(engine))
    # more than the context holds
    page.fill("#max-tokens", "5000")
    page.fill("#prompt", "Again")
    page.press("#prompt", "Enter")
    expect(page.locator(".error")).to_contain_text("maximum context length is 1024 tokens")
    shoot(page, output, "error")


def test_a_model_without_a_chat_template_continues_text(page, engine, plain_demo, output):
    with running(engine, Prompts(plain_demo)) as server, server.client() as client:
        page.goto(server.url)
        expect(page.locator("#empty")).to_contain_text("it continues the text that you give it")
        settings(page, 24)
        expect(page.locator("#system-row")).to_be_hidden()
        page.fill("#prompt", "This function returns")
        page.press("#prompt", "Enter")
        expect(page.locator("#speed")).to_contain_text("24 tokens")
        options = {"model": "demo", "temperature": 0, "max_tokens": 24}
        text = client.completions.create(prompt="This function returns", **options).choices[0].text
        assert page.locator(".assistant").text_content() == "This function returns" + text
        shoot(page, output, "completion")


def test_the_key_is_asked_for_where_one_is_needed(page, engine, prompts, output):
    with running(engine, prompts, api_key="secret") as server:
        page.goto(server.url)
        expect(page.locator("#speed")).to_have_text("This server asks for an API key.")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#speed")).to_have_text("That API key is wrong.")
        shoot(page, output, "key")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_have_value("demo")
        settings(page, 4)
        page.fill("#prompt", "Hi")
        page.press("#prompt", "Enter")
        expect(page.locator("#speed")).to_contain_text("4 tokens")
        # kept for this tab
        page.reload()
        expect(page.locator("#model")).to_have_value("demo")
