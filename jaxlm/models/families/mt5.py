"""mT5 (arXiv:2010.11934): T5 1.1 with a vocabulary of many languages, whose outputs are never scaled."""

from __future__ import annotations

from functools import partial

from jaxlm.models.families.base import Family
from jaxlm.models.families.t5 import COPIES, DEFAULTS, KEYS, ROWS, read, shape, write

FAMILY = Family(
    name="mt5",
    architecture="MT5ForConditionalGeneration",
    defaults=DEFAULTS
    | dict(intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, feed_forward_proj="gated-gelu"),
    read=partial(read, "mt5", scales=False),
    write=partial(write, scales=False),
    rows=ROWS,
    keys=KEYS,
    head_by_tensors=True,
    copies=COPIES,
    # mT5's model cards.
    shapes={
        "mt5-small": shape("mt5", 250112, 8, 512, 1024, 6),
        "mt5-base": shape("mt5", 250112, 12, 768, 2048, 12),
        "mt5-large": shape("mt5", 250112, 24, 1024, 2816, 16),
        "mt5-xl": shape("mt5", 250112, 24, 2048, 5120, 32),
        "mt5-xxl": shape("mt5", 250112, 24, 4096, 10240, 64),
    },
)
