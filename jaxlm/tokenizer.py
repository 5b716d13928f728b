"""Text to token ids and back: SentencePiece `.model` files and Hugging Face `tokenizer.json` files behind one class.

The heavy libraries are imported when a tokenizer is loaded, so that importing this module is cheap.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxlm.errors import UserError
from jaxlm.modalities import MODALITIES_FILE, Modalities, Modality, Run
from jaxlm.modalities import load as load_modalities

# Everything that belongs to a tokenizer and travels with it.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    MODALITIES_FILE,
)

# Unicode noncharacters: no text holds them, so they can mark places in a rendered chat.
MARK_BEGIN, MARK_END = "\ufdd0", "\ufdd1"

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text.

    Args:
        ids: token ids, without bos and eos.
        offsets: for each token the characters [begin, end) of the text that it stands for. A space that SentencePiece
            puts in front of the text stands for none. Every byte of a character spelled in bytes has that character.
    """

    ids: list[int]
    offsets: Offsets


@dataclass(frozen=True)
class AddedToken:
    """A token beyond the trained vocabulary: `special` ones are left out when decoding."""

    content: str
    id: int
    special: bool


class _Backend(Protocol):
    size: int
    special_ids: frozenset[int]

    def encode(self, texts: Sequence[str], special_tokens: bool | None) -> list[Encoding]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token(self, index: int) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class _SentencePiece:
    """SentencePiece's own library, plus added tokens that stand beside the model file."""

    def __init__(self, path: Path, added: Sequence[AddedToken]) -> None:
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model ({error}); copy the file again. LLaMA 3's tokenizer.model from "
                "Meta is of another kind: convert meta-to-hf or meta-to-jax make a tokenizer.json of it"
            ) from None
        trained = self.model.vocab_size()
        self.added = {token.content: token.id for token in added if token.id >= trained}
        self.names = {index: content for content, index in self.added.items()}
        self.size = max([trained, *(index + 1 for index in self.names)])
        self.control = {
            self.model.id_to_piece(i): i for i in range(trained) if self.model.is_control(i) or self.model.is_unknown(i)
        }
        self.special_ids = frozenset(self.control.values()) | {t.id for t in added if t.special}
        self.bos, self.eos, self.unk = (
            index if index >= 0 else None for index in (self.model.bos_id(), self.model.eos_id(), self.model.unk_id())
        )

    def encode(self, texts: Sequence[str], special_tokens: bool | None) -> list[Encoding]:
        names = {**self.added, **self.control} if special_tokens else self.added
        if not names:
            return [self._encoding(item) for item in self._encode_plain(list(texts))]
        # Longest first, so that a token which begins another does not win.
        pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
        fragments: list[tuple[int, int, str]] = []  # (text number, first character, fragment)
        specials: list[tuple[int, int, str]] = []
        for number, text in enumerate(texts):
            last = 0
            for match in pattern.finditer(text):
                fragments.append((number, last, text[last : match.start()]))
                specials.append((number, match.start(), match.group()))
                last = match.end()
            fragments.append((number, last, text[last:]))
        pieces: list[list[tuple[int, list[int], Offsets]]] = [[] for _ in texts]
        for (number, begin, _), item in zip(fragments, self._encode_plain([f[2] for f in fragments]), strict=True):
            encoding = self._encoding(item)
            pieces[number].append((begin, encoding.ids, [(a + begin, b + begin) for a, b in encoding.offsets]))
        for number, begin, name in specials:
            pieces[number].append((begin, [names[name]], [(begin, begin + len(name))]))
        result = []
        for parts in pieces:
            # An empty fragment may share its place with the special token behind it: it has no ids, so order is free.
            parts.sort(key=lambda part: part[0])
            result.append(Encoding([i for p in parts for i in p[1]], [o for p in parts for o in p[2]]))
        return result

    def _encode_plain(self, texts: list[str]) -> list[Any]:
        result: list[Any] = self.model.encode(texts, return_type="offset_mapping")
        return result

    def _encoding(self, item: Mapping[str, Any]) -> Encoding:
        ids, offsets = list(item["ids"]), list(item["offsets"])
        # Bytes of one character come as (n, n) … (n, n + 1): give each of them the whole character.
        for k in range(len(ids) - 2, -1, -1):
            begin, end = offsets[k]
            if begin == end == offsets[k + 1][0] and self.model.is_byte(ids[k]):
                offsets[k] = offsets[k + 1]
        return Encoding(ids, offsets)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        # Runs of ordinary pieces are decoded by SentencePiece; special and added tokens are written out between them.
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self.special_ids or index in self.names:
                if run:
                    parts.append(self.model.decode(run))
                    run = []
                if not (skip_special and index in self.special_ids):
                    parts.append(self.token(index))
            else:
                run.append(index)
        if run:
            parts.append(self.model.decode(run))
        return "".join(parts)

    def token(self, index: int) -> str:
        return self.names[index] if index in self.names else str(self.model.id_to_piece(index))

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        index = int(self.model.piece_to_id(token))
        return index if self.model.id_to_piece(index) == token else None


