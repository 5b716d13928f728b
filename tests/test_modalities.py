"""Texts with molecules, proteins and nucleic acids to tokens and back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import ModalityConfig
from jaxlm.errors import UserError
from jaxlm.modalities import PRESETS, Modalities, TextError, resolve
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxlm.tokenizer.extending import write_extended

SCIMIND = [ModalityConfig(preset=name) for name in ("smiles", "nucleic", "protein")]
SAMPLES = Path(__file__).parents[1] / "../shared/data"


def extended(base: Path, target: Path, entries: list[ModalityConfig]) -> Tokenizer:
    """A copy of a tokenizer with the tokens of modalities."""
    target.mkdir()
    tokenizer = load_tokenizer(base)
    modalities = resolve(entries, tokenizer.vocab_size)
    tokens = [token for modality in modalities for token in modality.tokens()]
    write_extended(sorted(base.iterdir()), tokenizer, tokens, False, target, modalities)
    return load_tokenizer(target)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    text = "the molecule is an alcohol and a protein of water\nThe answer is CCO, not C\n" * 30
    (directory / "corpus.txt").write_text(text, encoding="utf-8")
    train_sentencepiece([directory / "corpus.txt"], 400, directory / "out")
    return directory / "out"


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def kind(base: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary read by either library."""
    directory = tmp_path_factory.mktemp("kind") / "base"
    shutil.copytree(base, directory)
    for name in {"tokenizer.json", "tokenizer.model"} - {request.param}:
        (directory / name).unlink()
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["scimind", "tags"])
def tokenizer(kind: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    entries = [dataclasses.replace(entry, tag_tokens=request.param) for entry in SCIMIND]
    return extended(kind, tmp_path_factory.mktemp("extended") / "out", entries)


def test_presets_have_scimind_ids() -> None:
    """COMPAT's table: 66 characters from 32000 on, G A C T U from 32066, 27 amino acids and signs to 32097."""
    smiles, nucleic, protein = resolve(SCIMIND, 32000)
    assert (smiles.range, nucleic.range, protein.range) == ((32000, 32066), (32066, 32071), (32071, 32098))
    assert smiles.spelled()[:6] == ["{|C|}", "{|1|}", "{|(|}", "{|O|}", "{|c|}", "{|2|}"]
    assert smiles.spelled()[-1] == "{|m|}" and nucleic.spelled() == ["*|G|*", "*|A|*", "*|C|*", "*|T|*", "*|U|*"]
    assert protein.spelled()[0] == "<|L|>" and protein.spelled()[-2:] == ["<|.|>", "<|-|>"]


def test_every_piece_is_a_token(tokenizer: Tokenizer) -> None:
    first, tagged = tokenizer.modalities[0].first, tokenizer.modalities[0].tag_tokens
    found = tokenizer.encode("the molecule <smiles>CCl</smiles> is").ids
    pieces = [first, first, first + PRESETS["smiles"].tokens.index("l")]
    middle = [first - 2, *pieces, first - 1] if tagged else pieces
    before, after = tokenizer.encode("the molecule ").ids, tokenizer.encode(" is").ids
    assert found == before + middle + after
    # The offline spelling of the published data gives the same pieces.
    assert tokenizer.encode("{|C|}{|C|}{|l|}").ids == pieces


TEXTS = [
    "",
    "no molecule here",
    "<smiles>CCO</smiles>",
    " <smiles>C</smiles> ",
    "a  <smiles>C[C@@H](N)C(=O)O</smiles>, two  spaces and <protein>MKV</protein><nucleic>GATTACA</nucleic>\n\n end \n",
    "<protein>L</protein> then <protein>L</protein>",
    "é € 水 <smiles>c1ccccc1</smiles>水\t",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_as_they_were(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text
    assert len(encoding.ids) == len(encoding.offsets)
    assert tokenizer.encode_batch([text, "x", text])[2] == encoding


plain = st.text(st.characters(exclude_characters="<>{}|*\ufffd", codec="utf-8", exclude_categories=("Cc",)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            plain,
            st.text("CNO()=#1[]@H", min_size=1, max_size=6).map("<smiles>{}</smiles>".format),
            st.text("GACTU", min_size=1, max_size=4).map("<nucleic>{}</nucleic>".format),
        ),
        max_size=6,
    )
)
def test_any_text_comes_back_or_is_refused(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    try:
        ids = tokenizer.encode(text).ids
    except TextError as error:
        assert "with nothing between them" in str(error) and not tokenizer.modalities[0].tag_tokens
        return
    assert tokenizer.decode(ids) == text


def test_offsets_cover_the_text(tokenizer: Tokenizer) -> None:
    """Every character of a molecule is covered by its token, so that an answer is trained from first to last."""
    text = "is <smiles>CCl</smiles> so"
    encoding = tokenizer.encode(text)
    by_piece = {text[begin:end] for begin, end in encoding.offsets}
    assert {"C", "l"} <= by_piece
    assert encoding.offsets[-1][1] == len(text)
    if tokenizer.modalities[0].tag_tokens:
        assert {"<smiles>", "</smiles>"} <= by_piece


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a <smiles>CC", ["<smiles> at character 2", "</smiles>"]),
        ("a CC</smiles>", ["</smiles> at character 4", "<smiles>"]),
        ("<smiles>C<smiles>C</smiles></smiles>", ["<smiles> at character 0", "before <smiles> at character 9"]),
        ("<smiles>C</protein>", ["</protein> at character 9"]),
        ("the <smiles>C*C</smiles>", ["'*' at character 13", "smiles", "fallback: text"]),
        ("<nucleic>GAX</nucleic>", ["'X' at character 11", "nucleic"]),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tokenizer: Tokenizer, text: str, wanted: list[str]) -> None:
    with pytest.raises(TextError) as caught:
        tokenizer.encode_batch(["fine", text])
    assert caught.value.number == 1
    assert all(word in str(caught.value) for word in wanted), caught.value


def test_what_cannot_come_back_is_refused_without_tag_tokens(tokenizer: Tokenizer) -> None:
    texts = ["<smiles></smiles>", "<smiles>C</smiles><smiles>C</smiles>"]
    for text in texts:
        if tokenizer.modalities[0].tag_tokens:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
        else:
            with pytest.raises(TextError, match="nothing"):
                tokenizer.encode(text)


@pytest.mark.parametrize("tag_tokens", [False, True])
def test_unknown_pieces_may_be_read_as_plain_text(kind: Path, tmp_path: Path, tag_tokens: bool) -> None:
    entry = ModalityConfig(preset="smiles", fallback="text", tag_tokens=tag_tokens)
    tokenizer = extended(kind, tmp_path / "out", [entry])
    text = "known <smiles>CC</smiles>, unknown <smiles>C*C</smiles>."
    ids = tokenizer.encode(text).ids
    start, stop = tokenizer.modalities[0].range
    assert sum(start <= index < stop for index in ids) == 2
    assert tokenizer.decode(ids) == text


def test_stripping_gives_scimind_ids(base: Path, tmp_path: Path) -> None:
    """White space beside a molecule is dropped, and each text between is encoded by itself."""
    tokenizer = extended(base, tmp_path / "out", [ModalityConfig(preset="smiles", strip=True)])
    plain = load_tokenizer(base)
    first = tokenizer.modalities[0].first
    found = tokenizer.encode("the molecule  <smiles>CC</smiles>\n is ").ids
    assert found == [*plain.encode("the molecule").ids, first, first, *plain.encode("is ").ids]
    with pytest.raises(TextError, match="nothing between"):
        tokenizer.encode("<smiles>C</smiles> <smiles>C</smiles>")


def test_real_molecules_come_back(base: Path, tmp_path: Path) -> None:
    """SciMind's 66 characters spell the published molecules; so do atoms, in fewer tokens."""
    file = SAMPLES / "lpm24_smiles_3000.txt"
    if not file.is_file():
        pytest.skip("the real samples are not at hand")
    molecules = file.read_text().split()
    texts = [f"<smiles>{molecule}</smiles>" for molecule in molecules]
    lengths = {}
    for preset in ("smiles", "smiles_atoms"):
        modalities = Modalities(resolve([ModalityConfig(preset=preset)], 100))
        ids = [run.ids for text in texts for run in modalities.split(text, 0)]
        assert [modalities.decode(each, lambda _: "?", False) for each in ids] == texts
        lengths[preset] = sum(map(len, ids))
    assert lengths["smiles"] == sum(map(len, molecules))
    assert lengths["smiles_atoms"] < lengths["smiles"] + 2 * len(molecules)


def test_atoms_are_tokens() -> None:
    (modality,) = resolve([ModalityConfig(preset="smiles_atoms")], 0)
    modalities = Modalities([modality])

    def pieces(smiles: str) -> list[str]:
        (run,) = modalities.split(f"<smiles>{smiles}</smiles>", 0)
        return [modality.pieces[index - modality.first] for index in run.ids[1:-1]]

    assert pieces("CCl") == ["C", "Cl"]
    assert pieces("CSc1cn(Br)c1") == ["C", "S", "c", "1", "c", "n", "(", "Br", ")", "c", "1"]
    assert pieces("[Sc+3][C@@H]Cn") == ["[", "Sc", "+", "3", "]", "[", "C", "@@", "H", "]", "C", "n"]
    assert pieces("c1[se]cc1.[Na+]") == ["c", "1", "[", "se", "]", "c", "c", "1", ".", "[", "Na", "+", "]"]


def test_runs_that_are_not_whole_are_decoded(tokenizer: Tokenizer) -> None:
    modality = tokenizer.modalities[0]
    run = [modality.first, modality.first]
    if modality.tag_tokens:
        # A model may leave the tags out: the delimiters then say what the tokens are.
        assert tokenizer.decode(run) == "{|C|}{|C|}"
        assert tokenizer.decode([modality.first - 2, *run]) == "<smiles>CC"
    else:
        assert tokenizer.decode(run) == "<smiles>CC</smiles>"
        assert tokenizer.decode(run, open_end=True) == "<smiles>CC"
    assert tokenizer.encode(tokenizer.decode(run)).ids == run


def test_transformers_reads_the_pieces(base: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tokenizer = extended(base, tmp_path / "out", SCIMIND)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the molecule {|C|}{|C|}{|O|} and <|L|><|V|> is"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).ids


def test_a_file_of_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    extended(base, tmp_path / "out", SCIMIND)
    content = json.loads((tmp_path / "out" / "modalities.json").read_text())
    content["modalities"][0]["first"] += 1
    (tmp_path / "out" / "modalities.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'\{\|C\|\}' of smiles should have id 375, the tokenizer"):
        load_tokenizer(tmp_path / "out")
    assert content["version"] == 1
    content["version"] = 2
    (tmp_path / "out" / "modalities.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"modalities\.json: its version is 2; this jaxlm reads versions up to 1"):
        load_tokenizer(tmp_path / "out")
    (tmp_path / "out" / "modalities.json").write_text('{"modalities": [{}]}')
    with pytest.raises(UserError, match=r"modalities\.json"):
        load_tokenizer(tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({}, "say its name"),
        ({"preset": "smile"}, "'smile' is not one of smiles, nucleic"),
        ({"name": "text", "tokens": ("A",)}, "not 'text'"),
        ({"name": "x"}, "has no tokens"),
        ({"name": "x", "tokens": ("A", "A")}, "'A' is there twice"),
        ({"name": "x", "tokens": ("AB",)}, "'AB' has several characters"),
        ({"name": "x", "tokens": ("A",), "pattern": "("}, "not a regular expression"),
        ({"name": "x", "tokens": ("A",), "pattern": "A*"}, "matches nothing"),
        ({"name": "x", "tokens": ("A",), "delimiters": ("", "|")}, "delimiters"),
        ({"name": "x", "tokens": ("A",), "tags": ("<x>", "<x>")}, "two different"),
        ({"name": "x", "tokens_file": "/none/such"}, "tokens_file /none/such"),
    ],
)
def test_bad_modalities_are_refused(entry: dict[str, object], wanted: str) -> None:
    with pytest.raises(UserError, match="modalit") as caught:
        resolve([ModalityConfig(**entry)], 10)  # type: ignore[arg-type]
    assert wanted in str(caught.value)


def test_two_modalities_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="the name 'smiles'"):
        resolve([ModalityConfig(preset="smiles"), ModalityConfig(preset="smiles_atoms")], 0)
    with pytest.raises(UserError, match="two of them have the token"):
        resolve([ModalityConfig(preset="smiles"), ModalityConfig(preset="smiles_atoms", name="atoms")], 0)
