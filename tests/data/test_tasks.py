"""Records with molecules: task templates, modality ids of batches, errors that name the record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import DataConfig, ModalityConfig, SourceConfig
from jaxlm.data.encoding import prompt_ids
from jaxlm.data.loader import build_data
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.inference.prompts import Prompter
from jaxlm.modalities import resolve
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.extending import write_extended

RECORD = {"molecule": "CCO", "caption": "The molecule is the alcohol."}


@pytest.fixture(scope="module")
def molecular(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("molecular") / "out"
    directory.mkdir()
    modalities = resolve([ModalityConfig(preset="smiles"), ModalityConfig(preset="protein")], tokenizer.vocab_size)
    tokens = [token for modality in modalities for token in modality.tokens()]
    write_extended([tokenizer.path], tokenizer, tokens, False, directory, modalities)
    return load_tokenizer(directory)


def written(path: Path, *records: dict[str, str]) -> SourceConfig:
    path.write_text(json.dumps(records), encoding="utf-8")
    return SourceConfig(path=str(path), template="smiles2text")


def test_task_templates_ask_in_the_frame_of_a_conversation(tokenizer: Tokenizer) -> None:
    """Both directions, in SciMind's conversation, with the wording of the published text-to-molecule data."""
    record = Record("r", RECORD)
    there, back = (load_template(name, tokenizer) for name in ("text2smiles", "smiles2text"))
    assert there.render(record).text("</s>") == (
        " [INST]: Please generate a SMILES chemical formula that matches the description below:\n"
        "The molecule is the alcohol. [/INST]: <smiles>CCO</smiles></s>"
    )
    assert "<smiles>CCO</smiles> [/INST]:" in back.render_prompt(record).text()
    trained = "".join(s.text for part in back.render(record).segments for s in part.spans if s.trained)
    assert trained == " The molecule is the alcohol."
    renamed = load_template("smiles2text", tokenizer, {"molecule": "SMILES"})
    assert renamed.render_prompt(Record("r", {"SMILES": "CCO"})) == back.render_prompt(record)


def test_a_task_of_ones_own_is_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "task.json"

    def load(**fields: str) -> str:
        file.write_text(json.dumps(fields), encoding="utf-8")
        return load_template(str(file), tokenizer).render(Record("r", {"a": "1", "b": "{x}"})).text()

    assert load(question="Is {a}?", answer="{b} {{so}}", frame="vicuna_v1.1").endswith(
        "USER: Is 1? ASSISTANT: {x} {so}"
    )
    for bad, wanted in (
        ({"question": "{a.b}", "answer": "{b}", "frame": "scimind"}, "question may contain"),
        ({"question": "{0}", "answer": "{b}", "frame": "scimind"}, "question may contain"),
        ({"question": "{a", "answer": "{b}", "frame": "scimind"}, "question may contain"),
        ({"question": "a", "answer": "{b}", "frame": "scimind"}, "question must contain"),
        ({"question": "{a}", "answer": "{b}", "frame": "alpaca"}, "frame 'alpaca' is not a conversation"),
        ({"question": "{a}", "answer": "{b}", "frame": "none"}, "'none' is unknown"),
        ({"question": "{a}", "answer": "{b}"}, "answer, frame, question"),
    ):
        with pytest.raises(UserError, match="template") as caught:
            load(**bad)
        assert wanted in str(caught.value)
    with pytest.raises(UserError, match="molecules"):
        load_template("smiles2text", tokenizer, {"molecules": "SMILES"})


def test_batches_know_the_modalities(molecular: Tokenizer, tmp_path: Path) -> None:
    source = written(tmp_path / "r.json", RECORD, {"molecule": "C", "caption": "A <protein>MK</protein>."})
    config = DataConfig(train=(source,), sequence_length=100, packing=False, train_on_inputs=True)
    data = build_data(config, molecular, seed=0, vocab_size=molecular.vocab_size, max_positions=200)
    batch = data.train_batches(2)[0]
    ids, kinds = batch["input_ids"], batch["modality_ids"]
    smiles, protein = (modality.range for modality in molecular.modalities)
    expected = np.where((ids >= smiles[0]) & (ids < smiles[1]), 1, 0)
    expected = np.where((ids >= protein[0]) & (ids < protein[1]), 2, expected)
    expected = np.where(batch["segment_ids"] == 0, -1, expected)
    np.testing.assert_array_equal(kinds, expected)
    assert kinds.dtype == np.int8 and [int((kinds == kind).sum()) for kind in (1, 2)] == [4, 2]
    # Classes of the model's own, as SciMind's two: everything above the trained vocabulary is one.
    other = build_data(
        config, molecular, seed=0, vocab_size=molecular.vocab_size, max_positions=200, ranges=[(smiles[0], protein[1])]
    )
    assert (other.train_batches(2)[0]["modality_ids"] == 1).sum() == 6
    assert other.fingerprint == data.fingerprint


def test_everything_but_bos_is_trained_as_scimind_does(molecular: Tokenizer, tmp_path: Path) -> None:
    """Everything of a conversation is trained but bos; a record with an unknown token is not trained at all."""
    talk = [{"from": "human", "value": "what is basalt"}, {"from": "gpt", "value": "rock"}]
    odd = [{"from": "human", "value": "what is basalt"}, {"from": "gpt", "value": "rock ﬀ"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"id": 1, "conversation": talk}, {"id": 2, "conversation": odd}]))
    source = SourceConfig(path=str(tmp_path / "talk.json"))
    config = DataConfig(train=(source,), sequence_length=64, packing=False, train_on_inputs=True, drop_unknown=True)
    data = build_data(config, molecular, seed=0, vocab_size=molecular.vocab_size, max_positions=64)
    assert len(data.train) == 2  # bytes stand for every character: nothing is unknown
    example = data.train[0]
    assert example.input_ids[0] == molecular.bos_id and not example.loss_mask[0] and example.loss_mask[1:].all()

    class Unknowing(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(molecular.__dict__)
            self.unk_id = molecular.encode("ﬀ").ids[-1]

    data = build_data(config, Unknowing(), seed=0, vocab_size=molecular.vocab_size, max_positions=64)
    assert len(data.train) == 1 and data.report.train[0].records == 2
    assert "1 records dropped for an unknown token" in data.report.lines()[0]


def test_errors_name_the_record(molecular: Tokenizer, tmp_path: Path) -> None:
    source = written(tmp_path / "r.json", RECORD, RECORD, {"molecule": "C*C", "caption": "?"}, RECORD)
    config = DataConfig(train=(source,), sequence_length=100)
    with pytest.raises(UserError, match=r"r\.json.*3.*'\*' at character \d+ is not a token of the modality smiles"):
        build_data(config, molecular, seed=0, vocab_size=molecular.vocab_size, max_positions=200)
    bad = Record("question 7", {"molecule": "C*", "caption": ""})
    with pytest.raises(UserError, match=r"question 7: '\*' at character"):
        prompt_ids(load_template("smiles2text", molecular), bad, molecular)


def test_prompts_of_tasks_end_where_the_answer_begins(molecular: Tokenizer) -> None:
    prompter = Prompter("smiles2text", molecular)
    wanted = prompt_ids(load_template("smiles2text", molecular), Record("r", RECORD), molecular)
    assert prompter.record(Record("r", RECORD)) == wanted
    assert prompter.question("CCO") == wanted
    with pytest.raises(UserError, match="r is empty"):
        prompter.record(Record("r", {"molecule": " "}))
