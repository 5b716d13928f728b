"""Training a SentencePiece model for a fresh model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.tokenizer.tokenizer import Tokenizer, load_tokenizer


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


def sentencepiece_merges(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of a SentencePiece BPE model in the order that the `tokenizers` library wants.

    SentencePiece merges the pair whose piece has the best score.

    Args:
        scores: ordinary pieces with their scores.
        vocabulary: all pieces with their ids.
    """
    merges: list[tuple[str, str]] = []
    for piece, _ in sorted(scores.items(), key=lambda item: -item[1]):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _write_fast_files(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the SentencePiece BPE model in `directory`."""
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    ordinary = {
        piece: model.get_score(i)
        for piece, i in vocabulary.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    merges = sentencepiece_merges(ordinary, vocabulary)
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
