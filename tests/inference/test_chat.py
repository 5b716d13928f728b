"""Conversations: what the model sees of earlier turns, and the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.chat import Chat, with_setting
from jaxlm.inference.generator import Generator
from jaxlm.inference.prompts import Prompter
from jaxlm.tokenizer import Tokenizer
from tests.inference.test_batch import generator, tokenizer

__all__ = ["generator", "tokenizer"]  # fixtures


class Talk:
    """Runs a chat over typed lines; notes what was read by the model, shown and said."""

    def __init__(self, generator: Generator, prompter: Prompter, options: Decoding) -> None:
        self.prompts: list[str] = []
        self.shown, self.said = "", []  # type: str, list[str]
        self._generator, self._prompter, self._options = generator, prompter, options

    def __call__(self, *lines: str) -> Talk:
        typed = iter(lines)

        def read() -> str:
            for line in typed:
                return line
            raise EOFError

        def show(text: str) -> None:
            self.shown += text

        start = self._generator.start

        def start_noting(prompts: Any, *rest: Any, **named: Any) -> Any:
            self.prompts.append(self._prompter.tokenizer.decode(prompts[0]))
            return start(prompts, *rest, **named)

        self._generator.start = start_noting  # type: ignore[method-assign]
        try:
            Chat(self._generator, self._prompter, self._options, read, show, self.said.append).run()
        finally:
            self._generator.start = start  # type: ignore[method-assign]
        return self


@pytest.fixture
def talk(generator: Generator, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Talk]:
    own = tmp_path / "turns.json"
    own.write_text('{"system": "S", "user": "U", "assistant": "A", "separator": " "}')

    def make(template: str = str(own), **options: Any) -> Talk:
        settings = {"max_new_tokens": 5, "temperature": 1.0} | options
        return Talk(generator, Prompter(template, tokenizer), Decoding(**settings))

    return make


def test_earlier_turns_are_seen(talk: Callable[..., Talk]) -> None:
    found = talk(seed=1)("rock", "earth")
    first, second = found.shown.rstrip("\n").split("\n")[:2]
    assert found.prompts[0] == "S U: rock A:"
    assert found.prompts[1].startswith("S U: rock A: " + first)
    assert found.prompts[1].endswith("U: earth A:")
    assert second
    # The same conversation again gives the same text, although the second turn reads only what is new.
    assert talk(seed=1)("rock", "earth").shown == found.shown


def test_several_devices_give_the_same_conversation(generator: Generator, talk: Callable[..., Talk]) -> None:
    """Rows fill up the mesh there, so that nothing is kept between turns."""
    import jax

    from jaxlm.config import MeshConfig
    from jaxlm.devices.mesh import make_mesh

    expected = talk(temperature=0.0)("rock", "earth")
    found = talk(temperature=0.0)
    mesh = make_mesh(MeshConfig(data=4, fsdp=1), jax.devices()[:4])
    weights = jax.device_put(generator.weights, jax.NamedSharding(mesh, jax.P()))
    found._generator = Generator(generator.decoder, weights, mesh, generator.stop_ids)
    assert found("rock", "earth").shown == expected.shown


def test_reset_and_system_begin_anew(talk: Callable[..., Talk]) -> None:
    found = talk()("rock", "/reset", "earth", "/system T", "more", "/system", "the")
    assert found.prompts == ["S U: rock A:", "S U: earth A:", "T U: more A:", "S U: the A:"]


def test_templates_of_single_questions_forget(talk: Callable[..., Talk]) -> None:
    found = talk("alpaca_short")("rock", "earth", "/system x")
    assert "rock" not in found.prompts[1]
    assert "has no place for a system message" in found.said[-1]


def test_settings_change_while_it_runs(talk: Callable[..., Talk]) -> None:
    found = talk()("/set max_new_tokens 2", "rock", "/set temperature -1", "/set num_beams 2", "/set temperature 0")
    assert found.said[0] == "max_new_tokens 2"
    assert "temperature: -1" in found.said[2] and "num_beams: 2 with temperature 1" in found.said[3]
    beams = talk()("/set temperature 0", "/set num_beams 2", "rock")
    assert len(beams.prompts) == 1 and beams.shown.endswith("\n\n")
    assert beams.said[:2] == ["temperature 0.0", "num_beams 2"]


def test_lines_go_on_and_unknown_commands_are_said_so(talk: Callable[..., Talk]) -> None:
    found = talk()("rock\\", "earth", "", "/frobnicate", "/help", "/show", "/exit", "never")
    assert found.prompts == ["S U: rock\nearth A:"]
    assert "/frobnicate is unknown" in found.said[1]
    assert "/reset" in found.said[2] and "temperature 1.0" in found.said[3]


@pytest.mark.parametrize("word", ["exit", "Quit", " exit ", "/quit", "exit()"])
def test_a_word_that_ends_shells_ends_a_conversation(talk: Callable[..., Talk], word: str) -> None:
    assert talk()(word, "rock").prompts == []


def test_a_question_may_begin_with_such_a_word(talk: Callable[..., Talk]) -> None:
    assert talk()("exit the rock").prompts == ["S U: exit the rock A:"]


def test_a_full_context_is_an_error_that_names_the_way_out(talk: Callable[..., Talk]) -> None:
    found = talk(max_new_tokens=40)("rock", "earth " * 25, "more")
    assert any("context is 128" in line and "/reset" in line for line in found.said)


def test_ctrl_c_ends_an_answer_not_the_conversation(talk: Callable[..., Talk], monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxlm.inference import chat

    whole = chat.stream_answer
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(chat, "stream_answer", interrupted)
    found = talk()("rock", "earth")
    assert found.prompts[1] == "S U: earth A:"
    assert "stopped" in found.said[0]


def test_ctrl_c_at_the_prompt_asks_again(generator: Generator, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    typed = iter([KeyboardInterrupt(), "/show", KeyboardInterrupt(), KeyboardInterrupt(), "/show"])

    def read() -> str:
        for line in typed:
            if isinstance(line, str):
                return line
            raise line
        raise EOFError

    Chat(generator, Prompter("text", tokenizer), Decoding(), read, said.append, said.append).run()
    assert sum("Ctrl-C again" in line for line in said) == 2
    assert sum("max_new_tokens" in line for line in said) == 1


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temperature", "1", 1.0),
        ("temperature", "1e-1", 0.1),
        ("top_k", "40", 40),
        ("stop", "###", ("###",)),
        ("stop", "[a, b]", ("a", "b")),
        ("stop", "", ()),
        ("stop_ids", "[1, 2]", (1, 2)),
        ("seed", "7", 7),
    ],
)
def test_set_changes_a_setting(key: str, value: str, expected: Any) -> None:
    assert getattr(with_setting(Decoding(temperature=0.5), key, value), key) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_k", "x"),
        ("top_k", "1.5"),
        ("temperature", "true"),
        ("temprature", "1"),
        ("samples", "2"),
        ("stop_ids", "a"),
    ],
)
def test_set_refuses_what_does_not_fit(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key):
        with_setting(Decoding(temperature=0.5), key, value)
