"""ChatGLM-6B's tokenizer against the rules of its repository, written down a second time."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data.chat import ChatTemplate
from jaxlm.data.encoding import encode_rendered, prompt_ids, resolve_ends
from jaxlm.data.examples import from_list
from jaxlm.data.prefix import check_prefix
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.evaluation.asking import context_ids
from jaxlm.inference.prompts import Prompter
from jaxlm.inference.text import answer_text
from jaxlm.spec import PrefixSpec
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.extending import write_extended

sentencepiece = pytest.importorskip("sentencepiece")

LINES = [
    "granite is a rock and basalt is a rock",
    "the density of quartz, 12 and 34",
    "石英和长石是矿物。",
    "问：石英的密度？答：[Round 0]",
] * 10
PIECES = 56
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITE = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
TEXTS = [
    "granite is a rock",
    "  two\t\ttabs \n\n   and blanks  ",
    " " * 200 + "x",
    "石英 and 长石, 🪨",
    "[gMASK] <sop> </s> and <n>",
    "ﬁ é",
    "",
]
TALK = [
    {"role": "user", "content": "石英 is what?"},
    {"role": "assistant", "content": "granite\nand basalt"},
    {"role": "user", "content": "and  quartz?"},
    {"role": "assistant", "content": "a rock"},
]


class Oracle:
    """Their code in short."""

    def __init__(self, model: Any, images: int) -> None:
        self.model, self.images = model, images

    def encode(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for count in range(80, 1, -1):
            text = text.replace(" " * count, f"<|blank_{count}|>")
        return [index + self.images for index in self.model.encode(text)]

    def decode(self, ids: list[int]) -> str:
        text = self.model.decode([index - self.images for index in ids if index >= self.images])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        for count in range(2, 81):
            text = text.replace(f"<|blank_{count}|>", " " * count)
        return text

    def id(self, token: str) -> int:
        return self.model.piece_to_id(token) + self.images

    def example(self, prompt: str, answer: str | None = None) -> list[int]:
        """build_inputs_with_special_tokens of the two."""
        ids = [*self.encode(prompt), self.id("[gMASK]"), self.id("<sop>")]
        return ids if answer is None else [*ids, *self.encode(answer), self.id("<eop>")]


def rounds(questions: list[str], answers: list[str]) -> str:
    """The prompt that `chat` of modeling_chatglm.py makes of a question and the rounds before it."""
    if not answers:
        return questions[0]
    text = "".join(f"[Round {n}]\n问：{q}\n答：{a}\n" for n, (q, a) in enumerate(zip(questions, answers, strict=False)))
    return f"{text}[Round {len(answers)}]\n问：{questions[-1]}\n答："


def save(directory: Path, images: int = 0, bare: bool = False, **settings: Any) -> Oracle:
    """A small ice_text.model.

    Args:
        bare: as in the first revision, whose code puts the special pieces behind those of the file.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    directory.mkdir(exist_ok=True, parents=True)
    with (directory / "ice_text.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            model_type="unigram",
            vocab_size=PIECES,
            pad_id=3,
            pad_piece="<pad>",
            user_defined_symbols=["<n>"],
            normalization_rule_name="nmt_nfkc",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((directory / "ice_text.model").read_bytes())
    for kind, names in ((3, SPECIAL), (4, WHITE), (6, [f"<0x{byte:02X}>" for byte in range(256)])):
        for name in names:
            proto.pieces.add(piece=name, score=0.0, type=kind)
    proto.trainer_spec.byte_fallback = True
    whole = proto.SerializeToString()
    if not bare:
        (directory / "ice_text.model").write_bytes(whole)
    values = {"name_or_path": "THUDM/chatglm-6b", "tokenizer_class": "ChatGLMTokenizer", "remove_space": False}
    roles = dict(bos_token="<sop>", eos_token="<eop>", pad_token="<pad>", unk_token="<unk>", mask_token="[MASK]")
    values |= roles | {"num_image_tokens": images} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return Oracle(sentencepiece.SentencePieceProcessor(model_proto=whole), images)


@pytest.fixture(scope="module", params=[0, 20_000])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Oracle]:
    directory = tmp_path_factory.mktemp("chatglm-6b")
    oracle = save(directory, request.param)
    return load_tokenizer(directory), oracle


