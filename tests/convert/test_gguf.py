"""GGUF files: what is in them, by the gguf package's reader; there and back; what other programs make of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from convert.commands.command import GGUF_TYPES
from convert.conversion import Opened, WriteOptions, convert, write
from convert.formats.gguf.architectures import as_computed
from convert.formats.gguf.types import TypeName
from convert.formats.gguf.write import check_gguf
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES
from jaxlm.tokenizer import load_tokenizer
from jaxlm.weights.hf import hf_tensors
from tests.convert.gguf_models import (
    CONFIGS,
    READ_AS,
    TEXTS,
    VOCAB,
    RandomSource,
    save_byte_level,
    save_model,
    save_sentencepiece,
    spec_of,
)
from tests.convert.tiny import make_adapter, make_hf_model
from tests.models.matrix import settle

gguf = pytest.importorskip("gguf")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer") / "pieces"
    save_sentencepiece(directory)
    return directory


def made(name: str, tokenizer: Path, directory: Path, **options: Any) -> tuple[RandomSource, Path, tuple[str, ...]]:
    """(model, its file, notes)."""
    source = RandomSource(spec_of(name), tokenizer)
    written = write("gguf", Opened(source), directory, WriteOptions(**options))
    (file,) = directory.glob("*.gguf")
    return source, file, written.notes


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys, tensors) by the gguf package."""
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_comes_back(name: str, pieces: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, file, _ = made(name, pieces, tmp_path / "gguf")
    back = open_model(file)
    assert back.config.family == READ_AS.get(name, source.config.family)
    assert back.config.num_layers == source.config.num_layers
    assert set(back.leaves) == set(source.leaves)
    for path, array in source.arrays.items():
        read = back.read(path, ())
        assert read.dtype == np.float32
        if source.config.normed_head and path == "lm_head/kernel":
            array = array / np.linalg.norm(array, axis=1, keepdims=True)
        # A scale that is stored less 1 is rounded where 1 is added.
        exact = "norm" not in path or source.config.norm.offset == 0
        np.testing.assert_allclose(read, array, rtol=0, atol=0 if exact and "lm_head" not in path else 1.3e-7)
        part = back.read(path, (slice(1, 2), slice(3, 9, 2)) if read.ndim > 1 else (slice(1, 9, 3),))
        np.testing.assert_array_equal(part, read[1:2, 3:9:2] if read.ndim > 1 else read[1:9:3])
    if name in (*FAMILIES, *NAMED):
        settle(request, NAMED.get(name, name), "GGUF")


# Models of this test that are called otherwise than their family.
NAMED = {"gemma3": "gemma3_text", "baichuan2": "baichuan"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*CONFIGS, *NAMED.values())])
def test_a_family_that_has_no_architecture_is_refused_with_the_list(
    family: str, request: pytest.FixtureRequest
) -> None:
    source = RandomSource(spec_of("llama"))
    source.config = dataclasses.replace(source.config, family=family)
    with pytest.raises(UserError, match=r"is not written as GGUF; known are llama, mistral, .*bloom") as error:
        check_gguf(source)
    settle(request, family, "GGUF", refused=str(error.value).split("; known")[0].removeprefix("random: "))


def test_positions_come_back(pieces: Path, tmp_path: Path) -> None:
    for name in ("llama3", "llama-linear", "llama-yarn", "phi3-longrope", "gemma3", "smollm3", "glm", "bloom"):
        source, file, _ = made(name, pieces, tmp_path / name)
        ours, theirs = source.config, open_model(file).config
        for first, second in zip(ours.layers(), theirs.layers(), strict=True):
            a, b = first.attention, second.attention
            assert (a.window, a.rotary_dim, a.rotary_interleaved, a.alibi) == (
                b.window,
                b.rotary_dim,
                b.rotary_interleaved,
                b.alibi,
            )
            assert (a.rope is None) == (b.rope is None)
            if a.rope is not None and b.rope is not None:
                said = {key: value for key, value in dataclasses.asdict(a.rope).items() if value is not None}
                assert said == {key: getattr(b.rope, key) for key in said}


# --- what is in a file ------------------------------------------------------------------------------------------------


