"""A DPO step of a 110 M LLaMA, jaxlm beside TRL's formula in PyTorch, on this machine.

Four pairs, each of two texts of 256 tokens, half of them prompt; both sides know the reference's log-probabilities. In
jaxlm a pair is a row; in PyTorch the texts are a batch of eight, logits and losses as TRL's dpo_trainer.py has them
(selective_log_softmax, sums, -logsigmoid). Steps are taken in turn, as by `train_cpu.py`.

    python benchmarks/preference.py [--steps 10] [--cases full-float32,lora-float32]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from train_cpu import RANK, SHAPE, TARGETS, main

PAIRS, TEXT = 4, 256
IDS = np.random.default_rng(0).integers(0, 32000, (PAIRS, 2 * TEXT)).astype(np.int32)
TRAINED = np.arange(2 * TEXT) % TEXT >= TEXT // 2


def jax_side(mode: str, dtype: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import jax

    from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig, PreferenceConfig
    from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
    from jaxlm.kernels.backend import choose_attention, shape_key
    from jaxlm.models.adapters import resolve_lora
    from jaxlm.models.decoder import Decoder
    from jaxlm.models.families import read_config
    from jaxlm.training.objectives.preference import REFERENCE, Preference
    from jaxlm.training.optimizer import make_optimizer, make_schedule
    from jaxlm.training.state import Initializer
    from jaxlm.training.step import make_train_step

    shape = read_config({"architectures": ["LlamaForCausalLM"], **SHAPE})
    lora = LoraConfig(rank=RANK, targets=TARGETS) if mode == "lora" else None
    kind, _ = choose_attention("auto", shape_key(shape.attention, dtype, 2 * TEXT, True))
    remat = {"full": "qkv_out", "lora": "dots"}[mode]
    model = Decoder(shape, resolve_lora(shape, lora) if lora else {}, np.dtype(dtype), np.dtype("float32"), kind, remat)
    mesh, settings = make_mesh(MeshConfig()), OptimizerConfig(learning_rate=1e-4, schedule="constant")
    schedule = make_schedule(settings, 1000)
    initializer = Initializer(model, lora, mesh, partial(make_optimizer, settings, schedule))
    base = initializer.init_params(0)
    frozen = {"params": base} if lora else {}
    state = initializer.new_state({"lora": initializer.init_lora(base, 1)} if lora else {"params": base}, 0)
    del base
    rows = {
        "input_ids": IDS[None],
        "loss_mask": np.broadcast_to(TRAINED, (1, *IDS.shape)),
        "segment_ids": np.ones((1, *IDS.shape), np.int32),
        REFERENCE: np.where(TRAINED, -10.0, 0.0).astype(np.float32) + np.zeros((1, *IDS.shape), np.float32),
    }
    batch = put_batch(rows, mesh)
    objective = Preference(model, tuple(frozen), settings=PreferenceConfig())
    step = make_train_step(objective, initializer.optimizer, schedule, 1.0)
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        program = jitted.lower(state, frozen, batch).compile()
    held = [state]

    def one() -> float:
        held[0], metrics = program(held[0], frozen, batch)
        return float(metrics["loss"])

    return one, {}


def torch_side(mode: str, dtype: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa", use_cache=False))
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS)))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    # Chosen texts first, as TRL's collator puts them.
    ids = torch.from_numpy(np.concatenate([IDS[:, :TEXT], IDS[:, TEXT:]]).astype(np.int64))
    mask = torch.from_numpy(TRAINED[:TEXT])[None, 1:].float()

    def one() -> float:
        logits = model(input_ids=ids).logits[:, :-1]
        labels = ids[:, 1:]
        picked = torch.gather(logits, -1, labels[..., None]).squeeze(-1)
        log_probs = picked - torch.stack([torch.logsumexp(each, -1) for each in logits])  # trl's selective_log_softmax
        ratios = ((log_probs + 10.0) * mask).sum(-1)
        chosen, rejected = ratios.chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return one, {}


if __name__ == "__main__":
    main(__file__, __doc__, "full-float32,lora-float32", {"jax": jax_side, "torch": torch_side})
