"""Tokenizers against sentencepiece and transformers, offsets, special tokens, chat templates, training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.tokenizer import MARK_BEGIN, MARK_END, Tokenizer, load_tokenizer, train_sentencepiece

LLAMA = Path(__file__).parents[1] / "../shared/data/llama_tokenizer.model"
TEXTS = [
    "granite is a rock",
    "  two leading spaces",
    "\n\nlines\nand\ttabs\n",
    "石英 and 长石, 🪨🪨 rock",
    "numbers 1234567 and 3.14",
    "trailing  ",
    " ",
    "é e\u0301 ﬁ",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    lines = ["granite is a rock and basalt is a rock", "lines and numbers 12 and 34", "石英 and rock"] * 20
    (path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    train_sentencepiece([path / "corpus.txt"], 330, path / "out")
    return path / "out"


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def either(request: pytest.FixtureRequest, directory: Path) -> Tokenizer:
    return load_tokenizer(directory / request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_point_at_the_characters(either: Tokenizer, text: str) -> None:
    encoding = either.encode(text)
    assert len(encoding.ids) == len(encoding.offsets)
    covered: set[int] = set()
    for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        assert 0 <= begin <= end <= len(text)
        covered |= set(range(begin, end))
        piece = either.token(index)
        # The space put in front has no character; `tokenizers` gives it the first one.
        if not piece.startswith("<0x") and not (piece == "▁" and begin == 0):
            assert text[begin:end].strip(" ") == piece.replace("▁", " ").strip(" ")
    assert covered == set(range(len(text)))
    begins = [begin for begin, _ in encoding.offsets]
    assert begins == sorted(begins)
    assert either.decode(encoding.ids) == text


def test_bytes_of_a_character_have_its_offset(either: Tokenizer) -> None:
    encoding = either.encode("a🪨")
    assert [either.token(i) for i in encoding.ids[-4:]] == ["<0xF0>", "<0x9F>", "<0xAA>", "<0xA8>"]
    assert encoding.offsets[-4:] == [(1, 2)] * 4


@pytest.mark.parametrize("text", TEXTS)
def test_both_files_and_transformers_give_the_same_ids(directory: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs(text, add_special_tokens=False).input_ids
    assert load_tokenizer(directory / "tokenizer.model").encode(text).ids == expected
    assert load_tokenizer(directory).encode(text).ids == expected
    assert theirs(text).input_ids == [1, *expected]


@pytest.mark.skipif(not LLAMA.is_file(), reason="the real LLaMA tokenizer is not at hand")
def test_llama_matches_sentencepiece_and_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import sentencepiece

    shutil.copyfile(LLAMA, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine, raw = load_tokenizer(LLAMA), sentencepiece.SentencePieceProcessor(model_file=str(LLAMA))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (mine.vocab_size, mine.bos_id, mine.eos_id, mine.unk_id, mine.pad_id) == (32000, 1, 2, 0, None)
    for text in TEXTS:
        assert mine.encode(text).ids == raw.encode(text)
        if not text.startswith(" "):  # transformers 5 puts no space before a leading space, SentencePiece does
            assert mine.encode(text).ids == theirs(text, add_special_tokens=False).input_ids
    for text in ("a</s>b", "<s>ab</s>c", "a</s></s>"):  # no spaces beside them, for the same reason
        ours = mine.encode(text, special_tokens=True).ids
        assert ours == theirs(text, add_special_tokens=False).input_ids


def test_special_tokens_in_a_text_count_where_the_format_says_so(directory: Path) -> None:
    plain, fast = load_tokenizer(directory / "tokenizer.model"), load_tokenizer(directory / "tokenizer.json")
    assert 2 not in plain.encode("rock</s>rock").ids
    assert 2 in fast.encode("rock</s>rock").ids
    for tokenizer in (plain, fast):
        encoding = tokenizer.encode("rock</s>rock", special_tokens=True)
        assert encoding.offsets[encoding.ids.index(2)] == (4, 8)
        assert encoding.offsets[-1][1] == 12
        assert 2 not in tokenizer.encode("rock</s>rock", special_tokens=False).ids
        assert tokenizer.decode(encoding.ids, skip_special=False).count("</s>") == 1
        assert "</s>" not in tokenizer.decode(encoding.ids)
    assert 2 in fast.encode("rock</s>rock").ids  # the choice of one call does not stay


def test_tokens_added_beside_the_model_file_are_recognised(directory: Path, tmp_path: Path) -> None:
    shutil.copyfile(directory / "tokenizer.model", tmp_path / "tokenizer.model")
    size = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"{|C|}": size, "[PAD]": size + 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.id_of("{|C|}")) == (size + 2, size + 1, size)
    encoding = tokenizer.encode("rock {|C|}{|C|}")
    assert encoding.ids[-2:] == [size, size]
    assert encoding.offsets[-2:] == [(5, 10), (10, 15)]
    assert tokenizer.decode(encoding.ids).endswith("{|C|}{|C|}")


def chat(directory: Path, tmp_path: Path, template: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(directory / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(template)
    return load_tokenizer(tmp_path)


MESSAGES = [
    {"role": "user", "content": "What <is> 石英?"},
    {"role": "assistant", "content": 'A "rock"\n'},
    {"role": "user", "content": "skip"},
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {% if message.content == 'skip' %}{% break %}{% endif %}
    {{ message | tojson }}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') }}{% if add_generation_prompt %}>>{% endif %}"""