def test_rows_that_turn_together_are_neighbours(pieces: Path, tmp_path: Path) -> None:
    source, file, _ = made("llama", pieces, tmp_path / "llama")
    stored = {tensor.name: np.concatenate(list(tensor.blocks)) for tensor in hf_tensors(source)}
    tensors = contents(file)[1]
    for name, heads in (("q", 4), ("k", 2)):
        theirs = np.asarray(tensors[f"blk.1.attn_{name}.weight"].data).reshape(heads, 16, 64)
        ours = stored[f"model.layers.1.self_attn.{name}_proj.weight"].reshape(heads, 16, 64)
        np.testing.assert_array_equal(theirs[:, 0::2], ours[:, :8])
        np.testing.assert_array_equal(theirs[:, 1::2], ours[:, 8:])
    values = stored["model.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"].data, values)
    assert list(tensors["blk.1.attn_v.weight"].shape) == [64, 32]  # the file has the last dim first


def test_rows_stay_where_llama_cpp_turns_halves(pieces: Path, tmp_path: Path) -> None:
    source, file, _ = made("qwen3", pieces, tmp_path / "qwen3")
    stored = {tensor.name: np.concatenate(list(tensor.blocks)) for tensor in hf_tensors(source)}
    np.testing.assert_array_equal(
        contents(file)[1]["blk.2.attn_q.weight"].data, stored["model.layers.2.self_attn.q_proj.weight"]
    )


def test_experts_are_stacked(pieces: Path, tmp_path: Path) -> None:
    for name, prefix, factor in (("qwen3_moe", "mlp.experts.{}.{}_proj", 1), ("mixtral", "", 2)):
        source, file, _ = made(name, pieces, tmp_path / name)
        keys, tensors = contents(file)
        arch = keys["general.architecture"]
        experts = keys[f"{arch}.expert_count"]
        assert keys[f"{arch}.expert_used_count"] == 2
        down = np.asarray(tensors["blk.0.ffn_down_exps.weight"].data)
        gate = np.asarray(tensors["blk.0.ffn_gate_exps.weight"].data)
        whole_down = source.arrays["layers/mlp/down_proj/kernel"][0]  # [F, D]
        whole_gate = source.arrays["layers/mlp/gate_proj/kernel"][0]  # [D, F]
        for expert, (each, other) in enumerate(
            zip(np.split(whole_down, experts), np.split(whole_gate, experts, axis=1), strict=True)
        ):
            np.testing.assert_array_equal(down[expert], factor * each.T)
            np.testing.assert_array_equal(gate[expert], other.T)
        assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
        assert prefix == "" or f"{arch}.expert_feed_forward_length" in keys


def test_norms_of_gemma_hold_what_is_multiplied(pieces: Path, tmp_path: Path) -> None:
    source, file, _ = made("gemma2", pieces, tmp_path / "gemma2")
    keys, tensors = contents(file)
    scale = source.arrays["norm/scale"]
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, scale + np.float32(1))
    assert keys["gemma2.attn_logit_softcapping"] == 50.0
    assert keys["gemma2.attention.sliding_window_pattern"] == [True, False, True]


def test_parts_are_one_tensor_where_llama_cpp_has_one(pieces: Path, tmp_path: Path) -> None:
    source, file, _ = made("bloom", pieces, tmp_path / "bloom")
    tensors = contents(file)[1]
    parts = [source.arrays[f"layers/self_attn/{name}_proj/kernel"][1] for name in "qkv"]
    rows = np.concatenate([part.reshape(64, -1).T for part in parts])
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"].data, rows)
    assert "output.weight" not in tensors


def test_frequencies_of_llama3_are_divided(pieces: Path, tmp_path: Path) -> None:
    _, file, _ = made("llama3", pieces, tmp_path / "llama3")
    factors = contents(file)[1]["rope_freqs.weight"].data
    frequencies = 500.0 ** (-np.arange(0, 32, 2) / 32)
    turns = 32 * frequencies / (2 * np.pi)  # over the original 32 positions
    smooth = (turns - 1.0) / 3.0
    scaled = np.where(turns < 1, frequencies / 8, (1 - smooth) * frequencies / 8 + smooth * frequencies)
    expected = np.where(turns > 4, frequencies, scaled)
    np.testing.assert_allclose(frequencies / factors, expected, rtol=1e-6)


