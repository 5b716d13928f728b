"""The tokenizer: what it does with texts, ids and conversations, whichever library splits the texts."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.locate import on_disk
from jaxlm.modalities import MODALITIES_FILE, Modalities, Modality, Run
from jaxlm.modalities import load as load_modalities
from jaxlm.tokenizer import chatglm, chatglm_6b, spiece
from jaxlm.tokenizer.backends import Backend, Encoding, Fast, Offsets, SentencePiece, as_arrays, read_fast, read_gpt2
from jaxlm.tokenizer.chat import MARK_BEGIN, MARK_END, ChatError, compile_chat_template
from jaxlm.tokenizer.files import MAIN_FILES, find_tokenizer_files, main_file
from jaxlm.tokenizer.segments import Ids
from jaxlm.tokenizer.settings import Settings, added_tokens, read_settings


class Tokenizer:
    """A tokenizer; make one with `load_tokenizer`.

    Special tokens written out in a text ("</s>", "<|eot_id|>"): a `tokenizer.json` turns them into the special token,
    as Hugging Face does. A SentencePiece `.model` does not, as SentencePiece itself does not (Hugging Face's LLaMA
    tokenizer would): what a user types cannot end a document. Pass special_tokens=True or False to `encode` to choose.
    Tokens added beside a `.model` file (added_tokens.json) are always recognised.

    Attributes:
        vocab_size: largest id + 1, added tokens included: rows the embedding must have.
        bos_id, eos_id, pad_id, unk_id: ids, or None where the tokenizer has no such token.
        special_ids: ids that decode(skip_special=True) leaves out: what is marked as special, and every token that
            plays a role by the settings files (as in transformers).
        end_ids: ids that end an answer: eos, and what generation_config.json names besides.
        adds_bos, adds_eos: whether the tokenizer itself puts bos in front of a text and eos behind it.
        adds_why: which file says so.
        opening: the ids that "bos" stands for: what the post-processor puts in front, else bos_id.
        opens_answers: `opening` stands between a prompt and its answer (ChatGLM-6B), not in front of the prompt.
        chat_template: the Jinja source, or None.
        date: the date for chat templates that ask for it; None: the present.
        modalities: those with tokens of their own, `<smiles>CCO</smiles>` in texts; see `jaxlm.modalities`.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        backend: Backend,
        settings: Settings,
        modalities: Sequence[Modality] = (),
    ) -> None:
        self.path = path
        self.modalities = tuple(modalities)
        self._modalities = Modalities(modalities) if modalities else None
        self._files = tuple(files)
        self._backend = backend
        self.vocab_size = backend.size
        self.special_ids = backend.special_ids
        self.chat_template = settings.chat_template
        self.date: datetime | None = None
        own = {name: getattr(backend, name, None) for name in ("bos", "eos", "unk", "pad")}
        for name in own:
            token = settings.roles.get(f"{name}_token")
            if token:
                index = backend.id_of(token)
                if index is None:
                    raise UserError(f"{path}: {name}_token is {token!r}, which the vocabulary does not have")
                own[name] = index
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = own["bos"], own["eos"], own["unk"], own["pad"]
        ends = [index for index in (self.eos_id, *settings.end_ids) if index is not None and index < self.vocab_size]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.opening = backend.opening or (() if self.bos_id is None else (self.bos_id,))
        self.adds_bos, self.adds_eos, self.adds_why = _surroundings(settings, backend, self.eos_id)
        self.adds_bos &= bool(self.opening)
        self.opens_answers = backend.opens_answers

    def complete(self, bos_id: int | None, eos_id: int | tuple[int, ...] | None, pad_id: int | None) -> None:
        """Takes ids from a model's configuration where the tokenizer's own files name no token for the role.

        Galactica's name none, and mean <s>, </s> and <pad>. An id that is not that of a special token is passed over:
        it is a default of the model's class, and the tokenizer another one's.
        """
        ends = eos_id if isinstance(eos_id, tuple) else (eos_id,)
        known = [index if index in self.special_ids else None for index in (bos_id, ends[0], pad_id)]
        if self.bos_id is None:
            self.bos_id = known[0]
            self.opening = self.opening or (() if self.bos_id is None else (self.bos_id,))
        if self.eos_id is None and known[1] is not None:
            self.eos_id = known[1]
            self.end_ids = tuple(dict.fromkeys([self.eos_id, *self.end_ids]))
        if self.pad_id is None:
            self.pad_id = known[2]

    def encode(self, text: str, special_tokens: bool | None = None) -> Encoding:
        """Tokens of `text` without bos and eos. special_tokens: see the class.

        Raises:
            TextError: (see `jaxlm.modalities`) tags that are not in pairs, or what a modality has no token for.
        """
        return self.encode_batch([text], special_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        special_tokens: bool | None = None,
        continued: Sequence[bool] | None = None,
    ) -> list[Encoding]:
        """`encode` of every text, on all cores.

        Args:
            texts: the texts.
            special_tokens: see the class.
            continued: for each text, whether it goes on behind a special token: tokenizers that put a space only in
                front of what begins a text put none there.
        """
        if self._modalities is None:
            return self._backend.encode(texts, special_tokens, continued)
        split = [self._modalities.split(text, number) for number, text in enumerate(texts)]
        plain = [
            text[run.begin : run.end] for text, runs in zip(texts, split, strict=True) for run in runs if not run.ids
        ]
        encoded = iter(self._backend.encode(plain, special_tokens, None))
        return [_joined(runs, encoded) for runs in split]

    def encode_arrays(
        self,
        texts: Sequence[str],
        special_tokens: bool | None = None,
        continued: Sequence[bool] | None = None,
        with_offsets: Sequence[bool] | None = None,
    ) -> list[Ids]:
        """As `encode_batch`, as arrays and in this thread; `with_offsets`: for each text, whether they are asked for.

        Raises:
            TextError: as `encode`.
        """
        wanted = [True] * len(texts) if with_offsets is None else with_offsets
        if self._modalities is None:
            return self._backend.encode_arrays(texts, special_tokens, continued, wanted)
        return as_arrays(self.encode_batch(texts, special_tokens, continued))

    def decode(self, ids: Iterable[int], skip_special: bool = True, open_end: bool = False) -> str:
        """Text of `ids`. An id beyond the vocabulary (embeddings are often padded to a round number) gives nothing.

        Args:
            open_end: more ids may follow: a modality at the end is not closed.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        if self._modalities is None:
            return self._backend.decode(known, skip_special)
        return self._modalities.decode(known, lambda run: self._backend.decode(run, skip_special), open_end)

    @functools.cached_property
    def run_bytes(self) -> Mapping[int, int]:
        """Tokens that spell one byte, by id, where those in a row are decoded together; empty elsewhere.

        A tokenizer.json with ByteFallback writes U+FFFD for each of them where one is part of no character, also for
        those that are: what such a token says is not certain before another kind of token follows.
        """
        ids = [self.id_of(f"<0x{byte:02X}>") for byte in range(256)]
        known = {index: byte for byte, index in enumerate(ids) if index is not None}
        probe = [index for index in (ids[byte] for byte in "花".encode() + b"\xff") if index is not None]
        return known if self.decode(probe) == "\ufffd" * 4 else {}

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

    def is_end(self, index: int) -> bool:
        """Whether a token can end an answer: a special one, or one that is named as such."""
        return index in self.special_ids or index in self.end_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        keep_marks: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """`messages` ({"role", "content"}) as the chat template writes them, bos included where the template has it.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the opening of the assistant's turn.
            keep_marks: leave MARK_BEGIN and MARK_END around what the template has in {% generation %} blocks.
            tools: descriptions of tools that the assistant may call, for templates that show them.

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
        now = self.date or datetime.now()
        try:
            text: str = compile_chat_template(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) if tools else None,
                documents=None,
                strftime_now=now.strftime,
                **{name: self.token(index) for name, index in names.items() if index is not None},
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"{self.path}: the chat template does not accept this conversation: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:  # raised by its own code
            raise ChatError(f"{self.path}: the chat template fails on this conversation: {error}") from None
        return text if keep_marks else text.replace(MARK_BEGIN, "").replace(MARK_END, "")

    @property
    def asks_for_date(self) -> bool:
        """Whether what the chat template writes depends on the day."""
        return self.chat_template is not None and "strftime_now" in self.chat_template

    def save(self, directory: str | Path) -> None:
        """Copies the tokenizer's files as they came; one of another name gets one that `load_tokenizer` knows."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            # copyfile, not copy: a read-only original would leave files that cannot be replaced.
            is_named = file != self.path or file.name in MAIN_FILES
            shutil.copyfile(file, directory / (file.name if is_named else f"tokenizer{file.suffix}"))


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


def _surroundings(settings: Settings, backend: Backend, eos: int | None) -> tuple[bool, bool, str]:
    """Whether the tokenizer itself adds bos and eos, and what says so.

    tokenizer_config.json has the first word. Without it the post-processor of tokenizer.json decides; a SentencePiece
    model says nothing, so there LLaMA's rule holds: bos, but no eos. (transformers 5 asks the post-processor alone
    where there is a tokenizer.json; earlier ones asked both, depending on the class.)
    """
    bos, eos_too, why = True, False, backend.rule
    if backend.opening is not None and backend.closing is not None:
        bos, eos_too = bool(backend.opening), eos in backend.closing
    said = [
        f"{name}: {str(value).lower()}"
        for name, value in (("add_bos_token", settings.add_bos), ("add_eos_token", settings.add_eos))
        if value is not None
    ]
    if settings.add_bos is not None:
        why = f"tokenizer_config.json, {' and '.join(said)}"
        if backend.opening is not None and settings.add_bos != bool(backend.opening):
            why += " (the post_processor of tokenizer.json says otherwise)"
    bos = bos if settings.add_bos is None else settings.add_bos
    eos_too = eos_too if settings.add_eos is None else settings.add_eos
    return bos, eos_too and eos is not None, why


def _find_main(directory: Path) -> Path:
    """The file of a directory that its tokenizer is loaded from.

    Raises:
        UserError: there is none, or only such ones as transformers has to make a tokenizer.json of.
    """
    names = {file.name for file in directory.iterdir() if file.is_file()}
    main = main_file(names)
    settings = read_settings(directory, sorted(names)) if main == "vocab.json" else None
    if main and (settings is None or (settings.tokenizer_class == "GPT2Tokenizer" and "merges.txt" in names)):
        return directory / main
    parts = [name for name in ("vocab.json", "merges.txt", "vocab.txt", "tekken.json") if name in names]
    if not parts:
        raise UserError(
            f"{directory} holds no tokenizer: neither {' nor '.join(MAIN_FILES[:-1])}; "
            "copy one there, or name one (tokenizer.path in train, --tokenizer in generate)"
        )
    what = f" of the class {settings.tokenizer_class}" if settings is not None and settings.tokenizer_class else ""
    load = "from transformers import AutoTokenizer as T; "
    once = f"{load}T.from_pretrained('{directory}').save_pretrained('{directory}')"
    raise UserError(
        f"{directory} has {' and '.join(parts)}{what}, but no tokenizer.json, which transformers makes of them "
        "(without it, vocab.json and merges.txt of a GPT2Tokenizer are read). "
        f'Run once: python -c "{once}"'
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a directory, a SentencePiece `.model` file or a `tokenizer.json` file.

    A directory with both kinds is read through tokenizer.json; one with neither through vocab.json and merges.txt where
    it names the class GPT2Tokenizer, as OPT's do. The settings files beside it are read too.

    Raises:
        UserError: nothing to load there, or a file is broken.
    """
    path = on_disk(path, "small", "tokenizer")
    if path.is_dir():
        directory = path
        main = _find_main(directory)
        files = find_tokenizer_files(directory)
    elif path.is_file():
        directory, main = path.parent, path
        # A settings file belongs to the tokenizer only if it stands beside a file with the usual name.
        main_names = MAIN_FILES[:-1]
        beside_it = find_tokenizer_files(directory) if path.name in main_names else []
        files = [path, *(file for file in beside_it if file.name not in main_names)]
    else:
        raise UserError(f"tokenizer: {path} does not exist")
    names_here = [file.name for file in files]
    settings = read_settings(directory, names_here)
    added = added_tokens(directory, names_here)
    backend: Backend
    if main.name == "vocab.json":
        content = read_gpt2(main, directory / "merges.txt", settings.add_prefix_space)
        backend = Fast(main, content, added, settings.special)
    elif main.suffix == ".json":
        backend = Fast(main, read_fast(main), added, settings.special)
    elif main.name == chatglm_6b.FILE:
        backend = chatglm_6b.IceText(main, added, settings)
        settings = chatglm_6b.first_chat_settings(settings)
    elif main.suffix == ".model" and settings.tokenizer_class == chatglm.CLASS:
        own = chatglm.ChatGLM(main, added)
        backend, settings = own, chatglm.chat_settings(settings, own)
    elif main.name == spiece.FILE:
        backend = spiece.Spiece(main, added, settings)
    elif main.suffix == ".model":
        backend = SentencePiece(main, added, settings.special, settings.legacy)
    else:
        raise UserError(f"tokenizer: {path} is neither a directory nor a .model or tokenizer.json file")
    beside = next((file for file in files if file.name == MODALITIES_FILE), None)
    modalities = [] if beside is None else load_modalities(beside, backend.id_of)
    return Tokenizer(path, files, backend, settings, modalities)
