"""Masks against the seeds' own procedures, truncation, reports, weights, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import encode_rendered, prompt_ids
from jaxlm.data.examples import Examples, build_examples, split_off
from jaxlm.data.packing import epoch_order
from jaxlm.data.records import Record, read_records
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer

RECORDS = [
    {"instruction": "what is granite", "input": "in the melt" if i % 2 else "", "output": f"a rock {'of quartz ' * i}"}
    for i in range(6)
]


def build(path: Path, tokenizer: Tokenizer, records: Any, template: str = "auto", **options: Any) -> Any:
    file = path / "data.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    config = DataConfig(train=(SourceConfig(path=str(file), template=template),), **options)
    return build_examples(config.train, config, tokenizer, tokenizer.vocab_size)


def stanford(prompt: list[int], both: list[int], eos: int, cutoff: int) -> tuple[list[int], list[int]]:
    """stanford_alpaca: prompt alone and prompt + answer + eos tokenised apart; the prompt's length is masked."""
    ids = [*both, eos][:cutoff]
    labels = list(ids)
    labels[: len(prompt)] = [-100] * min(len(prompt), len(ids))
    return ids, labels


def alpaca_lora(
    prompt: list[int], both: list[int], eos: int, cutoff: int, add_eos: bool, whole: bool
) -> tuple[list[int], list[int]]:
    """alpaca-lora's generate_and_tokenize_prompt, without its left padding."""

    def tokenize(ids: list[int], with_eos: bool) -> list[int]:
        ids = ids[:cutoff]
        return [*ids, eos] if with_eos and ids[-1] != eos and len(ids) < cutoff else ids

    full = tokenize(both, add_eos)
    if whole:
        return full, list(full)
    length = len(tokenize(prompt, add_eos)) - (1 if add_eos else 0)
    return full, [-100] * length + full[length:]


def encoded(tokenizer: Tokenizer, record: Record, template: str) -> tuple[list[int], list[int]]:
    """Tokens of the prompt alone and of prompt and answer, with bos."""
    rendered = load_template(template, tokenizer).render(record)
    prompt = load_template(template, tokenizer).render_prompt(record).text()
    bos = [tokenizer.bos_id or 0]
    return bos + tokenizer.encode(prompt).ids, bos + tokenizer.encode(rendered.text()).ids


def compare(tokenizer: Tokenizer, records: list[Record], cutoff: int) -> int:
    eos = tokenizer.eos_id
    assert eos is not None
    compared = 0
    for name in ("alpaca", "alpaca_legacy"):
        for record in records:
            prompt, both = encoded(tokenizer, record, name)
            if both[: len(prompt)] != prompt:
                continue  # a token spans the border: the seeds' counting is off there
            compared += 1
            for add_eos, whole in ((True, False), (True, True), (False, False)):
                rendered = load_template(name, tokenizer).render(record)
                mine = encode_rendered([rendered], tokenizer, add_bos=True, add_eos=add_eos, train_on_inputs=whole)[0]
                ids, labels = alpaca_lora(prompt, both, eos, cutoff, add_eos, whole)
                assert mine.input_ids[:cutoff].tolist() == ids
                # The first token is no target: no token stands before it (the seeds' loss shifts it away).
                expected = [label != -100 for label in labels]
                expected[0] = False
                if len(prompt) >= cutoff:
                    # Nothing is left to learn, and such a record is dropped; alpaca-lora still learns one token of
                    # the prompt, because it takes one off for an eos that did not fit.
                    assert not mine.loss_mask[:cutoff].any() or whole
                else:
                    assert mine.loss_mask[:cutoff].tolist() == expected
                if add_eos and not whole:
                    ids, labels = stanford(prompt, both, eos, cutoff)
                    assert mine.input_ids[:cutoff].tolist() == ids
                    assert mine.loss_mask[:cutoff].tolist() == [label != -100 for label in labels]
    return compared


def test_masks_are_those_of_the_systems_followed(tokenizer: Tokenizer) -> None:
    records = [Record(f"f:{i}", record) for i, record in enumerate(RECORDS)]
    assert compare(tokenizer, records, 2048) == 12
    assert compare(tokenizer, records, 200) == 12


def test_masks_are_those_of_the_systems_followed_on_real_records(llama: Tokenizer, samples: Path) -> None:
    records = list(read_records(SourceConfig(path=str(samples / "alpaca_schema_175.json"), limit=60)))
    assert compare(llama, records, 256) > 100