def test_a_window_of_all_layers_ends_the_context(pieces: Path, tmp_path: Path) -> None:
    source = RandomSource(dataclasses.replace(spec_of("mistral")).with_attention(window=24), pieces)
    written = write("gguf", source, tmp_path / "gguf")
    keys = contents(tmp_path / "gguf" / "model-f32.gguf")[0]
    assert keys["llama.context_length"] == 24
    assert "up to which it makes no difference" in written.notes[0]
    assert as_computed(source.config).attention.window is None


# --- types ------------------------------------------------------------------------------------------------------------


def q8_0(block: np.ndarray) -> np.ndarray:
    """32 numbers as ggml's quantize_row_q8_0_ref has them (ggml-quants.c)."""
    scale = np.float32(np.abs(block).max() / np.float32(127))
    whole = np.round(block / scale) if scale else np.zeros(32)
    return (np.float32(np.float16(scale)) * whole).astype(np.float32)


def q4_0(block: np.ndarray) -> np.ndarray:
    """As quantize_row_q4_0_ref: the number of largest size becomes -8."""
    largest = block[np.argmax(np.abs(block))]
    scale = np.float32(largest / np.float32(-8))
    inverse = np.float32(1) / scale if scale else np.float32(0)
    whole = np.minimum(15, np.trunc(block * inverse + np.float32(8.5))) - 8
    return (np.float32(np.float16(scale)) * whole).astype(np.float32)


@pytest.mark.parametrize(("kind", "definition", "nbytes"), [("q8_0", q8_0, 34), ("q4_0", q4_0, 18)])
def test_blocks_are_packed_by_the_definition(
    kind: str, definition: Callable[[np.ndarray], np.ndarray], nbytes: int, pieces: Path, tmp_path: Path
) -> None:
    source, file, _ = made("qwen2", pieces, tmp_path / "gguf", gguf_type=kind)
    keys, tensors = contents(file)
    assert tensors["blk.0.ffn_up.weight"].n_bytes == 64 * 96 // 32 * nbytes
    back = open_model(file).read("layers/mlp/up_proj/kernel", ())[0]
    matrix = source.arrays["layers/mlp/up_proj/kernel"][0].T  # [F, D], of which rows are packed
    expected = np.stack([np.concatenate([definition(b) for b in row.reshape(-1, 32)]) for row in matrix])
    np.testing.assert_array_equal(back.T, expected)
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    # The embedding is also the output matrix, which is kept in eight bits.
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert keys["general.file_type"] == {"q8_0": 7, "q4_0": 2}[kind]


@pytest.mark.parametrize(
    ("kind", "worst"), [("f16", 4e-4), ("bf16", 3e-3), ("q5_1", 0.05), ("q5_0", 0.05), ("q4_1", 0.1)]
)
def test_other_types_are_close(kind: str, worst: float, pieces: Path, tmp_path: Path) -> None:
    source, file, _ = made("llama", pieces, tmp_path / "gguf", gguf_type=kind)
    for path, array in source.arrays.items():
        np.testing.assert_allclose(open_model(file).read(path, ()).astype(np.float32), array, rtol=0, atol=worst)


def test_rows_that_blocks_do_not_fill_are_f16_and_named(pieces: Path, tmp_path: Path) -> None:
    _, file, notes = made("mistral", pieces, tmp_path / "gguf", gguf_type="q8_0")
    odd = RandomSource(spec_of("mistral").with_feed_forward(size=40), pieces)
    written = write("gguf", odd, tmp_path / "odd", WriteOptions(gguf_type="q8_0"))
    tensors = contents(tmp_path / "odd" / "model-q8_0.gguf")[1]
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert written.notes == ("3 matrices (blk.0.ffn_down.weight, …) have rows that 32 does not divide; they are f16",)
    assert notes == ()
    assert file.name == "model-q8_0.gguf"


