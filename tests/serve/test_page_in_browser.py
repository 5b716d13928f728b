"""The page in a real Chromium, against a server that answers, fails and waits as it is asked to.

Needs playwright (`pip install 'jaxlm[browser]'`) and a Chromium: $CHROMIUM, or one on the path (Debian's `chromium`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import uvicorn

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.model import load_weights
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.inference.rows import DeviceModel
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.serve.page import routes
from jaxlm.serve.tokens import Spelling
from jaxlm.tokenizer import Tokenizer
from tests.inference.test_generation import CONFIG, TreeSource
from tests.serve.model import fake_engine, running, served
from tests.serve.page_server import RELATIONS, State, application

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here ($CHROMIUM, or on the path)"),
    pytest.mark.xdist_group("browser"),
]
QUESTION = "How does a zircon crystal tell the age of a rock?"


@pytest.fixture(scope="module")
def state() -> State:
    return State()


@pytest.fixture(scope="module")
def address(state: State) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(application(state), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


class Tab:
    """A page of its own browser profile, and what went wrong in it."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        options = {"locale": "en-US", "accept_downloads": True, **options}
        self.page = browser.new_context(**options).new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(address)

    def _note(self, message: Any) -> None:
        if "Content Security" in message.text:
            self.errors.append(message.text)

    def ready(self) -> Tab:
        self.page.wait_for_selector("#sliders .slider", state="attached")
        return self

    def mode(self, number: int) -> None:
        self.page.click(f"#modes button:nth-child({number})")

    def wait(self) -> None:
        """Until what was asked is answered."""
        self.page.wait_for_selector(".answer")
        self.page.wait_for_selector("body:not(.busy)")
        self.page.wait_for_selector(".answer:last-child:not(.busy)")

    def ask(self, text: str) -> None:
        self.page.fill("#chat-text", text)
        self.page.press("#chat-text", "Enter")
        self.wait()

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def is_wider_than_its_window(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.fixture
def tab(browser: Any, address: str, state: State) -> Iterator[Tab]:
    state.__init__()  # type: ignore[misc]
    opened = Tab(browser, address).ready()
    yield opened
    assert opened.errors == []
    opened.page.context.close()


def test_chat_streams_and_can_be_stopped_edited_and_found_again(tab: Tab, state: State) -> None:
    page = tab.page
    state.delay = 0.02
    page.fill("#chat-text", "!slow")
    page.press("#chat-text", "Enter")
    page.wait_for_selector(".answer .body >> text=word9")
    assert page.locator("#stop").is_visible()
    page.press("#chat-text", "Escape")
    page.wait_for_selector("text=stopped")
    stopped = page.inner_text(".answer .body")
    assert "word9" in stopped
    assert "word2999" not in stopped
    for _ in range(100):
        if state.cut:
            break
        time.sleep(0.02)
    assert state.cut == ["!slow"]  # the server was told, and its row is free

    state.delay = 0
    page.hover(".ask")
    page.click(".ask button")
    assert page.input_value("#chat-text") == "!slow"
    tab.ask(QUESTION)
    assert tab.texts(".bubble") == [QUESTION]
    assert page.inner_text(".answer h5") == "How the clock runs"
    assert page.inner_text(".answer ol li:nth-child(2) em") == "ratio"
    assert page.get_attribute(".answer a", "href") == "https://example.org/jack"
    assert "97 tokens" in page.inner_text(".facts")

    tab.ask("And <img src=x onerror=alert(1)> lead?")
    assert page.locator("#log img").count() == 0
    messages = state.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert state.bodies[-1]["temperature"] == 0.4
    assert state.bodies[-1]["repetition_penalty"] == 1.3

    page.reload()
    tab.ready()
    assert tab.texts(".bubble") == [QUESTION, "And <img src=x onerror=alert(1)> lead?"]
    before = len(state.bodies)
    page.locator(".answer").last.locator("[aria-label='Answer again']").click()
    tab.wait()
    assert len(state.bodies) == before + 1
    assert state.bodies[-1]["messages"] == messages
    assert state.bodies[-1]["seed"] != state.bodies[-2]["seed"]

    page.locator(".ask").first.hover()
    page.locator(".ask button").first.click()
    tab.ask("Another question")
    assert tab.texts(".bubble") == ["Another question"]
    page.click("text=Undo")
    assert len(tab.texts(".bubble")) == 2


def test_conversations_are_kept_exported_and_imported(tab: Tab, browser: Any, address: str, tmp_path: Any) -> None:
    page = tab.page
    tab.ask(QUESTION)
    page.keyboard.press("Alt+n")
    tab.ask("Another")
    assert tab.texts(".talk") == ["Another", QUESTION]
    with page.expect_download() as started:
        page.click("#export")
    file = tmp_path / "talks.json"
    started.value.save_as(file)
    assert len(json.loads(file.read_text())["conversations"]) == 2
    page.click("#conversations [aria-label='Delete'] >> nth=0")
    assert tab.texts(".talk") == [QUESTION]
    page.click("text=Undo")
    assert len(tab.texts(".talk")) == 2

    other = Tab(browser, address).ready()
    other.page.set_input_files("#import-file", file)
    other.page.wait_for_selector("text=2 new conversations")
    other.page.click(f".talk >> text={QUESTION}")
    assert other.texts(".bubble") == [QUESTION]
    (tmp_path / "other.json").write_text('{"conversations": [{"turns": 3}]}')
    other.page.set_input_files("#import-file", tmp_path / "other.json")
    other.page.wait_for_selector("text=not exported by this page")
    assert other.errors == []


def test_settings_go_with_what_is_asked_and_come_back(tab: Tab, state: State) -> None:
    page = tab.page
    page.click("#open-settings")
    page.fill("input[type=number][aria-label=Temperature]", "0.9")
    page.press("input[type=number][aria-label=Temperature]", "Tab")
    page.fill("#seed", "7")
    page.fill("#stops", "END\n\\n\\n")
    page.fill("#system", "Be brief.")
    page.uncheck("#logprobs")
    page.reload()
    tab.ready()
    tab.ask("x")
    body = state.bodies[-1]
    assert (body["temperature"], body["seed"], body["stop"]) == (0.9, 7, ["END", "\n\n"])
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "logprobs" not in body
    page.click("#open-settings")
    page.click("#reset")
    tab.ask("x")
    assert state.bodies[-1]["temperature"] == 0.4


def test_instructions_are_put_into_the_template_that_is_chosen(tab: Tab, state: State) -> None:
    page = tab.page
    tab.mode(2)
    page.fill("#instruction-text", "Sum up {input}")
    page.fill("#instruction-input", "Basalt is a rock.")
    page.click("#send")
    tab.wait()
    assert state.bodies[-1]["messages"] == [{"role": "user", "content": "Sum up {input}", "input": "Basalt is a rock."}]
    page.select_option("#template", "alpaca")
    page.fill("#instruction-input", "")
    page.click("#send")
    page.wait_for_selector(".turn:nth-child(2) .facts >> text=tokens")
    prompt = state.bodies[-1]["prompt"]
    assert prompt.endswith("### Instruction:\nSum up {input}\n\n### Response:\n")
    assert "seed" in state.bodies[-1]
    page.select_option("#model", "geo-7b:lora")  # whose template takes one instruction
    assert tab.texts("#modes button") == ["Instruction", "Extract", "Molecule"]
    assert "alpaca" in page.inner_text("#template option:first-child")


def test_what_is_extracted_is_a_table_and_a_graph(tab: Tab, state: State) -> None:
    page = tab.page
    tab.mode(3)
    page.click(".examples button")
    page.fill("#schema-add", "dated to")
    page.click("#send")
    tab.wait()
    page.wait_for_selector(".graph")
    schema = json.loads(state.bodies[-1]["messages"][0]["content"])["schema"]
    assert schema == ["located in", "consists of", "contains", "dated to"]
    assert list(state.bodies[-1]["response_format"]["json_schema"]["schema"]["properties"]) == schema
    assert tab.texts(".answer tbody tr")[0].split("\t") == ["Mount Etna", "located in", "Sicily"]
    assert page.locator(".graph g").count() == 7
    assert page.locator(".graph path[marker-end]").count() == sum(map(len, RELATIONS.values()))
    assert tab.texts("mark")[:2] == ["Mount Etna", "Sicily"]
    with page.expect_download() as started:
        page.click("text=Download JSON")
    rows = json.loads(started.value.path().read_text())["rows"]
    assert rows[0] == {"head": "Mount Etna", "relation": "located in", "tail": "Sicily"}
    page.click("#kinds >> text=Events")
    page.fill("#extract-text", "Mount Etna erupted in 1669.")
    page.uncheck("#force")
    page.click("#send")
    page.wait_for_selector("td:text('1669')")
    assert "response_format" not in state.bodies[-1]


def test_molecules_are_drawn_in_questions_and_answers(tab: Tab, state: State) -> None:
    pytest.importorskip("rdkit")
    page = tab.page
    tab.mode(4)
    page.fill("#molecule-text", "C(C")
    page.wait_for_selector("#preview >> text=is not a molecule")
    page.fill("#molecule-text", "CCO")
    page.wait_for_selector("#preview svg[aria-label=CCO]")
    page.click("#send")
    tab.wait()
    page.wait_for_selector(".bubble svg path")
    assert "<smiles>CCO</smiles>" in state.bodies[-1]["prompt"]
    page.click("#directions >> text=Find")
    page.fill("#molecule-text", "A pain reliever")
    page.click("#send")
    page.wait_for_selector(".molecules svg path")


def test_tokens_and_two_models(tab: Tab, state: State) -> None:
    page = tab.page
    page.select_option("#second", "geo-7b:chem")
    tab.ask(QUESTION)
    assert sorted(body["model"] for body in state.bodies) == ["geo-7b", "geo-7b:chem"]
    assert tab.texts(".who") == ["geo-7b", "geo-7b:chem"]
    boxes = [page.locator(".answer").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.locator(".foot >> text=Tokens").first.click()
    page.hover(".tokens span:nth-child(2)")
    assert "62.0 %" in page.inner_text("#tip")
    page.focus(".tokens span:first-child")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tip = page.inner_text("#tip").replace("\n", " ")
    assert re.search(r"30\.0 %.*␣rock 35\.0 %.*17\.5 %", tip)


def test_what_fails_is_said_in_words_and_can_be_tried_again(tab: Tab, state: State) -> None:
    page = tab.page
    words = {
        "!429": "Too many requests are waiting. Try again in 3 s.",
        "!400": "The server refuses this: temperature: 7 is above 2",
        "!500": "The server reports an error: out of memory",
        "!broken": "The connection ended before the answer did.",
    }
    for text, said in words.items():
        tab.ask(text)
        assert said in page.locator(".error").last.inner_text()
    assert "uranium" in page.locator(".answer .body").last.inner_text()  # what had come is kept
    state.key = "secret"
    page.click("button:text('Try again')")
    page.wait_for_selector("text=The API key is missing or wrong.")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-form", state="hidden")
    tab.ask(QUESTION)
    assert "Jack Hills" in page.locator(".answer").last.inner_text()
    page.route("**/v1/**", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    tab.ask("x")
    assert "The server does not answer." in page.locator(".error").last.inner_text()
    page.wait_for_selector("#notice >> text=Trying again")
    page.unroute("**/v1/**")
    page.unroute("**/health")
    page.wait_for_selector("#notice", state="hidden")


def test_while_programs_are_compiled_the_page_counts_them(browser: Any, address: str, state: State) -> None:
    state.__init__()  # type: ignore[misc]
    state.programs_compiled = 5
    opened = Tab(browser, address)
    opened.page.wait_for_selector("text=The model is being prepared: 5 of 12 programs compiled")
    assert opened.page.get_attribute("progress", "value") == "5"
    state.programs_compiled = 12
    opened.ready()
    opened.page.wait_for_selector("#notice", state="hidden")


def test_the_page_and_the_server_understand_each_other(browser: Any, tokenizer: Tokenizer) -> None:
    engine = fake_engine(tokenizer, step=0.002)
    model = served(tokenizer, engine)
    with running(model, pages=routes(model, Decoding(max_new_tokens=200)), api_key="secret") as (address, _):
        opened = Tab(browser, f"{address}/")
        page = opened.page
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        opened.ready()
        opened.ask("What is granite?")
        assert opened.texts(".answer strong") == ["Granite"]
        assert "花岗岩" in page.inner_text(".answer .body")
        page.click(".foot >> text=Tokens")
        page.focus(".tokens span:first-child")
        assert page.locator("#tip div").count() == 5
        opened.mode(2)
        page.fill("#instruction-text", "Name a rock")
        page.select_option("#template", "alpaca")
        page.select_option("#model", "tiny:rock")
        page.click("#send")
        page.wait_for_selector(".turn:nth-child(2) .facts >> text=tokens")
        page.click("#open-settings")
        page.fill("#stops", "igneous")
        page.click("#send")
        page.wait_for_selector(".turn:nth-child(3) .facts >> text=tokens")
        assert page.locator(".answer .body").last.inner_text() == "Granite is an"
        opened.mode(1)
        opened.ask("rock " * 600)
        page.wait_for_selector(".error >> text=The server refuses this", timeout=5000)
        assert "context of 512" in page.inner_text(".error")
        assert opened.errors == []
    assert engine.stats().running == 0


def babbling(tokenizer: Tokenizer) -> DeviceModel:
    """A model that draws words, quotes and brackets, whatever stands before."""
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    shapes = nn.unbox(abstract_variables(Decoder(config)))["params"]
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tree["embed_tokens"]["embedding"][:, 0] = tree["norm"]["scale"][0] = 1
    spelled = map(Spelling(tokenizer).spelled, range(tokenizer.vocab_size))
    tree["lm_head"]["kernel"][:, 0] = [
        1.0 if re.search(rb'["\]}]', text) else 0.6 if re.fullmatch(rb" ?[A-Za-z]{2,}", text) else -1.0
        for text in spelled
    ]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return DeviceModel(Decoder(config), load_weights(Decoder(config), mesh, TreeSource(tree)), mesh, tokenizer.end_ids)


def test_an_extraction_is_held_to_its_schema_by_the_engine(browser: Any, tokenizer: Tokenizer) -> None:
    """From the schema that the page shows to the table: a model that knows nothing of JSON fills it in."""
    engine = PagedEngine(babbling(tokenizer), 2, pages=300, context=1500, chunk=32)
    model = served(tokenizer, engine, context=engine.max_length)
    with running(model, pages=routes(model, Decoding(max_new_tokens=600, temperature=1.0))) as (address, _):
        opened = Tab(browser, f"{address}/").ready()
        page = opened.page
        page.wait_for_selector("#notice", state="hidden")
        page.click("#open-settings")
        page.fill("#seed", "3")
        page.click("#close-settings")
        opened.mode(3)
        page.click("#kinds >> text=Relations")
        page.fill("#extract-text", "Granite holds quartz.")
        page.fill("#schema-add", "holds")
        with page.expect_response("**/v1/chat/completions") as asked:
            page.click("#send")
        opened.wait()
        events = [json.loads(line[6:]) for line in asked.value.text().splitlines() if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        answer = json.loads("".join(choice["delta"].get("content") or "" for choice in choices))
        assert choices[-1]["finish_reason"] == "stop"
        schema = json.loads(asked.value.request.post_data)["response_format"]["json_schema"]["schema"]
        assert list(answer) == list(schema["properties"]) and "holds" in answer
        rows = [[item["subject"], name, item["object"]] for name, items in answer.items() for item in items]
        assert all(item.keys() == {"subject", "object"} for items in answer.values() for item in items)
        assert rows
        shown = [row.split("\t") for row in opened.texts(".answer tbody tr")]
        assert shown == [[" ".join(cell.split()) for cell in row] for row in rows]
        page.uncheck("#force")
        page.click("#send")
        page.wait_for_selector(".turn:nth-child(2) .facts >> text=tokens")
        assert page.locator(".turn:nth-child(2) tbody").count() == 0
        assert opened.errors == []
    engine.drain()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_out(browser: Any, address: str, state: State, scheme: str) -> None:
    """axe-core finds nothing serious in any mode, in either language."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed").Axe()
    state.__init__()  # type: ignore[misc]
    locale = {"light": "en-US", "dark": "zh-CN"}[scheme]
    opened = Tab(browser, address, color_scheme=scheme, locale=locale).ready()
    page = opened.page

    def check(name: str) -> None:
        found = axe.run(page).response["violations"]
        serious = [
            (name, entry["id"], entry["nodes"][0]["html"])
            for entry in found
            if entry["impact"] in ("serious", "critical")
        ]
        assert serious == []

    check("empty")
    opened.ask(QUESTION)
    page.click(".foot .segments button:nth-child(2)")
    check("tokens")
    opened.ask("!400")
    opened.mode(3)
    page.fill("#extract-text", "Mount Etna")
    page.click("#send")
    page.wait_for_selector(".graph")
    page.click("#open-settings")
    check("extract")
    page.click("#close-settings")
    opened.mode(4)
    check("molecule")
    page.click("#keys")
    check("help")


def test_chinese_theme_keys_and_a_narrow_window(browser: Any, address: str, state: State) -> None:
    state.__init__()  # type: ignore[misc]
    opened = Tab(browser, address, locale="zh-CN", viewport={"width": 360, "height": 740}).ready()
    page = opened.page
    assert page.get_attribute("html", "lang") == "zh-CN"
    opened.ask("锆石晶体如何测定岩石年龄？")
    assert opened.texts(".answer strong") == ["铀"]
    visible = re.sub(r"geo-7b(:chem|:lora)?|jaxlm|chat|English|SMILES|JSON|Top-[pk]|Min-p", "", page.inner_text("body"))
    assert not re.findall(r"[A-Za-z]{3,}", visible)
    for number in (1, 2, 3, 4):
        opened.mode(number)
        assert not opened.is_wider_than_its_window()
        assert page.locator("#send").bounding_box()["x"] < 360
    opened.mode(3)
    page.fill("#extract-text", "埃特纳火山位于意大利的西西里岛。")
    page.click("#send")
    page.wait_for_selector(".graph")
    assert not opened.is_wider_than_its_window()
    page.click("#open-list")
    page.click("#new")
    assert page.locator("#log .turn").count() == 0

    page.keyboard.press("Alt+Digit1")
    page.locator("#scroll").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "chat-text"
    page.locator("#scroll").focus()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.click("#language")
    page.reload()
    opened.ready()
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.get_attribute("html", "lang") == "en"
    # A line that an input method composes is not sent by the Enter that ends it.
    page.fill("#chat-text", "ni")
    page.evaluate(
        "document.getElementById('chat-text').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.input_value("#chat-text") == "ni"
    assert opened.errors == []