def test_ids_and_texts_are_those_of_the_repository(saved: tuple[Tokenizer, Oracle]) -> None:
    tokenizer, oracle = saved
    assert tokenizer.vocab_size == oracle.images + len(oracle.model) == oracle.images + PIECES + 8 + 80 + 256
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == tuple(map(oracle.id, ("<eop>", "<pad>", "<sop>")))
    assert tokenizer.end_ids == (oracle.id("<eop>"),) and {*map(oracle.id, SPECIAL)} < tokenizer.special_ids
    assert tokenizer.opening == (oracle.id("[gMASK]"), oracle.id("<sop>")) and tokenizer.opens_answers
    for text, encoding in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert encoding.ids == oracle.encode(text), text
        assert tokenizer.decode([*encoding.ids, *tokenizer.opening]) == oracle.decode(encoding.ids)
    if oracle.images:
        assert tokenizer.token(7) == "<image_7>" and tokenizer.id_of("<image_7>") == 7
        assert tokenizer.decode([7, *oracle.encode("a rock")]) == "a rock"
    assert tokenizer.id_of("<image_20000>") is None


@given(st.text(alphabet="ab 石，\n\t é🪨ﬁ", max_size=60) | st.text(" \n\tx", max_size=200))
def test_any_text_there_and_back(saved: tuple[Tokenizer, Oracle], text: str) -> None:
    """And each token stands for the characters that it is made of."""
    tokenizer, oracle = saved
    encoding = tokenizer.encode(text)
    assert encoding.ids == oracle.encode(text)
    assert tokenizer.decode(encoding.ids) == oracle.decode(encoding.ids)
    if unicodedata.normalize("NFKC", text) == text:  # else the model's normalisation changes it
        assert tokenizer.decode(encoding.ids) == text
    at = 0
    for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        assert at <= end and begin <= end <= len(text)
        piece = tokenizer.token(index)
        if piece in ("<n>", "<|tab|>") or piece.startswith("<|blank_"):
            count = int(piece[8:-2]) if piece.startswith("<|blank_") else 1
            assert text[begin:end] == {"<n>": "\n", "<|tab|>": "\t"}.get(piece, " " * count)
        at = end
    assert at == len(text)


def test_conversations(saved: tuple[Tokenizer, Oracle]) -> None:
    """One question stands by itself, rounds are counted from 0; the last answer alone is trained."""
    tokenizer, oracle = saved
    questions, answers = ([m["content"] for m in TALK if m["role"] == role] for role in ("user", "assistant"))
    for count in (1, 2):
        messages = TALK[: 2 * count]
        prompt = rounds(questions[:count], answers[: count - 1])
        template = ChatTemplate({}, tokenizer)
        record = Record("record 1", {"messages": messages})
        assert prompt_ids(template, record, tokenizer) == oracle.example(prompt)
        (example,) = encode_rendered(
            [template.render(record)], tokenizer, add_bos=True, add_eos=True, train_on_inputs=False
        )
        assert [*example.input_ids] == oracle.example(prompt, answers[count - 1])
        length = len(oracle.encode(answers[count - 1])) + 1
        assert [*example.loss_mask] == [False] * (len(example.loss_mask) - length) + [True] * length
        assert example.ends == (len(example.input_ids) - 1,)
    with pytest.raises(UserError, match="no system message"):
        tokenizer.render_chat([{"role": "system", "content": "x"}, *TALK])


