"""The page's files, and the two routes of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxlm.config import Decoding
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.serve import page
from jaxlm.serve.app import make_app
from jaxlm.serve.bodies import ChatBody, CompletionBody
from jaxlm.serve.guard import HEADERS
from jaxlm.tokenizer import Tokenizer
from tests.serve.model import fake_engine, served

FILES = sorted(page.DIRECTORY.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
WORDS = json.loads((page.DIRECTORY / "words.json").read_text(encoding="utf-8"))


def shown(tokenizer: Tokenizer, **values: Any) -> dict[str, Any]:
    return page.settings(served(tokenizer, fake_engine(tokenizer)), Decoding(**values))


@pytest.fixture(scope="module")
def asker(tokenizer: Tokenizer) -> TestClient:
    model = served(tokenizer, fake_engine(tokenizer))
    return TestClient(make_app(model, pages=page.routes(model, Decoding())), base_url="http://localhost")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed((page.DIRECTORY / "index.html").read_text(encoding="utf-8"))
    return parser.found


def test_every_text_is_there_in_both_languages() -> None:
    for key, texts in WORDS.items():
        english, chinese = texts
        assert english and chinese, key
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), key
    assert [key for key, (_, chinese) in WORDS.items() if not re.search("[一-鿿]", chinese)] == [
        "s_top_p",
        "s_top_k",
        "s_min_p",
    ]


def test_every_text_that_is_asked_for_is_there_and_is_used(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    names = ("data-t", "data-label", "data-hint")
    asked = {attributes[name] for _, attributes in tags for name in names if name in attributes}
    assert asked <= WORDS.keys()
    source = "".join(file.read_text(encoding="utf-8") for file in SCRIPTS)
    asked |= set(re.findall(r'\bt\("(\w+)"', source))
    assert asked <= WORDS.keys()
    strings = set(re.findall(r'"(\w+)"', source)) | asked
    families = ("s_", "h_", "x_", "hello_", "about_", "describe_", "design_")  # the rest of the name is in a variable
    assert [key for key in WORDS if key not in strings and not key.startswith(families)] == []
    sliders = {f"{kind}_{name}" for name in page.SLIDERS for kind in "sh"}
    assert sliders == {key for key in WORDS if key.startswith(("s_", "h_"))}


def test_nothing_is_written_into_the_page_that_the_policy_forbids(
    tags: list[tuple[str, dict[str, str | None]]],
) -> None:
    for tag, attributes in tags:
        assert "style" not in attributes
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        assert not [name for name in attributes if name.startswith("on")]
    source = "".join(file.read_text(encoding="utf-8") for file in SCRIPTS)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy


def test_no_file_refers_to_another_origin() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[a-z0-9]", re.sub(r"https\?:\\/\\/", "", text).replace("// ", "")), file.name


def test_links_of_the_page_are_files_of_it(tags: list[tuple[str, dict[str, str | None]]], asker: TestClient) -> None:
    links = {attributes.get("href") or attributes.get("src") for _, attributes in tags} - {None, "#composer"}
    assert len(links) > 10
    for link in links:
        name, _, part = str(link).partition("#")
        assert not name.startswith("/")  # behind a proxy the page may lie below another path
        answer = asker.get(f"/{name}")
        assert answer.status_code == 200
        assert not part or f'id="{part}"' in answer.text


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 130_000
    for file in FILES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_page_is_the_first_that_is_seen(asker: TestClient) -> None:
    answer = asker.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers.items() >= HEADERS.items()
    assert asker.get("/page/app.js").headers["content-type"].startswith("text/javascript")
    assert asker.get("/page/../page.py").status_code == 404


def test_sliders_begin_with_the_defaults_of_the_run(tokenizer: Tokenizer) -> None:
    sampling = {
        entry["name"]: entry for entry in shown(tokenizer, temperature=0.4, top_k=200, max_new_tokens=100)["sampling"]
    }
    assert sampling["temperature"]["value"] == 0.4
    assert sampling["top_k"] == {"name": "top_k", "value": 200, "min": 0, "max": 200, "step": 1}
    assert sampling["max_tokens"]["value"] == 100
    assert sampling["max_tokens"]["max"] == 512
    fields = {field.name for field in dataclasses.fields(CompletionBody)}
    assert sampling.keys() <= fields
    assert shown(tokenizer)["models"]["tiny:rock"] == {"template": "chat", "takes_turns": True}
    assert sampling.keys() <= {field.name for field in dataclasses.fields(ChatBody)}


@pytest.mark.parametrize("name", ["alpaca", "knowlm_qlora", "darwin", "vicuna_v1.1"])
def test_prompts_that_the_page_writes_are_those_of_training(name: str) -> None:
    form = page.prompts()[name]["with_input"]
    fields = {"instruction": "Name a {mineral}", "input": "of {instruction}"}
    written = re.sub(r"\{(instruction|input)\}", lambda match: fields[match[1]], form)
    rendered = load_template(name, None).render_prompt(Record("r", fields))
    assert written == "".join(segment.text for segment in rendered.segments)


def test_questions_about_molecules_are_those_of_training(tokenizer: Tokenizer) -> None:
    form = shown(tokenizer)["molecule"]["describe"]
    rendered = load_template("smiles2text", None).render_prompt(Record("r", {"molecule": "CCO"}))
    assert form.replace("{text}", "CCO") == "".join(segment.text for segment in rendered.segments)


def test_a_molecule_is_drawn_without_styles(asker: TestClient) -> None:
    pytest.importorskip("rdkit")
    answer = asker.post("/page/molecule", json={"smiles": "CC(=O)Oc1ccccc1C(=O)O"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("image/svg+xml")
    assert "style=" not in answer.text
    assert answer.text.count("<path") > 15
    assert "stroke='#FF0000'" in answer.text


@pytest.mark.parametrize("body", ["{", "[]", '{"smiles": 3}', '{"smiles": ""}', '{"smiles": "C(C"}'])
def test_what_is_no_molecule_is_refused(asker: TestClient, body: str) -> None:
    pytest.importorskip("rdkit")
    answer = asker.post("/page/molecule", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert asker.post("/page/molecule", json={"smiles": "C" * 300}).status_code == 400


def test_without_rdkit_the_answer_says_what_to_install(asker: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    answer = asker.post("/page/molecule", json={"smiles": "CCO"})
    assert answer.status_code == 501
    assert "pip install 'jaxlm[science]'" in answer.json()["error"]["message"]
