"""Tokenizers of the model families that do not use LLaMA's, trained here and saved by transformers, against it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from convert.formats.tiktoken import PATTERN
from convert.source import open_with_adapter
from jaxlm.config import DataConfig, ModelConfig, RunConfig
from jaxlm.data.encoding import encode_rendered, resolve_ends
from jaxlm.data.rendering import Rendered, Segment, Span
from jaxlm.errors import UserError
from jaxlm.inference.loading import prompt_settings
from jaxlm.inference.text import TextStream
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokenizer.extending import write_extended
from jaxlm.training.run_tokenizer import open_tokenizer

transformers = pytest.importorskip("transformers")

CORPUS = [
    "granite is a rock, and basalt is a rock!",
    "The density of quartz is 2.65 g/cm3; that of water 1.00.",
    "石英和长石是矿物。石英的密度是2.65。",
    "def density(mass, volume):\n    return mass / volume\n",
] * 8
TEXTS = [
    "granite is a rock",
    "  two leading spaces, and trailing  ",
    "\n\nlines\nand\ttabs\n",
    "石英 and 长石, 🪨 rock",
    "numbers 1234567 and 3.14",
    " ",
    "it's that, isn't it?",
    "é e\u0301 ﬁ",
]


def trained(special: list[str], pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> Any:
    """A BPE of 400 tokens, the special ones first."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    is_bytes = not model.get("byte_fallback")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else []
    extra = [] if is_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + extra, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if extra:  # bytes are ordinary tokens in published files
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def save_opt(directory: Path) -> None:
    tokenizer = trained(["<s>", "<pad>", "</s>", "<unk>"], byte_level())
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    roles = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    transformers.GPT2TokenizerFast(vocab=model["vocab"], merges=merges, add_bos_token=True, **roles).save_pretrained(
        directory
    )


def save_opt_as_on_the_hub(directory: Path) -> None:
    """vocab.json and merges.txt, as GPT2Tokenizer of transformers 4 wrote them."""
    tokenizer = trained(["<s>", "<pad>", "</s>", "<unk>"], byte_level())
    directory.mkdir()
    tokenizer.model.save(str(directory))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    roles = {f"{name}_token": token | {"content": "</s>"} for name in ("bos", "eos", "unk")}
    plain = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    write(directory, "tokenizer_config.json", roles | {"pad_token": token | {"content": "<pad>"}} | plain)
    write(directory, "special_tokens_map.json", roles | {"pad_token": token | {"content": "<pad>"}})