class _Fast:
    """The `tokenizers` library, reading tokenizer.json."""

    def __init__(self, path: Path, added: Sequence[AddedToken]) -> None:
        import tokenizers

        # The library raises the bare Exception for whatever it dislikes, so look before asking it.
        content = _read_json(path)
        if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
            raise UserError(f"{path} is not a tokenizer.json: it has no 'model'; copy the file again")
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()
        self.model.no_padding()
        for token in sorted(added, key=lambda item: item.id):
            if self.model.token_to_id(token.content) is None:
                new = tokenizers.AddedToken(token.content, special=token.special, normalized=False)
                self.model.add_tokens([new])
                if self.model.token_to_id(token.content) != token.id:
                    raise UserError(
                        f"{path.parent}: the added token {token.content!r} should have id {token.id}, "
                        f"but tokenizer.json leaves {self.model.token_to_id(token.content)} for it"
                    )
        decoder = self.model.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in decoder.items() if token.special)
        self.size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], special_tokens: bool | None) -> list[Encoding]:
        self.model.encode_special_tokens = special_tokens is False
        encoded = self.model.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(item.ids, item.offsets) for item in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self.model.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, index: int) -> str:
        return self.model.id_to_token(index) or ""

    def id_of(self, token: str) -> int | None:
        index: int | None = self.model.token_to_id(token)
        return index


