"""The preview's text, without colour."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.loader import build_data
from jaxlm.data.preview import preview
from jaxlm.tokenizer import Tokenizer


def test_trained_tokens_stand_in_brackets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"instruction": "what [bold]", "output": "rock 石英"}, {"instruction": "why", "output": "melt"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = SourceConfig(path=str(tmp_path / "data.json"), template="alpaca_short")
    config = DataConfig(train=(source,), sequence_length=128)
    data = build_data(config, tokenizer, seed=1, vocab_size=1000, max_positions=128)
    out = io.StringIO()
    batch = data.train_batches(2)[0]
    preview(batch, tokenizer, Console(file=out, width=90))
    text = out.getvalue()
    used, trained = int((batch["segment_ids"] > 0).sum()), int(batch["loss_mask"].sum())
    assert f"row 1: 2 documents, {used} tokens, {trained} trained, {128 - used} padding" in text
    assert "row 2: 0 documents, 0 tokens, 0 trained, 128 padding" in text
    assert "<s>### Instruction:\nwhat [bold]\n\n### Response:\n⟦rock 石英</s>⟧" in text
    assert "### Response:\n⟦melt</s>⟧" in text
    assert text.count("-- document") == 2