def test_a_token_across_the_border_is_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = {"prompt_input": "{instruction}{input} ", "prompt_no_input": "{instruction} ", "response_split": ""}
    (tmp_path / "t.json").write_text(json.dumps(template))
    examples, _ = build(tmp_path, tokenizer, [{"instruction": "what", "output": "rock"}], str(tmp_path / "t.json"))
    tokens = [tokenizer.token(int(i)) for i in examples[0].input_ids]
    assert tokens[-2:] == ["▁rock", "</s>"]
    assert examples[0].loss_mask.tolist()[-3:] == [False, True, True]


def test_conversations_learn_every_answer_and_its_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = [("user", "what"), ("assistant", "rock"), ("user", "why </s>"), ("assistant", "melt")]
    messages = [{"role": role, "content": content} for role, content in turns]
    examples, reports = build(tmp_path, tokenizer, [{"messages": messages}], "scimind")
    ids, mask = examples[0].input_ids, examples[0].loss_mask
    assert tokenizer.decode(ids[mask], skip_special=False).replace(" ", "") == "rock</s>melt</s>"
    assert (ids == tokenizer.eos_id).sum() == 2  # what the user typed is text
    assert ids[0] == tokenizer.bos_id
    whole, _ = build(tmp_path, tokenizer, [{"messages": messages}], "scimind", train_on_inputs=True)
    assert whole[0].loss_mask.tolist() == [False] + [True] * (len(ids) - 1)
    without, _ = build(tmp_path, tokenizer, [{"messages": messages}], "scimind", add_eos=False, add_bos=False)
    assert tokenizer.eos_id not in without[0].input_ids and tokenizer.bos_id not in without[0].input_ids
    assert reports[0].template == "scimind"


def test_chat_has_one_bos_and_learns_the_end_of_turn(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "what 石英"}, {"role": "assistant", "content": "rock 长石 🪨"}]
    examples, _ = build(tmp_path, chat_tokenizer, [{"messages": messages}])
    ids, mask = examples[0].input_ids, examples[0].loss_mask
    assert (ids == chat_tokenizer.bos_id).sum() == 1
    assert chat_tokenizer.decode(ids[mask], skip_special=False) == "rock 长石 🪨<|eot_id|>"
    template = load_template("chat", chat_tokenizer)
    prompt = prompt_ids(template, Record("f:1", {"messages": messages}), chat_tokenizer)
    assert prompt == ids[: len(prompt)].tolist()
    assert mask[: len(prompt)].sum() == 0 and mask[len(prompt) :].all()


def test_text_ends_with_one_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples, reports = build(tmp_path, tokenizer, [{"text": "granite is a rock"}, {"text": "melt"}])
    for example in (examples[0], examples[1]):
        assert example.input_ids[0] == tokenizer.bos_id and example.input_ids[-1] == tokenizer.eos_id
        assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    assert (reports[0].records, reports[0].tokens) == (2, len(examples.input_ids))
    assert reports[0].trained_tokens == len(examples.input_ids) - 2