class Tokenizer:
    """A tokenizer; make one with `load_tokenizer`.

    Special tokens written out in a text ("</s>", "<|eot_id|>"): a `tokenizer.json` turns them into the special token,
    as Hugging Face does. A SentencePiece `.model` does not, as SentencePiece itself does not (Hugging Face's LLaMA
    tokenizer would): what a user types cannot end a document. Pass special_tokens=True or False to `encode` to choose.
    Tokens added beside a `.model` file (added_tokens.json) are always recognised.

    Attributes:
        vocab_size: largest id + 1, added tokens included: rows the embedding must have.
        bos_id, eos_id, pad_id, unk_id: ids, or None where the tokenizer has no such token.
        special_ids: ids that decode(skip_special=True) leaves out.
        chat_template: the Jinja source, or None.
        modalities: those with tokens of their own, `<smiles>CCO</smiles>` in texts; see `jaxlm.modalities`.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        backend: _Backend,
        settings: Mapping[str, Any],
        modalities: Sequence[Modality] = (),
    ) -> None:
        self.path = path
        self.modalities = tuple(modalities)
        self._modalities = Modalities(modalities) if modalities else None
        self._files = tuple(files)
        self._backend = backend
        self.vocab_size = backend.size
        self.special_ids = backend.special_ids
        self.chat_template: str | None = settings.get("chat_template")
        own = {name: getattr(backend, name, None) for name in ("bos", "eos", "unk", "pad")}
        for name in own:
            token = settings.get(f"{name}_token")
            if token:
                index = backend.id_of(token)
                if index is None:
                    raise UserError(f"{path}: {name}_token is {token!r}, which the vocabulary does not have")
                own[name] = index
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = own["bos"], own["eos"], own["unk"], own["pad"]

    def encode(self, text: str, special_tokens: bool | None = None) -> Encoding:
        """Tokens of `text` without bos and eos. special_tokens: see the class.

        Raises:
            TextError: (see `jaxlm.modalities`) tags that are not in pairs, or what a modality has no token for.
        """
        return self.encode_batch([text], special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], special_tokens: bool | None = None) -> list[Encoding]:
        """`encode` of every text, on all cores."""
        if self._modalities is None:
            return self._backend.encode(texts, special_tokens)
        split = [self._modalities.split(text, number) for number, text in enumerate(texts)]
        plain = [
            text[run.begin : run.end] for text, runs in zip(texts, split, strict=True) for run in runs if not run.ids
        ]
        encoded = iter(self._backend.encode(plain, special_tokens))
        return [_joined(runs, encoded) for runs in split]

    def decode(self, ids: Iterable[int], skip_special: bool = True, open_end: bool = False) -> str:
        """Text of `ids`. An id beyond the vocabulary (embeddings are often padded to a round number) gives nothing.

        Args:
            open_end: more ids may follow: a modality at the end is not closed.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        if self._modalities is None:
            return self._backend.decode(known, skip_special)
        return self._modalities.decode(known, lambda run: self._backend.decode(run, skip_special), open_end)

    def token(self, index: int) -> str:
        """The piece with this id as the vocabulary spells it ("▁the"); empty for an unused id."""
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"token id {index} is outside of the vocabulary of {self.vocab_size}")
        return self._backend.token(index)

    def id_of(self, token: str) -> int | None:
        """Id of a piece, or None when the vocabulary does not have it."""
        return self._backend.id_of(token)

    def special_tokens(self) -> list[str]:
        """The written forms of all special tokens, e.g. ["<s>", "</s>"]."""
        return [self.token(index) for index in sorted(self.special_ids)]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        keep_marks: bool = False,
    ) -> str:
        """`messages` ({"role", "content"}) as the chat template writes them, bos included where the template has it.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the opening of the assistant's turn.
            keep_marks: leave MARK_BEGIN and MARK_END around what the template has in {% generation %} blocks.

        Raises:
            UserError: no chat template, or the template refuses the messages or is broken.
        """
        import jinja2

        if self.chat_template is None:
            raise UserError(
                f"{self.path}: this tokenizer has no chat template; choose another data template "
                "(e.g. vicuna_v1.1), or put a chat_template.jinja beside the tokenizer"
            )
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        try:
            text: str = compile_chat_template(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: self.token(index) for name, index in names.items() if index is not None},
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.path}: the chat template does not accept this conversation: {error}") from None
        return text if keep_marks else text.replace(MARK_BEGIN, "").replace(MARK_END, "")

    def save(self, directory: str | Path) -> None:
        """Copies the tokenizer's files as they came; a single file gets the name that `load_tokenizer` looks for."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            # copyfile, not copy: a read-only original would leave files that cannot be replaced.
            shutil.copyfile(file, directory / (f"tokenizer{file.suffix}" if file == self.path else file.name))


def _joined(runs: Sequence[Run], encoded: Iterator[Encoding]) -> Encoding:
    """The runs of one text, plain ones taken from `encoded`."""
    ids: list[int] = []
    offsets: Offsets = []
    for run in runs:
        if run.ids:
            ids += run.ids
            offsets += run.offsets
        else:
            part = next(encoded)
            ids += part.ids
            offsets += [(begin + run.begin, end + run.begin) for begin, end in part.offsets]
    return Encoding(ids, offsets)


@functools.cache
def compile_chat_template(source: str) -> Any:
    """The Jinja template of a chat template, in a sandbox with what Hugging Face offers to templates.

    A chat template is code out of a downloaded file: the immutable sandbox keeps it from touching anything.
    """
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.ext import loopcontrols as loop_controls
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (the attribute that Jinja reads)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{MARK_BEGIN}{caller()}{MARK_END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter escapes HTML, which would put \u003c into prompts.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loop_controls]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a directory, a SentencePiece `.model` file or a `tokenizer.json` file.

    A directory with both kinds is read through tokenizer.json. The settings files beside it are read too.

    Raises:
        UserError: nothing to load there, or a file is broken.
    """
    path = Path(path)
    if path.is_dir():
        directory = path
        main = next((path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), None)
        if main is None:
            parts = [n for n in ("vocab.json", "merges.txt", "vocab.txt", "tekken.json") if (path / n).is_file()]
            if parts:
                load = "from transformers import AutoTokenizer as T; "
                once = f"{load}T.from_pretrained('{path}').save_pretrained('{path}')"
                raise UserError(
                    f"{path} has {' and '.join(parts)}, but no tokenizer.json, which transformers makes of them. "
                    f'Run once: python -c "{once}"'
                )
            raise UserError(
                f"{path} holds no tokenizer: neither tokenizer.json nor tokenizer.model; "
                "copy one there, or set tokenizer.path"
            )
        files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    elif path.is_file():
        directory, main = path.parent, path
        # A settings file belongs to the tokenizer only if it stands beside a file with the usual name.
        usual = path.name in ("tokenizer.json", "tokenizer.model")
        names = [n for n in TOKENIZER_FILES if usual and n not in ("tokenizer.json", "tokenizer.model")]
        files = [path, *(directory / name for name in names if (directory / name).is_file())]
    else:
        raise UserError(f"tokenizer: {path} does not exist")
    settings = _settings(directory, [file.name for file in files])
    added = _added_tokens(directory, [file.name for file in files])
    backend: _Backend
    if main.suffix == ".json":
        backend = _Fast(main, added)
    elif main.suffix == ".model":
        backend = _SentencePiece(main, added)
    else:
        raise UserError(f"tokenizer: {path} is neither a directory nor a .model or tokenizer.json file")
    beside = next((file for file in files if file.name == MODALITIES_FILE), None)
    modalities = [] if beside is None else load_modalities(beside, backend.id_of)
    return Tokenizer(path, files, backend, settings, modalities)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the file again") from None