def save_galactica(directory: Path) -> None:
    """No role is named anywhere but in the model's config.json."""
    split = pre_tokenizers.Split("SPL1T-TH1S-Pl3A5E", "removed")
    digits = pre_tokenizers.Digits(individual_digits=True)
    pre_tokenizer = pre_tokenizers.Sequence([split, digits, pre_tokenizers.Punctuation(), byte_level()])
    tokenizer = trained(["<s>", "<pad>", "</s>", "<unk>", "[START_REF]", "[END_REF]"], pre_tokenizer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def save_bloom(directory: Path) -> None:
    split = pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated")
    pre_tokenizer = pre_tokenizers.Sequence([split, byte_level(use_regex=False)])
    tokenizer = trained(["<unk>", "<s>", "</s>", "<pad>"], pre_tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    roles = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    write(directory, "tokenizer_config.json", settings | {"tokenizer_class": "BloomTokenizerFast"})


def save_falcon(directory: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=False)
    hundreds = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    punctuation = pre_tokenizers.Punctuation("contiguous")
    pre_tokenizer = pre_tokenizers.Sequence([punctuation, byte_level(), digits, hundreds])
    tokenizer = trained([">>TITLE<<", ">>ABSTRACT<<", "<|endoftext|>"], pre_tokenizer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        directory
    )


def save_gemma(directory: Path) -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    normalizer = normalizers.Replace(" ", "▁")
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = trained(special, split, normalizer, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    gemma = transformers.GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    gemma.add_special_tokens({"additional_special_tokens": special[5:]})
    gemma.save_pretrained(directory)


def save_phi(directory: Path) -> None:
    """Phi-3's: LLaMA's rules, and marks of turns that take the space behind them."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = trained(
        ["<unk>", "<s>", "</s>"], None, normalizer, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    names = ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False) for name in names])
    roles = dict(bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(directory)


def save_glm(directory: Path) -> None:
    """GLM-4's: words as tiktoken splits them, and two tokens in front of every text."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer = trained([], pre_tokenizers.Sequence([split, byte_level(use_regex=False)]), ignore_merges=True)
    names = (
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    template = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    roles = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(directory)


def write(directory: Path, name: str, content: dict[str, Any]) -> None:
    (directory / name).write_text(json.dumps(content))


KINDS: dict[str, Callable[[Path], None]] = {
    "opt": save_opt,
    "opt-hub": save_opt_as_on_the_hub,
    "galactica": save_galactica,
    "bloom": save_bloom,
    "falcon": save_falcon,
    "gemma": save_gemma,
    "phi": save_phi,
    "glm": save_glm,
}
# What the config.json of such a model says: bos, eos, pad.
MODEL_IDS = {"galactica": (0, 2, 1), "falcon": (2, 2, None)}
# Ids by the published files' order: bos, eos, pad, and what is put in front of a text.
IDS = {
    "opt": (2, 2, 1, [2]),
    "opt-hub": (2, 2, 1, [2]),
    "galactica": (0, 2, 1, []),
    "bloom": (1, 2, 3, []),
    "falcon": (2, 2, None, []),
    "gemma": (2, 1, 0, [2]),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind) / "tokenizer"
    KINDS[kind](path)
    return path


def test_ids_are_those_of_transformers(kind: str, directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    assert ours.vocab_size == len(theirs)
    ours.complete(*MODEL_IDS.get(kind, (None, None, None)))
    special = [token for token in ours.special_tokens() if not token.isspace()]
    mixed = [f"granite {token}{other} is a rock" for token, other in zip(special, special[::-1], strict=True)]
    opening: list[int] | None = None
    for text in TEXTS + mixed:
        plain = theirs(text, add_special_tokens=False).input_ids
        encoding = ours.encode(text)
        assert encoding.ids == plain, text
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)
        assert ours.decode(plain, skip_special=False) == theirs.decode(plain)
        whole = theirs(text).input_ids
        opening = whole[: len(whole) - len(plain)]
        assert whole == (list(ours.opening) if ours.adds_bos else []) + plain and not ours.adds_eos
    if kind in IDS:
        assert (ours.bos_id, ours.eos_id, ours.pad_id, opening) == IDS[kind]
    else:
        roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == roles


def test_training_ends_texts_with_the_models_eos(kind: str, directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.complete(*MODEL_IDS.get(kind, (None, None, None)))
    data, line = resolve_ends(DataConfig(train=()), tokenizer)
    assert data.add_eos and f"eos {tokenizer.token(tokenizer.eos_id or 0)} ends" in line
    record = Rendered((Segment((Span("granite is a rock", True),), True),))
    (example,) = encode_rendered([record], tokenizer, add_bos=bool(data.add_bos), add_eos=True, train_on_inputs=False)
    opening = tokenizer.opening if tokenizer.adds_bos else ()
    assert list(example.input_ids) == [*opening, *tokenizer.encode("granite is a rock").ids, tokenizer.eos_id]
    assert example.loss_mask[-1] and tokenizer.is_end(tokenizer.eos_id or 0)


def test_a_stream_shows_whole_characters_only(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    text = "the rock 石英🪨 é of 长石."
    ids = tokenizer.encode(text).ids
    shown, stream = [], TextStream(tokenizer, [], [])
    for length in range(1, len(ids) + 1):
        new, _ = stream.update(ids[:length], length == len(ids))
        shown.append(new)
        assert "\ufffd" not in new and text.startswith("".join(shown))
    assert "".join(shown) == text and len(list(filter(None, shown))) > 8


def test_tokens_are_added_beside_vocab_json(tmp_path: Path) -> None:
    save_opt_as_on_the_hub(tmp_path / "opt")
    tokenizer = load_tokenizer(tmp_path / "opt")
    (tmp_path / "more").mkdir()
    write_extended(sorted((tmp_path / "opt").iterdir()), tokenizer, ["<mol>", "rock5"], False, tmp_path / "more")
    ours = load_tokenizer(tmp_path / "more")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "more")
    size = tokenizer.vocab_size
    assert ours.vocab_size == len(theirs) == size + 2
    text = "granite<mol> is rock5"
    assert ours.encode(text).ids == theirs(text, add_special_tokens=False).input_ids
    assert {size, size + 1} < {*ours.encode(text).ids}


def test_files_that_are_not_those_of_a_tokenizer_of_gpt2(tmp_path: Path) -> None:
    save_opt_as_on_the_hub(tmp_path / "opt")
    directory = tmp_path / "opt"
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    merges = (directory / "merges.txt").read_text()

    def refused() -> str:
        with pytest.raises(UserError) as error:
            load_tokenizer(directory)
        return str(error.value)

    write(directory, "tokenizer_config.json", settings | {"tokenizer_class": "CLIPTokenizer"})
    assert "of the class CLIPTokenizer, but no tokenizer.json" in refused() and "save_pretrained" in refused()
    write(directory, "tokenizer_config.json", settings)
    (directory / "merges.txt").write_text(merges + "x yz\n")
    assert f"line {len(merges.splitlines()) + 1} is 'x yz'" in refused()
    (directory / "merges.txt").unlink()
    assert "has vocab.json of the class GPT2Tokenizer" in refused()
    (directory / "merges.txt").write_text(merges)
    (directory / "vocab.json").write_text('{"a": "b"}')
    assert "expected tokens with their ids" in refused()


def test_what_the_model_says_reaches_training_and_generation(tmp_path: Path) -> None:
    """A tokenizer like Galactica's beside a model: in a run, in the prompts, and in what ends an answer."""
    size = dict(vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **ids)).save_pretrained(tmp_path / "model")
    save_galactica(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(tmp_path / "model" / file.name)
    (tmp_path / "model" / "generation_config.json").unlink()
    files = open_with_adapter(str(tmp_path / "model"), None)
    config = RunConfig(model=ModelConfig(path=str(tmp_path / "model")), data=DataConfig(train=()), output_dir="out")
    for tokenizer in (open_tokenizer(config, files.merged)[0], prompt_settings(files).tokenizer):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)
    assert prompt_settings(files).prompter().question("granite")[0] != 0  # no bos, as transformers puts none


def test_ids_of_a_model_are_taken_for_special_tokens_only(tmp_path: Path) -> None:
    save_galactica(tmp_path / "galactica")
    tokenizer = load_tokenizer(tmp_path / "galactica")
    tokenizer.complete(100, (101, 2), 10**6)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_ids) == (None, None, None, ())
    tokenizer.complete(0, (2, 4), 1)
    tokenizer.complete(4, 4, 4)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)
    assert tokenizer.opening == (0,) and tokenizer.end_ids == (2,) and not tokenizer.adds_bos
