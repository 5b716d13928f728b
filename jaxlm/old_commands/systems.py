"""Which script of which system is translated by what."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from jaxlm.errors import UserError
from jaxlm.old_commands import mindformers, training, using
from jaxlm.old_commands.flags import Translation
from jaxlm.old_commands.launchers import Launch, take_apart

Script = Callable[[Launch], Translation]

_DELTAS: dict[str, Script] = {
    "apply_delta": using.passed_on("convert", "apply-delta"),
    "make_delta": using.passed_on("convert", "make-delta"),
    "apply_lora": using.passed_on("convert", "merge"),
}
_SELF_INSTRUCT = using.not_here(
    "generate_instruction_following_data",
    "jaxlm does not write instructions with another model's help; give the file of instructions to data.train",
)
_EXPORTS: dict[str, Script] = {
    name: using.not_here(
        f"{name}.py",
        "it takes its paths from BASE_MODEL and its own code: use `convert merge BASE ADAPTER OUT --format hf`",
    )
    for name in ("export_hf_checkpoint", "export_state_dict_checkpoint")
}

SYSTEMS: dict[str, dict[str, Script]] = {
    "k2": {
        **_DELTAS,
        **_EXPORTS,
        "run_clm": training.k2_run_clm,
        "run_clm_resume": training.k2_run_clm,
        "finetune": training.k2_finetune,
        "generate": using.k2_generate,
        "run_eval": using.k2_run_eval,
        "post_process": using.nothing_left("post_process.py", "`jaxlm evaluate --task geobench` scores what it asks"),
    },
    "alpaca-lora": {
        **_EXPORTS,
        "finetune": training.alpaca_lora_finetune,
        "generate": using.alpaca_lora_generate,
    },
    "alpaca": {
        "train": training.alpaca_train,
        "weight_diff": using.weight_diff,
        "generate_instruction": _SELF_INSTRUCT,
    },
    "darwin": {
        "train": training.darwin_train,
        "inference": using.darwin_inference,
        "sii_test": using.darwin_test("sii"),
        "regression_test": using.darwin_test("mdp"),
        "evaluate_matbench": using.darwin_matbench,
    },
    "knowlm": {
        "preprocess": using.knowlm_preprocess,
        "train": training.knowlm_train,
        "finetune": training.knowlm_finetune,
        "bc_finetune": training.knowlm_finetune,
        "generate_finetune": using.knowlm_generate,
        "generate_lora": using.knowlm_generate,
        "generate_finetune_web": using.page,
        "generate_lora_web": using.page,
        "launch_vllm": using.launch_vllm,
        "weight_diff": using.weight_diff,
        "export_hf_checkpoint": using.merged,
        "download": using.download,
        "remove": using.knowlm_remove,
        "remove_trained_data": using.knowlm_remove,
        "find_trained_data": using.nothing_left(
            "find_trained_data.py",
            "a run goes on at its very step; `jaxlm prepare drop --consumed RUN` drops what it was given",
        ),
    },
    "knowlm-qlora": {"train": training.knowlm_qlora},
    "llm4academic": {
        "train": training.alpaca_train,
        "bootstrap_instruction": _SELF_INSTRUCT,
        "bootstrap_instructions": _SELF_INSTRUCT,
        "evaluate": using.not_here(
            "evaluate.py",
            "its models and files stand in its code: use `jaxlm evaluate --task zbench --model DIR --data FILE.csv`",
        ),
    },
    "scimind": {
        "run_mindformer": mindformers.run_mindformer,
        "run_distribute.sh": mindformers.run_distribute,
        "llama_preprocess_2": using.not_here(
            "llama_preprocess_2.py",
            "training reads the conversations themselves: data.train: [{path: FILE.json, template: scimind}]; "
            "`jaxlm prepare build` with build.mindrecord writes a MindRecord file",
        ),
    },
}


def translate(system: str, words: Sequence[str], devices: int | None = None) -> Translation:
    """The command of ours for an old command line.

    Args:
        system: a key of SYSTEMS.
        words: the old command line, with what stands in front of the script.
        devices: the number of devices that it ran on; None: as its launcher says.

    Raises:
        UserError: for an unknown system, script or flag, or where something needed is not said.
    """
    if system not in SYSTEMS:
        near = difflib.get_close_matches(system, SYSTEMS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SYSTEMS)}"
        raise UserError(f"{system!r} is not a system whose commands are known; {hint}")
    launch = take_apart(words)
    scripts = SYSTEMS[system]
    if launch.script not in scripts:
        raise UserError(f"{launch.script!r} is not a script of {system} that is known; there are {', '.join(scripts)}")
    if devices is not None:
        launch = Launch(launch.script, launch.words, devices, launch.launcher)
    try:
        return scripts[launch.script](launch)
    except UserError as error:
        raise UserError(f"{system}, {launch.script}: {error}") from None