def _settings(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """bos_token, eos_token, unk_token, pad_token and chat_template of the settings files."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in names:
            config.update({key: value for key, value in _read_json(directory / name).items() if value is not None})
    result = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        result[key] = value.get("content") if isinstance(value, dict) else value
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    if "chat_template.jinja" in names:
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    result["chat_template"] = template
    return result


def _added_tokens(directory: Path, names: Sequence[str]) -> list[AddedToken]:
    found: dict[str, AddedToken] = {}
    if "added_tokens.json" in names:
        for content, index in _read_json(directory / "added_tokens.json").items():
            found[content] = AddedToken(content, int(index), False)
    if "tokenizer_config.json" in names:
        decoder = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for index, item in decoder.items():
            found[item["content"]] = AddedToken(item["content"], int(index), bool(item.get("special")))
    return list(found.values())


def train_sentencepiece(files: Sequence[Path], vocab_size: int, directory: Path) -> Tokenizer:
    """Trains a SentencePiece BPE model with LLaMA's conventions and writes it with what Hugging Face needs.

    unk 0, bos 1, eos 2, bytes for unknown characters, digits apart, a space put in front, no normalisation, spaces
    kept. The same files give the same model. A text too small for vocab_size gives a smaller vocabulary: see
    `Tokenizer.vocab_size`.

    Args:
        files: UTF-8 text files.
        vocab_size: pieces wanted; at least 260 (256 bytes, three control pieces, one character).
        directory: where tokenizer.model, tokenizer.json and tokenizer_config.json are written.

    Raises:
        UserError: a file is missing or not UTF-8, the files hold no text, or vocab_size is too small.
    """
    import collections
    import io

    import sentencepiece

    def lines() -> Iterable[str]:
        for file in files:
            try:
                with Path(file).open(encoding="utf-8") as stream:
                    yield from (line.rstrip("\r\n") for line in stream if line.strip())
            except FileNotFoundError:
                raise UserError(f"tokenizer.train_on: {file} does not exist") from None
            except UnicodeDecodeError as error:
                raise UserError(f"tokenizer.train_on: {file} is not UTF-8 text ({error})") from None

    if vocab_size < 260:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}; it must be at least 260 (256 of them are bytes)")
    characters = collections.Counter(char for line in lines() for char in line)
    if not characters:
        raise UserError(f"tokenizer.train_on: no text in {', '.join(map(str, files)) or 'the empty list'}")
    # Where the vocabulary is too small for all characters and some merges, the rare ones are left to bytes. The
    # library's own character_coverage may not go below 0.98, so they are taken out of the text instead.
    kept = {char for char, _ in characters.most_common((vocab_size - 258) // 2)}
    texts = ["".join(char if char in kept else " " for char in line) for line in lines()]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"tokenizer.vocab_size {vocab_size} does not fit these texts: {error}") from None
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    _write_fast_files(directory)
    return load_tokenizer(directory)


def _write_fast_files(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the SentencePiece BPE model in `directory`.

    SentencePiece merges the pair whose piece has the best score; `tokenizers` wants the pairs in that order.
    """
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges: list[tuple[str, str]] = []
    ordinary = [
        (model.get_score(i), piece)
        for piece, i in vocabulary.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    for _, piece in sorted(ordinary, key=lambda item: -item[0]):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    fast = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")]
    )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    fast.save(str(directory / "tokenizer.json"))
    config = {
        # Not LlamaTokenizer: that class rebuilds its rules and drops the space put before a leading space.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
