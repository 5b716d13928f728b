"""The other scripts of the old systems: weights, generation, web pages, evaluation, data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.old_commands.flags import Flag, Line, Translation, Values, idle, key, read_flags, refused, shown, translate
from jaxlm.old_commands.launchers import Launch

_DEVICES = idle("the model is divided over all devices that JAX sees (mesh)")
_GRADIO = idle("`jaxlm serve` opens no tunnel; --host and --api_key open it to others", bool)


def passed_on(*verb: str) -> Any:
    """A script whose flags one of our commands understands as they are."""

    def translated(launch: Launch) -> Translation:
        lines = [Line(word, "taken", "understood as it is") for word in launch.words if word.startswith("-")]
        return Translation(verb, {}, lines, words=launch.words)

    return translated


def weight_diff(launch: Launch) -> Translation:
    """stanford_alpaca's and KnowLM's weight_diff.py: make_diff, recover, merge."""
    verbs = {"make_diff": "make-delta", "recover": "apply-delta", "merge": "merge"}
    if not launch.words or launch.words[0] not in verbs:
        raise UserError(f"weight_diff.py: expected one of {', '.join(verbs)} behind its name")
    dropped = {"device": "files are read by slices on the host", "test_inference": "`jaxlm generate` shows it"}
    words: list[str] = []
    lines: list[Line] = []
    rest = list(launch.words[1:])
    while rest:
        word = rest.pop(0)
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        own = [word, *([rest.pop(0)] if "=" not in word and rest and not rest[0].startswith("--") else [])]
        if name in dropped:
            lines.append(Line(" ".join(own), "not needed", dropped[name]))
        else:
            lines.append(Line(" ".join(own), "taken", "understood as it is"))
            words += own
    return Translation(("convert", verbs[launch.words[0]]), {}, lines, words=tuple(words))


def merged(launch: Launch) -> Translation:
    """KnowLM's tools/export_hf_checkpoint.py."""
    table = {"base_model": key("base"), "lora_model": key("adapter"), "output_dir": key("out")}
    given = read_flags(launch.words, table)
    for name in table:
        if name not in given:
            raise UserError(f"--{name}: missing")
    lines = [Line(f"--{name} {value}", "taken", "in this order") for name, value in given.items()]
    words = tuple(given[name] for name in table)
    return Translation(("convert", "merge"), {}, lines, words=(*words, "--format", "hf"))


# --- generation and pages ---------------------------------------------------------------------------------------------

_MODEL: dict[str, Flag] = {
    "base_model": key("model.path"),
    "lora_weights": key("model.adapter"),
    "load_8bit": Flag(bool, lambda value: {"model.quantize": "int8"} if value else {}),
    "load_4bit": Flag(bool, lambda value: {"model.quantize": "nf4"} if value else {}),
    "multi_gpu": Flag(bool, lambda value: {}),
    "allocate": idle("the model is divided evenly; `jaxlm plan` says what each device holds", list),
}


def _decoding(temperature: float, beams: int, tokens: int, **more: float) -> dict[str, Flag]:
    """Flags of decoding and their defaults.

    With beams these scripts do not sample, so temperature, top_p and top_k change nothing: beam search is greedy here.
    """
    inert = "with several beams nothing is sampled there, so it changes nothing"
    warm = idle(inert) if beams > 1 else key("temperature", float, temperature)
    return {
        "max_new_tokens": key("max_new_tokens", int, tokens),
        "num_beams": key("num_beams", int, beams),
        "temperature": warm,
        "top_p": idle(inert) if beams > 1 else key("top_p", float, 0.75),
        "top_k": idle(inert) if beams > 1 else key("top_k", int, 40),
        "repetition_penalty": key("repetition_penalty", float, more.get("penalty")),
    }