def test_other_templates_put_the_opening_in_front_of_the_answer(saved: tuple[Tokenizer, Oracle]) -> None:
    tokenizer, oracle = saved
    ends: dict[str, Any] = dict(add_bos=True, add_eos=True)
    record = Record("record 1", {"instruction": "rock?", "output": "granite"})
    template = load_template("alpaca_short", tokenizer)
    prompt = "### Instruction:\nrock?\n\n### Response:\n"
    assert prompt_ids(template, record, tokenizer) == oracle.example(prompt)
    (example,) = encode_rendered([template.render(record)], tokenizer, **ends, train_on_inputs=False)
    answer = [*example.input_ids[example.loss_mask]]
    assert oracle.decode(answer[:-1]) == "granite" and answer[-1] == tokenizer.eos_id
    first = int(example.loss_mask.argmax())
    assert (*example.input_ids[first - 2 : first],) == tokenizer.opening
    # A conversation learns its last answer, as it is asked; a text is all answer.
    talk = load_template("vicuna_v1.1", tokenizer).render(Record("record 2", {"messages": TALK}))
    (example,) = encode_rendered([talk], tokenizer, **ends, train_on_inputs=False)
    assert oracle.decode([*example.input_ids[example.loss_mask]][:-1]).strip() == "a rock"
    assert [*example.input_ids].count(tokenizer.bos_id) == 1 and example.ends == (len(example.input_ids) - 1,)
    text = load_template("text", tokenizer).render(Record("record 3", {"text": "granite"}))
    (example,) = encode_rendered([text], tokenizer, **ends, train_on_inputs=False)
    assert [*example.input_ids] == oracle.example("", "granite") and [*example.loss_mask[:3]] == [False, False, True]
    (whole,) = encode_rendered([template.render(record)], tokenizer, **ends, train_on_inputs=True)
    assert (*whole.input_ids[:2],) == tokenizer.opening and whole.loss_mask[2:].all()
    assert "in front of the last answer" in resolve_ends(DataConfig(), tokenizer)[1]