@pytest.mark.parametrize("prompt", [False, True])
def test_chat_templates_render_as_in_transformers(directory: Path, tmp_path: Path, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    mine = chat(directory, tmp_path, TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert mine.render_chat(MESSAGES, add_generation_prompt=prompt) == expected
    assert "<is> 石英" in expected
    marked = mine.render_chat(MESSAGES, keep_marks=True)
    assert f'{MARK_BEGIN}A "rock"\n</s>{MARK_END}' in marked


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "not valid Jinja"),
    ],
)
def test_chat_templates_may_refuse(directory: Path, tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat(directory, tmp_path, template).render_chat(MESSAGES)


def test_a_tokenizer_without_a_chat_template_says_so(directory: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(directory).render_chat(MESSAGES)


def test_save_copies_the_files(directory: Path, tmp_path: Path) -> None:
    load_tokenizer(directory).save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_save_copies_whatever_belongs_to_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    """Also what only other libraries read, and nothing else of a model's directory."""
    model = tmp_path / "model"
    load_tokenizer(directory).save(model)
    for name in ("tekken.json", "qwen.tiktoken", "chat_template.json", "config.json", "model.safetensors"):
        (model / name).write_text("{}")
    load_tokenizer(model).save(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {path.name for path in model.iterdir()} - {"config.json", "model.safetensors"}


def test_training_repeats_and_fits_small_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("granite\n基岩石英长石云母辉石橄榄石\n", encoding="utf-8")
    for name in ("one", "two"):
        tokenizer = train_sentencepiece([tmp_path / "a.txt"], 4096, tmp_path / name)
    assert 260 < tokenizer.vocab_size < 400
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    small = train_sentencepiece([tmp_path / "a.txt"], 262, tmp_path / "small")  # fewer places than characters
    assert small.decode(small.encode("云母 granite").ids) == "云母 granite"


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="neither a directory nor"):
        load_tokenizer(tmp_path / "notes.txt")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="no 'model'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 260"):
        train_sentencepiece([tmp_path / "notes.txt"], 100, tmp_path / "out")
    with pytest.raises(UserError, match="no text"):
        (tmp_path / "empty.txt").write_text("\n")
        train_sentencepiece([tmp_path / "empty.txt"], 300, tmp_path / "out")


def test_settings_must_fit_the_vocabulary(directory: Path, tmp_path: Path) -> None:
    shutil.copyfile(directory / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(UserError, match=r"eos_token is '<\|end\|>'"):
        load_tokenizer(tmp_path)


def test_imports_are_light() -> None:
    code = "import sys, jaxlm.tokenizer, jaxlm.data; print([m for m in sys.modules if m in {!r}.split()])"
    heavy = "jax tokenizers sentencepiece transformers datasets grain pyarrow rich jinja2"
    out = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