def test_a_number_that_float16_cannot_hold_is_refused(pieces: Path, tmp_path: Path) -> None:
    source = RandomSource(spec_of("llama"), pieces)
    source.arrays["layers/mlp/up_proj/kernel"][1, 0, 0] = 1e5
    with pytest.raises(UserError, match=r"--type f16: blk.1.ffn_up.weight holds 100000.*--type bf16"):
        write("gguf", source, tmp_path / "gguf", WriteOptions(gguf_type="f16"))
    source.arrays["layers/mlp/up_proj/kernel"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        write("gguf", source, tmp_path / "gguf", WriteOptions(gguf_type="q4_0"))
    assert not (tmp_path / "gguf").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizers_agree(first: Path, second: Path) -> None:
    a, b = load_tokenizer(first), load_tokenizer(second)
    for text in TEXTS:
        for special in (False, True):
            assert a.encode(text, special).ids == b.encode(text, special).ids, text
    assert (a.bos_id, a.eos_id, a.adds_bos, a.adds_eos) == (b.bos_id, b.eos_id, b.adds_bos, b.adds_eos)
    assert set(a.end_ids) == set(b.end_ids)
    assert a.chat_template == b.chat_template


def test_pieces_keep_scores_and_kinds(pieces: Path, tmp_path: Path) -> None:
    _, file, _ = made("llama", pieces, tmp_path / "gguf")
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    keys = contents(file)[0]
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    assert len(tokens) == VOCAB
    for index in range(model.vocab_size()):
        assert tokens[index] == model.id_to_piece(index)
        assert scores[index] == np.float32(model.get_score(index))
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6]  # <unk>, <s>, </s>, <0x00>
    assert tokens[VOCAB - 8 : VOCAB - 5] == ["<end>", "<mark>", f"[PAD{VOCAB - 6}]"]
    assert kinds[VOCAB - 8 : VOCAB - 5] == [3, 4, 5]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.eot_token_id"] == VOCAB - 8
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.chat_template"].startswith("{% for message")
    tokenizers_agree(pieces, open_model(file).tokenizer_dir)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "bloom"])