def test_an_answer_that_ends_with_eos_gets_no_second(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples, _ = build(tmp_path, chat_tokenizer, [{"text": "rock<|eot_id|>"}])
    assert (examples[0].input_ids == chat_tokenizer.eos_id).sum() == 1


def test_records_longer_than_a_row_are_cut_split_dropped_or_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = [*RECORDS, {"instruction": "what " * 400, "output": "rock"}]
    everything, _ = build(tmp_path, tokenizer, long, sequence_length=4096)
    lengths = everything.lengths.tolist()
    room = sorted(lengths)[3]
    over = [n for n in lengths if n > room]
    examples, (report,) = build(tmp_path, tokenizer, long, sequence_length=room)
    assert (report.records, report.truncated, report.tokens_cut) == (7, len(over), sum(over) - room * len(over))
    assert report.dropped_without_target == 1 and len(examples) == 6  # the answer behind the long question is gone
    assert examples.lengths.max() == room
    assert report.trained_tokens == examples.loss_mask.sum()
    assert "1 records dropped because nothing to learn" in report.line()
    examples, (report,) = build(tmp_path, tokenizer, long, sequence_length=room, too_long="drop")
    assert (report.dropped_too_long, report.truncated, len(examples)) == (len(over), 0, 7 - len(over))
    with pytest.raises(UserError, match=rf"data\.json:7 has {lengths[-1]} tokens, data\.sequence_length is 300"):
        build(tmp_path, tokenizer, long, sequence_length=300, too_long="error")


def test_long_texts_are_split_and_lose_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [{"text": "granite is a rock. " * 40}, {"text": "melt"}]
    whole, _ = build(tmp_path, tokenizer, texts, sequence_length=4096)
    pieces, (report,) = build(tmp_path, tokenizer, texts, sequence_length=64)
    assert pieces.input_ids.tolist() == whole.input_ids.tolist()
    assert pieces.lengths.max() == 64 and len(pieces) == -(-whole.lengths[0] // 64) + 1
    assert (report.split, report.truncated, report.records) == (1, 0, 2)
    assert not any(pieces[i].loss_mask[0] for i in range(len(pieces)))
    assert report.trained_tokens == len(whole.input_ids) - len(pieces)
    assert "1 records longer than data.sequence_length split" in report.line()
    # Held-out records go as a whole: no piece of one is trained on.
    for seed in range(4):
        train, held_out = split_off(pieces, 1, seed)
        assert not set(train.record) & set(held_out.record) and len(set(held_out.record)) == 1
        assert len(train) + len(held_out) == len(pieces)
    _, (report,) = build(tmp_path, tokenizer, texts, sequence_length=64, too_long="truncate")
    assert (report.split, report.truncated) == (0, 1)


def test_data_with_nothing_to_train_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no record with anything to learn is left .*6 records dropped because"):
        build(tmp_path, tokenizer, RECORDS, sequence_length=16)
    with pytest.raises(UserError, match="no record with anything to learn"):
        build(tmp_path, tokenizer, [{"instruction": "what", "output": ""}], add_eos=False)


def test_a_token_outside_of_the_vocabulary_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    source = SourceConfig(path=str(tmp_path / "data.json"))
    with pytest.raises(UserError, match=r"token id \d+ .* outside of the model's vocabulary of 300"):
        build_examples((source,), DataConfig(), tokenizer, 300)


def test_bos_or_eos_that_the_tokenizer_lacks_is_refused(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    bare = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"data\.add_bos is true, but .* has no bos token; .* data\.add_bos: false"):
        build(tmp_path, bare, RECORDS, add_bos=True)
    with pytest.raises(UserError, match=r"data\.add_eos is true"):
        build(tmp_path, bare, RECORDS, add_eos=True)
    examples, (report,) = build(tmp_path, bare, RECORDS)
    assert report.ends == 0 and len(examples) == len(RECORDS)
    assert build(tmp_path, bare, RECORDS, add_bos=False, add_eos=False)


def numbered(count: int) -> Examples:
    source = np.repeat([0, 1], [count, 4]).astype(np.int32)
    size = count + 4
    return Examples(
        np.arange(size, dtype=np.int32),
        np.ones(size, bool),
        np.arange(size + 1, dtype=np.int64),
        source,
        np.arange(size),
    )


def test_weights_repeat_and_draw_examples() -> None:
    examples = numbered(10)
    order = epoch_order(examples.source, (2.5, 0.25), seed=1, epoch=0)
    counts = np.bincount(order, minlength=14)
    assert counts[:10].min() == 2 and counts[:10].sum() == 25 and counts[10:].sum() == 1
    assert epoch_order(examples.source, (2.5, 0.25), 1, 0).tolist() == order.tolist()
    assert epoch_order(examples.source, (2.5, 0.25), 1, 1).tolist() != order.tolist()


def test_validation_records_are_split_off_whole() -> None:
    rest, held = split_off(numbered(10), 5, seed=3)
    assert sorted([*rest.input_ids, *held.input_ids]) == list(range(14))
    assert len(held) == 5 and held.source.tolist() == [int(i >= 10) for i in held.input_ids]
    assert split_off(numbered(10), 5, seed=3)[1].input_ids.tolist() == held.input_ids.tolist()
    assert split_off(numbered(10), 5, seed=4)[1].input_ids.tolist() != held.input_ids.tolist()
    with pytest.raises(UserError, match=r"data\.validation is 14, but there are only 14 records"):
        split_off(numbered(10), 14, seed=3)