@pytest.mark.parametrize("stretch", [1, 1 << 14])
def test_targets_that_the_model_sees_are_refused(
    saved: tuple[Tokenizer, Oracle], stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.data.prefix._STRETCH", stretch)
    tokenizer, _ = saved
    assert tokenizer.bos_id is not None
    prefix = PrefixSpec(tokenizer.bos_id, tokenizer.opening[:1])
    template, record = ChatTemplate({}, tokenizer), Record("record 1", {"messages": TALK})

    def check(*whole: bool, packing: str = "rows") -> None:
        found = [
            encode_rendered([template.render(record)], tokenizer, add_bos=True, add_eos=True, train_on_inputs=each)[0]
            for each in whole
        ]
        check_prefix(prefix, from_list(found, [0] * len(found), [*range(len(found))]), tokenizer, packing)

    check(False, False)
    for number in range(3):
        with pytest.raises(UserError, match=rf"record {number + 1} .* in front of <sop>"):
            check(*(each >= number for each in range(3)))
    with pytest.raises(UserError, match=r"data\.packing: group_texts"):
        check(False, packing="group_texts")


def test_what_is_scored_stands_behind_the_opening(saved: tuple[Tokenizer, Oracle]) -> None:
    tokenizer, oracle = saved
    assert context_ids(Prompter("text", tokenizer), "rock?") == oracle.example("rock?")


def test_answers_are_shown_as_they_are_written(saved: tuple[Tokenizer, Oracle]) -> None:
    tokenizer, oracle = saved
    prompt = oracle.example("rock?")
    for text in ("granite\n  and\tbasalt", "石英"):
        assert answer_text(tokenizer, prompt, oracle.encode(text)) == text


def test_the_first_revision(tmp_path: Path) -> None:
    """Its file has the pieces of texts alone, its settings other names, and 20,000 image tokens go unsaid."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    oracle = save(whole, 20_000)
    save(bare, bare=True, bos_token="sop", eos_token="</s>", eop_token="eop")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["num_image_tokens"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(bare / "ice_text.model")
    assert tokenizer.vocab_size == load_tokenizer(whole).vocab_size
    assert tokenizer.end_ids == (oracle.id("<eop>"),) and tokenizer.opening[1] == oracle.id("<sop>")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == oracle.encode(text)
    tokenizer.save(tmp_path / "copy")
    for name in ("ice_text.model", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (bare / name).read_bytes()


def test_new_tokens_stand_behind(tmp_path: Path) -> None:
    save(tmp_path / "old", 20_000)
    old = load_tokenizer(tmp_path / "old")
    (tmp_path / "new").mkdir()
    write_extended(sorted((tmp_path / "old").iterdir()), old, ["<mol>", "rock5"], True, tmp_path / "new")
    new = load_tokenizer(tmp_path / "new")
    assert [new.id_of(token) for token in ("<mol>", "rock5")] == [old.vocab_size, old.vocab_size + 1]
    ids = new.encode("a <mol>\nrock5").ids
    assert new.vocab_size == old.vocab_size + 2 and new.decode(ids, skip_special=False) == "a <mol>\nrock5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_image_tokens=-1), "num_image_tokens is -1"),
        (dict(do_lower_case=True), "do_lower_case is True"),
        (dict(tokenizer_class="T5Tokenizer"), "tokenizer_class is 'T5Tokenizer'"),
    ],
)
def test_settings_that_are_not_served(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_conversions_keep_its_files(tmp_path: Path, run: Callable[..., str]) -> None:
    from tests.models.small import hf_model

    save(tmp_path / "hf")
    hf_model("chatglm_6b", vocab_size=500).save_pretrained(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    for name in ("ice_text.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    jax_files = next(file.parent for file in (tmp_path / "jax").rglob("ice_text.model"))
    assert load_tokenizer(jax_files).opens_answers


def test_texts_by_themselves_end_with_what_opens_an_answer(saved: tuple[Tokenizer, Oracle]) -> None:
    """As the repository's tokenizer ends any text; an embedding is that of a prompt."""
    from jaxlm.inference.loaded import LoadedModel

    tokenizer, oracle = saved
    model: Any = LoadedModel.__new__(LoadedModel)
    model._prompter = Prompter("text", tokenizer)
    assert model._plain_ids("a rock") == [*oracle.encode("a rock"), oracle.id("[gMASK]"), oracle.id("<sop>")]


def test_the_harness_puts_it_between_context_and_continuation(saved: tuple[Tokenizer, Oracle]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    from jaxlm.evaluation.harness import JaxlmModel

    tokenizer, oracle = saved
    opening = [oracle.id("[gMASK]"), oracle.id("<sop>")]
    lm: Any = JaxlmModel.__new__(JaxlmModel)
    lm.tokenizer, lm._prompter, lm.backend = tokenizer, Prompter("text", tokenizer), "causal"
    lm._generator = SimpleNamespace(max_length=16)
    assert lm._encode_pair("a rock ", "indeed") == ([*oracle.encode("a rock"), *opening], oracle.encode(" indeed"))
    assert lm.tok_encode("a rock") == [*oracle.encode("a rock"), *opening]
    assert lm.tok_encode("a rock[gMASK]<sop>") == lm.tok_encode("a rock")
    text = "granite and a mineral " * 9
    windows, ids = lm._rolling_windows(text), oracle.encode(text)
    assert len(windows) > 2 and [index for _, new in windows for index in new] == ids
    assert windows[0][0] == opening
    done = 0
    for context, new in windows:
        assert context[:2] == opening and len(context) + len(new) <= 16 + 1
        assert context[2:] == ids[done - len(context) + 2 : done]
        done += len(new)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_is_trained_and_asked(tmp_path: Path) -> None:
    """Answers are learned by heart, and given for the prompts of the tokenizer's own form."""
    import jaxlm
    from jaxlm.cli.train import main as train
    from tests.e2e.conftest import write_config
    from tests.models.small import hf_model

    oracle = save(tmp_path / "hf")
    ids = {key: oracle.id(token) for key, token in (("gmask", "[gMASK]"), ("mask", "[MASK]"), ("bos", "<sop>"))}
    ids |= {"eos": oracle.id("<eop>"), "pad": 3}
    names = {f"{name}_token_id": index for name, index in ids.items()}
    hf_model("chatglm_6b", vocab_size=500, hidden_size=32, **names).save_pretrained(tmp_path / "hf")
    talks = {"rock?": "granite", "石英?": "a  mineral\nindeed"}
    records = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in talks.items()
    ]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    config = {
        "model": {"path": str(tmp_path / "hf"), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "talks.json")}], "sequence_length": 32},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "train": {"steps": 60, "global_batch_size": 8, "micro_batch_size": 1, "compilation_cache": "none"},
        "output_dir": str(tmp_path / "run"),
    }
    assert train(["--config", str(write_config(tmp_path, config))]) == 0
    model = jaxlm.load(tmp_path / "run")
    assert model.prompt_ids("rock?") == oracle.example("rock?")
    answers = model.generate(list(talks), max_new_tokens=16)
    assert [answer.text for answer in answers] == list(talks.values())
    scores = model.log_probs("rock?", "granite")
    assert len(scores) == len(oracle.encode("granite")) and scores.min() > -0.7
