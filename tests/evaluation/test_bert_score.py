"""BERTScore against its definition, on a small BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.bert_score import bert_scorer
from jaxlm.evaluation.tasks.molinstructions import Options, score
from tests.evaluation.tasks import text_answers

PAIRS = [
    ("the rock is old", "a rock is very old"),
    ("granite is an igneous rock that cools slowly", "granite cools"),
    ("what is water", "what is the water of granite"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("bert_score")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator([right for right, _ in PAIRS], trainers.WordPieceTrainer(special_tokens=special))
    pieces.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=64, **names)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=pieces.get_vocab_size(), **sizes))
    path = tmp_path_factory.mktemp("bert")
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def test_scores_are_those_of_the_definition(encoder: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)

    def states(text: str) -> Any:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return out / out.norm(dim=-1, keepdim=True)

    likeness = bert_scorer(encoder, 2)
    for right, answer in PAIRS:
        near = states(answer) @ states(right).T  # [CLS] and [SEP] may be a token's nearest, and are not counted
        precision, recall = near.max(1).values[1:-1].mean(), near.max(0).values[1:-1].mean()
        expected = float(precision), float(recall), float(2 * precision * recall / (precision + recall))
        assert likeness(right, answer) == pytest.approx(expected, abs=1e-5)


def test_open_questions_have_it_where_there_is_a_model(encoder: str) -> None:
    records = [{"instruction": "?", "output": right, "metadata": {"task": "open question"}} for right, _ in PAIRS]
    answers = text_answers([answer for _, answer in PAIRS])
    assert "open_bert_score" not in score(records, answers, Options())
    figure = score(records, answers, Options(bert_model=encoder, bert_layer=2))["open_bert_score"]
    assert figure.value == pytest.approx(sum(bert_scorer(encoder, 2)(*pair)[2] for pair in PAIRS) / 3)


def test_what_is_no_encoder_is_named(encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a Hugging Face directory of an encoder"):
        bert_scorer(str(tmp_path), 2)
    with pytest.raises(UserError, match=r"bert_layer: 17: .* has 3 layers"):
        bert_scorer(encoder, 17)