def test_byte_level_tokenizers_keep_merges(pre: str, tmp_path: Path) -> None:
    save_byte_level(tmp_path / pre, pre)
    _, file, notes = made("llama", tmp_path / pre, tmp_path / "gguf")
    content = json.loads((tmp_path / pre / "tokenizer.json").read_text())
    keys = contents(file)[0]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == pre
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    assert keys["tokenizer.ggml.merges"] == merges
    assert keys["tokenizer.ggml.tokens"][1] == "<s>"
    assert keys["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert any("NFC" in note for note in notes) == (pre == "qwen2")
    tokenizers_agree(tmp_path / pre, open_model(file).tokenizer_dir)


def as_tokenizer_json(pieces: Path, directory: Path) -> dict[str, Any]:
    """The SentencePiece model as the tokenizer.json that transformers makes of it, which takes its place."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    vocabulary = {model.id_to_piece(index): index for index in range(model.vocab_size())}
    pairs = [
        (vocabulary[piece], left, right)
        for piece in vocabulary
        for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if left in vocabulary and right in vocabulary and not piece.startswith("<")
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    merges = [[left, right] for _, left, right in sorted(pairs)]
    model_part = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>", "fuse_unk": True}
    special = [
        {"id": index, "content": token, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, token in enumerate(("<unk>", "<s>", "</s>"))
    ]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model_part | {"byte_fallback": True},
    }
    directory.mkdir()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return content


def test_merges_that_come_from_scores_become_scores(pieces: Path, tmp_path: Path) -> None:
    directory = tmp_path / "json"
    content = as_tokenizer_json(pieces, directory)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    _, file, _ = made("llama", directory, tmp_path / "gguf")
    assert contents(file)[0]["tokenizer.ggml.model"] == "llama"
    a, b = load_tokenizer(directory), load_tokenizer(open_model(file).tokenizer_dir)
    for text in TEXTS:
        assert a.encode(text, False).ids == b.encode(text, False).ids


def test_merges_in_another_order_have_no_scores(pieces: Path, tmp_path: Path) -> None:
    directory = tmp_path / "json"
    content = as_tokenizer_json(pieces, directory)
    merges, vocabulary = content["model"]["merges"], content["model"]["vocab"]
    vocabulary |= {piece: len(vocabulary) + number for number, piece in enumerate(("zg", "gm", "zgm"))}
    new = [["z", "g"], ["g", "m"], ["zg", "m"]]
    for name, changed in (
        ("'zg' do not stand together", [*merges, *new, ["z", "gm"], new[0]]),
        ("'z' and 'gm' are tokens and make up 'zgm', but are not merged", [*merges, *new]),
    ):
        content["model"]["merges"] = changed
        (directory / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=name):
            made("llama", directory, tmp_path / "gguf")


def test_a_tokenizer_that_llama_cpp_has_no_code_for_is_refused(pieces: Path, tmp_path: Path) -> None:
    save_byte_level(tmp_path / "bpe", "qwen2")
    file = tmp_path / "bpe" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d+|\w+"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"pre_tokenizer is not one that llama.cpp .*llama-bpe.*\\d\+\|\\w\+"):
        made("llama", tmp_path / "bpe", tmp_path / "gguf")
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="normalizer changes texts"):
        made("llama", tmp_path / "bpe", tmp_path / "gguf")
    save_sentencepiece(tmp_path / "unigram", model_type="unigram", vocab_size=340, hard_vocab_limit=False)
    with pytest.raises(UserError, match="of type UNIGRAM"):
        made("llama", tmp_path / "unigram", tmp_path / "gguf")
    with pytest.raises(UserError, match="has no tokenizer"):
        write("gguf", RandomSource(spec_of("llama")), tmp_path / "gguf")


def test_a_vocabulary_of_another_size_is_refused_with_both_numbers(pieces: Path, tmp_path: Path) -> None:
    for rows in (300, VOCAB + 5000):
        source = RandomSource(dataclasses.replace(spec_of("llama"), vocab_size=rows), pieces)
        with pytest.raises(UserError, match=f"the tokenizer has {VOCAB - 6:,} tokens .* embedding {rows:,} rows"):
            write("gguf", source, tmp_path / "gguf")


# --- models that have no place ----------------------------------------------------------------------------------------


def test_what_llama_cpp_does_not_compute_is_refused_by_name(pieces: Path, tmp_path: Path) -> None:
    cases = [
        (spec_of("gemma2").with_attention(scale=0.5), r"attention.scale is 0.5, llama.cpp computes 0.204"),
        (
            spec_of("gemma").with_feed_forward(activation="gelu"),
            r"activation is 'gelu', llama.cpp computes 'gelu_tanh'",
        ),
        (spec_of("qwen2").with_attention(o_bias=True), r"attention.o_bias is True"),
        (spec_of("glm4").with_attention(window=7, rope=None, rotary_dim=None, rotary_interleaved=False), "rope"),
    ]
    for spec, message in cases:
        with pytest.raises(UserError, match=message):
            write("gguf", RandomSource(spec, pieces), tmp_path / "gguf")
    moe = spec_of("mixtral").experts
    assert moe is not None
    spec = spec_of("mixtral").with_experts(dataclasses.replace(moe, router="activation"))
    with pytest.raises(UserError, match="convert demoefy writes the dense model"):
        write("gguf", RandomSource(spec, pieces), tmp_path / "gguf")


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, pieces: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[gguf\]'"):
        write("gguf", RandomSource(spec_of("llama"), pieces), tmp_path / "gguf")


# --- files that are broken --------------------------------------------------------------------------------------------


def test_broken_files_are_refused(pieces: Path, tmp_path: Path) -> None:
    _, file, _ = made("llama", pieces, tmp_path / "gguf")
    whole = file.read_bytes()
    for name, content, message in (
        ("cut", whole[:-4096], "cut short or damaged"),
        ("header", whole[:200], "cut short or damaged"),
        ("other", b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        (
            "arch",
            whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0xxxxx", 1),
            "'xxxxx', which is not read",
        ),
        ("name", whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", 1), "'blk.1.ffn_up.weight' is missing"),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_model(path)
    (tmp_path / "gguf" / "second.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"has 2 GGUF files; name one of them: model-f32.gguf, second.gguf"):
        open_model(tmp_path / "gguf")


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_verbs(run: Callable[..., str], refused: Refused, pieces: Path, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "hf", pieces)
    printed = run("hf-to-gguf", tmp_path / "hf", tmp_path / "gguf", "--type", "q8_0")
    assert "llama-cli -m" in printed and "ollama create" in printed
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "FROM ./model-q8_0.gguf\n" in modelfile
    assert "equal" not in run("verify", tmp_path / "gguf").splitlines()[0]
    run("gguf-to-hf", tmp_path / "gguf", tmp_path / "back", "--dtype", "bfloat16")
    assert open_model(tmp_path / "back").config == dataclasses.replace(
        open_model(tmp_path / "hf").config, initializer_range=open_model(tmp_path / "back").config.initializer_range
    )
    run("gguf-to-jax", tmp_path / "gguf" / "model-q8_0.gguf", tmp_path / "jax")
    run("jax-to-gguf", tmp_path / "jax", tmp_path / "again", "--type", "q8_0")
    first, second = (tmp_path / name / "model-q8_0.gguf" for name in ("gguf", "again"))
    for name, tensor in contents(first)[1].items():
        assert np.array_equal(tensor.data, contents(second)[1][name].data), name  # packing is stable
    assert "is a GGUF file already" in refused("hf-to-gguf", tmp_path / "gguf", tmp_path / "no")
    message = refused("gguf-to-jax", tmp_path / "hf", tmp_path / "no")
    assert "is a Hugging Face model, not a GGUF file: use convert hf-to-jax" in message


def test_an_adapter_is_merged_into_a_file(
    run: Callable[..., str], refused: Refused, pieces: Path, tmp_path: Path
) -> None:
    model = make_hf_model(vocab_size=VOCAB, hidden_size=32)
    model.save_pretrained(tmp_path / "base")
    for file in pieces.iterdir():
        shutil.copyfile(file, tmp_path / "base" / file.name)
    make_adapter(model, tmp_path / "adapter")
    words = ("merge", tmp_path / "base", tmp_path / "adapter")
    run(*words, tmp_path / "one", "--format", "gguf", "--type", "q8_0")
    run(*words, tmp_path / "merged")
    run("hf-to-gguf", tmp_path / "merged", tmp_path / "two", "--type", "q8_0")
    first, second = (contents(tmp_path / name / "model-q8_0.gguf")[1] for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)
    assert "--type q8_0: is for --format gguf" in refused(*words, tmp_path / "no", "--type", "q8_0")


def test_the_commands_types_are_those_of_the_format() -> None:
    assert get_args(TypeName) == GGUF_TYPES


def test_python_has_it_too(pieces: Path, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path / "hf", pieces)
    written = convert(tmp_path / "hf", tmp_path / "gguf", "gguf", gguf_type="bf16")
    assert set(written.files) >= {"model-bf16.gguf", "Modelfile"}
    with pytest.raises(UserError, match="gguf_type: 'q8_0' is for conversions to gguf"):
        convert(tmp_path / "hf", tmp_path / "jax", "jax", gguf_type="q8_0")


# --- what others make of it -------------------------------------------------------------------------------------------


def logits(source: Any, ids: list[int]) -> np.ndarray:
    """By jaxlm, in float32."""
    import jax.numpy as jnp

    from jaxlm.models.decoder import Decoder

    tree: dict[str, Any] = {}
    for path in source.leaves:
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = jnp.asarray(source.read(path, ()).astype(np.float32))
    return np.asarray(Decoder(source.config, remat="none").apply({"params": tree}, jnp.asarray([ids])))[0]


IDS = [1, *range(5, 370, 15)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "bloom"])  # all that it reads in full
def test_transformers_computes_the_same(name: str, pieces: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source, file, _ = made(name, pieces, tmp_path / "gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype="float32")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(source, IDS), theirs, rtol=0, atol=5e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(name: str, pieces: Path, tmp_path: Path) -> None:
    """Needs llama-cpp-python, which is built for the machine that it runs on."""
    reason = "llama-cpp-python is not installed: pip install 'jaxlm[peers]', which compiles it"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    source, file, _ = made(name, pieces, tmp_path / "gguf")
    model = llama_cpp.Llama(
        str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, flash_attn=False
    )
    model.eval(IDS)
    theirs, ours = np.array(model.scores[: len(IDS)]), logits(source, IDS)
    # Its GELU is a table of float16.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-2 if name.startswith(("gemma", "bloom")) else 5e-5)
    best = np.sort(ours, axis=-1)
    clear = best[:, -1] - best[:, -2] > 0.1
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    tokenizer = load_tokenizer(pieces)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, True).ids
