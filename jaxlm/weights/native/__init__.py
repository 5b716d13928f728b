"""jaxlm directories: converted models and adapters, training checkpoints, run directories.

    DIR/jaxlm/model.json     the decoder's shape, an adapter's settings and base, the dtype: `model_json`
    DIR/jaxlm/tokenizer/     tokenizer files as they came
    DIR/jaxlm/prompt.json    how training asked (`prompt_json`); template.json beside it where it names that
    DIR/jaxlm/partition.npy  of a model that `convert moefy` made, or an adapter of one: see `jaxlm.weights.partition`
    DIR/model/               an Orbax pytree, {"params": ...} or {"lora": ...}
    DIR/train/               of a checkpoint: optimizer, step, dropout key (`jaxlm.training.checkpoint`)

`model/` is read and written through TensorStore slice by slice. Training writes it with Orbax (one OCDBT database); the
converter writes plain zarr3 arrays that Orbax restores all the same, with a CRC-32C in every chunk.

`layout` says where everything lies and what Orbax expects around it, `model_json` and `prompt_json` what the small
files hold, `read` and `write` move the arrays. docs/formats.md describes the format for others.
"""