def k2_generate(launch: Launch) -> Translation:
    """K2's generation/generate.py: answers input_ls.json by beams, without repeated pairs of tokens."""
    short = {"n": "model_name", "m": "base_model", "l": "lora_weights", "t": "temperature", "p": "top_p", "k": "top_k"}
    short |= {"b": "num_beams", "s": "max_new_tokens"}
    table = {
        **_MODEL,
        "model_name": Flag(str, lambda name: {"save_file": f"qa_result_{name}.json"}),
        **_decoding(0.1, 4, 128),
        "do_int8": Flag(bool, lambda value: {"model.quantize": "int8"} if value else {}),
        **dict.fromkeys(("device", "no_cuda", "port", "low_cpu_mem_usage"), _DEVICES),
    }
    table |= {letter: Flag(table[name].kind, table[name].meaning) for letter, name in short.items()}
    given = read_flags(launch.words, table)
    given = {short.get(name, name): value for name, value in given.items()}
    values, lines = translate(given, {name: flag for name, flag in table.items() if name not in short})
    does: Values = {"predict_data": "input_ls.json", "no_repeat_ngram_size": 2, "template": "alpaca"}
    lines.append(
        Line("(in its code)", "taken", "predict_data: input_ls.json, no_repeat_ngram_size: 2, template: alpaca")
    )
    return _generate({"save_file": "qa_result.json"} | does | values, lines)


def alpaca_lora_generate(launch: Launch) -> Translation:
    """alpaca-lora's generate.py, a page."""
    return page(launch)


def knowlm_generate(launch: Launch) -> Translation:
    """KnowLM's examples/generate_finetune.py and generate_lora.py."""
    lora = launch.script == "generate_lora"
    cases = (
        "the cases stand in the script; put prompts into a JSON file of records with instruction and input, and use "
        "`jaxlm generate --predict_data FILE --save_file ANSWERS`"
    )
    decoding = _decoding(0.2, 2, 512, penalty=1.3) if lora else _decoding(0.3, 3, 512, penalty=1.6)
    table = {
        **_MODEL,
        **decoding,
        "interactive": key("interactive", bool),
        "run_general_cases": refused(cases, bool, unless=False),
        "run_ie_cases": refused(cases, bool, unless=False),
        "prompt_template": key("template", str, "alpaca" if lora else None),
    }
    given = read_flags(launch.words, table)
    values, lines = translate(given, table)
    if not given.get("interactive") and not {"run_general_cases", "run_ie_cases"} & given.keys():
        lines.append(Line("(no --interactive)", "refused", cases))
    if not lora:
        values["template"] = "text"  # a base model goes on with a text
    return _generate(values, lines)


def darwin_inference(launch: Launch) -> Translation:
    """Darwin's inference.py MODEL."""
    table = {"model": key("model.path"), "path": key("model.path")}
    given = read_flags(launch.words, table, positional=("model",))
    values, lines = translate(given, table)
    values |= {"interactive": True, "temperature": 0.8, "top_p": 0.75, "top_k": 40, "template": "alpaca_legacy"}
    return _generate(values, lines)


def _generate(values: Values, lines: list[Line]) -> Translation:
    if "model.path" not in values:
        raise UserError("--base_model: missing; the script needs a model")
    return Translation(("generate",), values, lines)


def page(launch: Launch) -> Translation:
    """The web pages: generate.py, generate_finetune_web.py, generate_lora_web.py."""
    table = {
        **_MODEL,
        "prompt_template": key("template"),
        "server_name": key("host"),
        "server_port": key("port", int),
        "share_gradio": _GRADIO,
        "model_tag": idle("the template says how prompts are written"),
    }
    values, lines = translate(read_flags(launch.words, table), table)
    if "model.path" not in values:
        raise UserError("--base_model: missing; the page needs a model")
    return Translation(("serve",), values, lines)


def launch_vllm(launch: Launch) -> Translation:
    """KnowLM's inference/launch_vllm.py: POST /generate."""
    table = {
        "model": key("model.path"),
        "port": key("port", int, 8090),
        "host": key("host"),
        "dtype": Flag(str, lambda value: {"model.dtype": {"half": "bfloat16", "float": "float32"}.get(value, value)}),
        "tensor_parallel_size": key("mesh.tensor", int),
        "max_num_batched_tokens": idle("prompts are read in pieces beside the answers under way"),
        "use_np_weights": idle("weights are read from safetensors or torch files as they are", bool),
        "template_path": key("template"),
    }
    values, lines = translate(read_flags(launch.words, table), table)
    if "model.path" not in values:
        raise UserError("--model: missing")
    return Translation(("serve",), values, lines)


