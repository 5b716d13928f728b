"""Whether a tokenizer belongs to a model: a wrong one makes nonsense without an error."""

from __future__ import annotations

from jaxlm.errors import UserError
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer

# Tokens that are compared with those of the model's own tokenizer; a few may have the same ids by chance.
_SAMPLED = 997
_OTHER = 0.5


def check_tokenizer(tokenizer: Tokenizer, config: DecoderSpec, own: Tokenizer | None, key: str) -> list[str]:
    """Compares a tokenizer with the model, and with the tokenizer that came with it.

    Args:
        tokenizer: the one to be used.
        own: the model's own, where another was named.
        key: what names the tokenizer, for errors.

    Returns:
        Warnings: what speaks against it.

    Raises:
        UserError: it is another model's: more tokens than the model has rows, or other tokens under its ids.
    """
    rows, warnings = config.vocab_size, []
    instead = f"; leave {key} out: the model has its own, {own.path}" if own is not None else ""
    if own is not None or key:
        if tokenizer.vocab_size > rows:
            raise UserError(
                f"{key}: {tokenizer.path} has {tokenizer.vocab_size:,} tokens, the model's embedding {rows:,} rows: it "
                f"is the tokenizer of another model, or has tokens that this model was not given{instead}"
            )
    elif tokenizer.vocab_size > rows:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model's embedding {rows:,} rows; a prompt with "
            "one of the others is refused"
        )
    if own is not None:
        common = min(tokenizer.vocab_size, own.vocab_size)
        sample = range(0, common, max(1, common // _SAMPLED))
        other = [index for index in sample if tokenizer.token(index) != own.token(index)]
        if other:
            at = other[len(other) // 2]
            words = f"token {at} is {tokenizer.token(at)!r} there and {own.token(at)!r} in the model's own, {own.path}"
            if len(other) > _OTHER * len(sample):
                raise UserError(f"{key}: {tokenizer.path} is the tokenizer of another model: {words}{instead}")
            warnings.append(f"{tokenizer.path} differs from the model's own tokenizer: {words}")
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    pairs = (("bos", tokenizer.bos_id, (config.bos_token_id,)), ("eos", tokenizer.eos_id, ends))
    wrong = [
        f"{name} is {index}, the model's configuration says {' or '.join(map(str, known))}"
        for name, index, known in pairs
        if index is not None and None not in known and index not in known
    ]
    if len(wrong) == len(pairs):
        warnings.append(f"the tokenizer {tokenizer.path} may be another model's: its {'; its '.join(wrong)}")
    return warnings
