"""What stands in front of an old script: variables, python, torchrun, deepspeed, accelerate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from jaxlm.errors import UserError

# Options of the launchers that take a value in the next word.
_WITH_VALUE = {
    *(
        "--nproc_per_node",
        "--nproc-per-node",
        "--nnodes",
        "--node_rank",
        "--node-rank",
        "--master_port",
        "--master-port",
    ),
    *("--master_addr", "--master-addr", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts"),
    *("--num_gpus", "--num_nodes", "--hostfile", "--include", "--exclude", "--num_processes", "--num_machines"),
    *("--config_file", "--main_process_port", "--mixed_precision", "--machine_rank", "--main_process_ip"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """An old command line, taken apart.

    Args:
        script: the name of the file or module, without folders and .py.
        words: behind it.
        devices: number of processes that the launcher starts, each on a device; None where the line does not say.
        launcher: the words in front, for the report.
    """

    script: str
    words: tuple[str, ...]
    devices: int | None
    launcher: str


def take_apart(words: Sequence[str]) -> Launch:
    """The script and its words, and how many devices the launcher meant.

    Raises:
        UserError: where no script is found.
    """
    rest, front = list(words), []
    visible: int | None = None
    options: dict[str, str] = {}
    program = ""
    while rest:
        word = rest.pop(0)
        variable = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word)
        if variable and not program:
            if variable[1] == "CUDA_VISIBLE_DEVICES":
                visible = len([number for number in variable[2].split(",") if number.strip()])
            front.append(word)
        elif word in ("python", "python3", "torchrun", "deepspeed", "accelerate", "bash", "sh"):
            program = program or word
            front.append(word)
        elif word == "launch" and program == "accelerate":
            front.append(word)
        elif word == "-m" and rest:
            module = rest.pop(0)
            front.append("-m")
            if module in ("torch.distributed.run", "torch.distributed.launch"):
                program = "torchrun"
                front.append(module)
                continue
            return _launch(module.rpartition(".")[2], rest, program, options, visible, front)
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            if not equals and name in _WITH_VALUE and rest:
                value = rest.pop(0)
            options[name.replace("-", "_")] = value
            front.append(word)
        else:
            return _launch(PurePosixPath(word).name.removesuffix(".py"), rest, program, options, visible, front)
    raise UserError("no script in this command line: expected e.g. `python finetune.py --base_model …`")


def _launch(
    script: str, rest: Sequence[str], program: str, options: dict[str, str], visible: int | None, front: list[str]
) -> Launch:
    def number(*names: str) -> int | None:
        for name in names:
            value = options.get(name)
            if value is not None and value.isdigit():
                return int(value)
        return None

    per_node = number("__nproc_per_node", "__num_gpus")
    nodes = number("__nnodes", "__num_nodes", "__num_machines") or 1
    devices = number("__num_processes") or (per_node * nodes if per_node is not None else None)
    if devices is None:
        # deepspeed and accelerate take every device that they see.
        devices = visible if program in ("deepspeed", "accelerate") else 1
    # What a shell would have kept to itself, pasted with the rest.
    words = list(rest)
    for at, word in enumerate(words):
        if re.match(r"\d*>|&$|#$", word):
            words = words[:at]
            break
    return Launch(script, tuple(word for word in words if word.strip()), devices, " ".join(front))