def download(launch: Launch) -> Translation:
    """KnowLM's tools/download.py."""
    table = {
        "repo_name": Flag(str, lambda value: {}),
        "download_path": idle("files go to the cache of huggingface_hub (HF_HOME)"),
        **dict.fromkeys(
            ("specify", "only_base", "only_lora", "fp16", "both"),
            idle("name what you want where a model is asked for", bool),
        ),
    }
    given = read_flags(launch.words, table)
    _, lines = translate(given, table)
    name = given.get("repo_name", "OWNER/NAME")
    text = f"wherever a model is named, hf://{name} downloads it at its first use; nothing is left to run"
    return Translation((), {}, [*lines, Line("download.py", "not needed", text)])


# --- evaluation -------------------------------------------------------------------------------------------------------


def k2_run_eval(launch: Launch) -> Translation:
    """K2's evaluation/run_eval.py and post_process.py in one."""
    table = {
        "model_name": key("output"),
        "base_model": key("model.path"),
        "lora_weights": key("model.adapter"),
        "geobenchmark": Flag(str, lambda name: {"data": [{"path": f"data/geobench/geobench_{name}.json"}]}, "npee"),
        "do_int8": Flag(bool, lambda value: {"model.quantize": "int8"} if value else {}),
        **dict.fromkeys(("device", "no_cuda", "port", "low_cpu_mem_usage"), _DEVICES),
    }
    values, lines = translate(read_flags(launch.words, table), table)
    if "output" in values:
        values["output"] = f"evaluation/{values['output']}"
    return _evaluate({"task": "geobench"} | values, lines)


def darwin_test(task: str) -> Any:
    """Darwin's SII_MDP/sii_test.py and regression_test.py: MODEL DATA."""

    def translated(launch: Launch) -> Translation:
        table = {"model": key("model.path"), "data": Flag(str, lambda path: {"data": [{"path": path}]})}
        values, lines = translate(read_flags(launch.words, table, positional=("model", "data")), table)
        return _evaluate({"task": task} | values, lines)

    return translated


def darwin_matbench(launch: Launch) -> Translation:
    table = {
        "model_path": key("model.path"),
        "data_path": Flag(str, lambda path: {"data": [{"path": path}]}),
        "dataset": Flag(str, lambda value: {}),
        "fold": Flag(str, lambda value: {}),
    }
    values, lines = translate(read_flags(launch.words, table), table)
    return _evaluate({"task": "matbench"} | values, lines)


def _evaluate(values: Values, lines: list[Line]) -> Translation:
    for name in ("model.path", "data"):
        if name not in values:
            raise UserError(f"{'the model' if name == 'model.path' else 'the data file'} is missing in this command")
    return Translation(("evaluate",), values, lines)


# --- data -------------------------------------------------------------------------------------------------------------


def knowlm_preprocess(launch: Launch) -> Translation:
    """KnowLM's pretrain/preprocess.py: write, merge, read."""
    table = {
        "mode": Flag(str, lambda value: {}),
        "file_path": Flag(str, lambda value: {}),
        "save_prefix": Flag(str, lambda value: {}),
        "save_path": Flag(str, lambda value: {}),
        "tokenizer_path": key("tokenizer"),
        "seq_length": key("split.length", int, 1024),
        "language": Flag(str, lambda value: {}, "english"),
        "do_split_sentences": Flag(bool, lambda value: {}),
        "do_keep_newlines": Flag(bool, lambda value: {}),
        "num_workers": key("engine.workers", int),
        "num_per_doc": refused("its branch does not run there either; limit documents in the source", int, unless=-1),
        "save_mode": idle("a store holds its sources beside each other"),
        "read_path_prefix": Flag(str, lambda value: {}),
        "merge_path_prefix": Flag(list, lambda value: {}),
        "merge_path_type": Flag(list, lambda value: {}),
        "new_path_prefix": Flag(str, lambda value: {}),
    }
    given = read_flags(launch.words, table)
    mode = given.get("mode")
    if mode == "read":
        prefix = given.get("read_path_prefix", "")
        lines = [Line(f"--read_path_prefix {prefix}", "taken", "the store to look into")]
        return Translation(("prepare", "inspect"), {}, lines, words=(f"{prefix}.idx",))
    if mode == "merge":
        stores = [f"{prefix}.idx" for prefix in given.get("merge_path_prefix", [])]
        kinds = given.get("merge_path_type", [])
        if not stores or len(kinds) != len(stores):
            raise UserError("--merge_path_prefix and --merge_path_type: give a prefix and a type of each data set")
        lines = [
            Line(f"--merge_path_prefix {shown(stores)}", "taken", "the stores, in this order"),
            Line(f"--new_path_prefix {given.get('new_path_prefix')}", "taken", "a new directory"),
            Line(
                f"--merge_path_type {kinds}",
                "taken",
                "each store stays a source of its own; data.mixing takes them together",
            ),
        ]
        return Translation(
            ("prepare", "merge"), {}, lines, words=(str(given.get("new_path_prefix", "merged")), *stores)
        )
    if mode != "write":
        raise UserError(f"--mode: {mode!r}: expected write, merge or read")
    values, lines = translate(given, table)
    for name in ("file_path", "save_prefix"):
        if name not in given:
            raise UserError(f"--{name}: missing")
    keep = given.get("do_keep_newlines", False)
    values["sources"] = [
        {
            "path": given["file_path"],
            "name": given["save_prefix"],
            "format": "jsonl",
            "language": given.get("language", "english"),
        }
    ]
    values["output_dir"] = str(Path(given.get("save_path", ".")) / given["save_prefix"])
    values["steps"] = ["split", "build"]
    values |= {"split.encode": "sentence", "split.overlap": True, "split.min_tokens": 21, "build.knowlm": True}
    values |= {"split.delimiters": "released", "split.keep_newlines": keep}
    lines.append(Line("(in its code)", "taken", "whole sentences, windows that overlap, at least 21 tokens"))
    return Translation(("prepare",), values, lines)


def knowlm_remove(launch: Launch) -> Translation:
    """KnowLM's tools/remove_trained_data.py (remove.py in its README)."""
    table = {
        "read_data_path_prefix": Flag(str, lambda value: {}),
        "write_data_path_prefix": Flag(str, lambda value: {}),
        "remove_idx_path": Flag(str, lambda value: {}),
        "tokenizer_file": idle("ids are copied as they are"),
    }
    given = read_flags(launch.words, table)
    for name in list(table)[:3]:
        if name not in given:
            raise UserError(f"--{name}: missing")
    why = (
        "torch's own list cannot be read without running code; `jaxlm prepare drop` takes a text file, a number a line"
    )
    lines = [
        Line(f"--read_data_path_prefix {given['read_data_path_prefix']}", "taken", "the store"),
        Line(f"--write_data_path_prefix {given['write_data_path_prefix']}", "taken", "a new directory"),
        Line(f"--remove_idx_path {given['remove_idx_path']}", "taken", f"--indices; {why}"),
    ]
    words = (
        f"{given['read_data_path_prefix']}.idx",
        given["write_data_path_prefix"],
        "--indices",
        given["remove_idx_path"],
    )
    return Translation(("prepare", "drop"), {}, lines, words=words)


def nothing_left(name: str, why: str) -> Any:
    """A script that has no counterpart because there is nothing for it to do."""
    return lambda launch: Translation((), {}, [Line(name, "not needed", why)])


def not_here(name: str, why: str) -> Any:
    """A script that cannot be replaced."""
    return lambda launch: Translation((), {}, [Line(name, "refused", why)])
