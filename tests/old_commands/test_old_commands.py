# ruff: noqa: E501  (command lines as they stand)
"""Command lines as they stand in the README files of the old systems, in jaxlm's words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxlm.cli import run_as
from jaxlm.cli.run_as import nested
from jaxlm.config import EvaluateConfig, GenerateConfig, RunConfig
from jaxlm.config.prepare import PrepareConfig
from jaxlm.config.reading import build
from jaxlm.errors import UserError
from jaxlm.old_commands.flags import Translation
from jaxlm.old_commands.systems import SYSTEMS, translate

CONFIGS: dict[str, type] = {
    "train": RunConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "prepare": PrepareConfig,
}

TRAINER = (
    '--bf16 True --output_dir OUT --num_train_epochs 3 --evaluation_strategy "no" --save_strategy "steps" '
    "--save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --logging_steps 1 "
)
FSDP = '--lr_scheduler_type "cosine" --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap \'LlamaDecoderLayer\' '
KNOWLM_TRAIN = (
    "--model_name_or_path /hf_llama --model_max_length 1024 --data_path /data/prefix --output_dir /out --num_train_epochs 1 "
    '--per_device_eval_batch_size 1 --evaluation_strategy "no" --save_strategy "steps" --save_steps 100 '
    '--save_total_limit 1 --learning_rate 1.5e-5 --warmup_steps 300 --logging_steps 1 --report_to "tensorboard" '
    "--gradient_checkpointing True --deepspeed configs/config.json --fp16 True --log_on_each_node False "
    '--lr_scheduler_type "cosine" --adam_beta1 0.9 --adam_beta2 0.95 --weight_decay 0.1 '
)
ALPACA = {
    "train.global_batch_size": 128,
    "train.micro_batch_size": 4,
    "optimizer.learning_rate": 2e-5,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_ratio": 0.03,
    "train.save_every": 2000,
    "train.eval_every": 0,
    "data.sequence_length": 512,
    "mesh.fsdp": -1,
    "model.dtype": "bfloat16",
}
KNOWLM = {
    "optimizer.learning_rate": 1.5e-5,
    "optimizer.beta2": 0.95,
    "optimizer.clip_norm": 0.0,  # its DeepSpeed file names no gradient_clipping
    "optimizer.warmup_steps": 300,
    "data.train": [{"path": "/data/prefix.idx", "format": "knowlm"}],
    "train.tensorboard": True,
    "mesh.fsdp": -1,
}
ADAPTER = {"lora.rank": 8, "lora.alpha": 16.0, "lora.dropout": 0.05, "optimizer.warmup_steps": 100}

# (system, command, verb, values that it must come to)
COMMANDS: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    (
        "k2",
        "deepspeed --num_gpus=4 run_clm.py --deepspeed ds_config_zero.json --model_name_or_path L --train_file T.jsonl",
        ("train",),
        {
            "optimizer.schedule": "log_warmup",
            "optimizer.learning_rate": 1e-5,
            "optimizer.warmup_ratio": 0.01,
            "train.global_batch_size": 8,
            "data.packing": "group_texts",
            "data.validation": 0.05,
            "optimizer.clip_norm": 1.0,
        },
    ),
    (
        "k2",
        "python finetune.py --base_model /path/to/checkpoint-30140 --data_path /path/to/alpaca.json --output_dir "
        '/path/to/stage/one/model/ --cuda_id 2 --lora_target_modules "q_proj" "k_proj" "v_proj"',
        ("train",),
        {**ADAPTER, "lora.targets": ["q_proj", "k_proj", "v_proj"], "train.epochs": 1.0, "data.sequence_length": 512},
    ),
    (
        "k2",
        "python finetune.py --base_model /path/to/checkpoint-30140 --data_path /path/to/geosignal.json --output_dir "
        '/path/to/stage/two/model/ --cuda_id 2 --lora_target_modules "q_proj" "k_proj" "v_proj" '
        "--resume_from_checkpoint /path/to/stage/one/model/",
        ("train",),
        {"lora.init_from": "/path/to/stage/one/model/", "data.validation": 2000, "data.train_on_inputs": True},
    ),
    (
        "k2",
        "python run_eval.py --model_name k2_ni --base_model /home/llama/checkpoint/ --lora_weights /home/geo_llama/",
        ("evaluate",),
        {"task": "geobench", "model.adapter": "/home/geo_llama/", "output": "evaluation/k2_ni"},
    ),
    ("k2", "python run_eval.py --model_name gpt2_xl --base_model gpt2-xl", ("evaluate",), {"model.path": "gpt2-xl"}),
    (
        "k2",
        "python generate.py -n k2 -m /geollama -l /adapter -b 4 -s 128 -t 0.1",
        ("generate",),
        {"num_beams": 4, "max_new_tokens": 128, "no_repeat_ngram_size": 2, "save_file": "qa_result_k2.json"},
    ),
    (
        "alpaca-lora",
        "python finetune.py --base_model 'decapoda-research/llama-7b-hf' --data_path 'yahma/alpaca-cleaned' "
        "--output_dir './lora-alpaca'",
        ("train",),
        {
            **ADAPTER,
            "lora.targets": ["q_proj", "v_proj"],
            "data.sequence_length": 256,
            "data.add_eos": False,
            "data.train": [{"path": "hf://datasets/yahma/alpaca-cleaned", "template": "alpaca"}],
        },
    ),
    (
        "alpaca-lora",
        "python finetune.py --base_model 'decapoda-research/llama-7b-hf' --data_path 'yahma/alpaca-cleaned' --output_dir "
        "'./lora-alpaca' --batch_size 128 --micro_batch_size 4 --num_epochs 3 --learning_rate 1e-4 --cutoff_len 512 "
        "--val_set_size 2000 --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules '[q_proj,v_proj]' "
        "--train_on_inputs --group_by_length",
        ("train",),
        {"optimizer.learning_rate": 1e-4, "data.sequence_length": 512, "lora.targets": ["q_proj", "v_proj"]},
    ),
    (
        "alpaca-lora",
        "python finetune.py --base_model='decapoda-research/llama-7b-hf' --num_epochs=10 --cutoff_len=512 --group_by_length "
        "--output_dir='./lora-alpaca' --lora_target_modules='[q_proj,k_proj,v_proj,o_proj]' --lora_r=16 --micro_batch_size=8",
        ("train",),
        {
            "train.epochs": 10.0,
            "lora.rank": 16,
            "lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "train.micro_batch_size": 8,
        },
    ),
    (
        "alpaca-lora",
        "python generate.py --load_8bit --base_model 'decapoda-research/llama-7b-hf' --lora_weights 'tloen/alpaca-lora-7b'",
        ("serve",),
        {"model.quantize": "int8", "model.adapter": "tloen/alpaca-lora-7b"},
    ),
    (
        "alpaca",
        "torchrun --nproc_per_node=4 --master_port=12345 train.py --model_name_or_path LLAMA --data_path ./alpaca_data.json "
        f"--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 --save_steps 2000 "
        f"{TRAINER} {FSDP} --tf32 True",
        ("train",),
        {**ALPACA, "data.train": [{"path": "./alpaca_data.json", "template": "alpaca_legacy"}]},
    ),
    (
        "alpaca",
        'torchrun --nproc_per_node=4 --master_port=12345 train.py --model_name_or_path "facebook/opt-6.7b" --data_path '
        "./alpaca_data.json --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 "
        f'--save_steps 2000 {TRAINER} --lr_scheduler_type "cosine" --fsdp "full_shard auto_wrap offload" '
        "--fsdp_transformer_layer_cls_to_wrap 'OPTDecoderLayer' --tf32 True",
        ("train",),
        {**ALPACA, "model.path": "facebook/opt-6.7b"},
    ),
    (
        "alpaca",
        "torchrun --nproc_per_node=4 --master_port=12345 train.py --model_name_or_path LLAMA --data_path ./alpaca_data.json "
        f"--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8 --save_steps 2000 "
        f'{TRAINER} --deepspeed "./configs/default_offload_opt_param.json" --tf32 True',
        ("train",),
        {**ALPACA, "optimizer.schedule": "linear"},
    ),
    (
        "alpaca",
        "python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned TUNED",
        ("convert", "apply-delta"),
        {},
    ),
    (
        "llm4academic",
        "torchrun --nproc_per_node=4 --master_port=10017 train.py --model_name_or_path /prev_trained_models/llama-7b-hf "
        "--data_path ../data/instructs/alpaca_mix.json --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
        f"--gradient_accumulation_steps 8 --save_steps 2000 {TRAINER} {FSDP} --tf32 True",
        ("train",),
        ALPACA,
    ),
    ("darwin", "python inference.py /darwin-7b", ("generate",), {"model.path": "/darwin-7b", "interactive": True}),
    (
        "darwin",
        "torchrun  --nproc_per_node=8 --master_port=1212 train.py --model_name_or_path D --data_path data.json "
        f"--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --save_steps 500 "
        f"{TRAINER} {FSDP} --tf32 False",
        ("train",),
        {"train.global_batch_size": 8, "data.sequence_length": 2048, "train.save_every": 500},
    ),
    ("darwin", "python sii_test.py MODEL sii40.json", ("evaluate",), {"task": "sii", "data": [{"path": "sii40.json"}]}),
    ("darwin", "python regression_test.py MODEL r.json", ("evaluate",), {"task": "mdp"}),
    (
        "knowlm",
        "CUDA_VISIBLE_DEVICES=0,1,2 python examples/generate_finetune.py  --base_model zjunlp/knowlm-13b-base-v1.0 "
        "--interactive --multi_gpu     # --allocate [10,10,10]",
        ("generate",),
        {"interactive": True, "num_beams": 3, "repetition_penalty": 1.6, "max_new_tokens": 512, "template": "text"},
    ),
    (
        "knowlm",
        "CUDA_VISIBLE_DEVICES=0,1,2 python examples/generate_finetune_web.py --base_model zjunlp/knowlm-13b-base-v1.0 --multi_gpu",
        ("serve",),
        {"model.path": "zjunlp/knowlm-13b-base-v1.0"},
    ),
    (
        "knowlm",
        "python examples/generate_lora_web.py --base_model zjunlp/knowlm-13b-zhixi",
        ("serve",),
        {"model.path": "zjunlp/knowlm-13b-zhixi"},
    ),
    (
        "knowlm",
        "CUDA_VISIBLE_DEVICES=1,2 python inference/launch_vllm.py --port 8090 --model data/zhixi-13B --use-np-weights "
        "--max-num-batched-tokens $max_num_batched_tokens --dtype half --tensor-parallel-size 2",
        ("serve",),
        {"port": 8090, "mesh.tensor": 2, "model.dtype": "bfloat16"},
    ),
    (
        "knowlm",
        "python tools/download.py --specify --download_path ./your/path --repo_name zjunlp/knowlm-13b-zhixi",
        (),
        {},
    ),
    (
        "knowlm",
        "python tools/export_hf_checkpoint.py --base_model data/zhixi-13b --lora_model data/zhixi-13b-lora --output_dir out",
        ("convert", "merge"),
        {},
    ),
    (
        "knowlm",
        "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 accelerate launch finetune.py --data_path /your/data/path --base_model /zhixi",
        ("train",),
        {
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "optimizer.warmup_steps": 10,
            "train.eval_every": 10,
            "train.keep": 5,
            "data.train_on_inputs": False,
        },
    ),
    (
        "knowlm",
        "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 accelerate launch bc_finetune.py --data_path /your/data/path --base_model /baichuan",
        ("train",),
        {"model.path": "/baichuan"},
    ),
    (
        "knowlm",
        "accelerate launch finetune.py --data_path './data/alpaca_data_cleaned.json' --base_model './Qwen-7B' "
        """--lora_target_modules '["c_attn", "c_proj", "w1", "w2"]' --prompt_template_name "qwen" --eval_steps 50 --save_steps 50""",
        ("train",),
        {
            "lora.targets": ["c_attn", "c_proj", "w1", "w2"],
            "train.eval_every": 50,
            "data.validation": 0.2,
            "optimizer.warmup_ratio": 0.03,
            "data.train": [{"path": "./data/alpaca_data_cleaned.json", "template": "chat"}],
        },
    ),
    (
        "knowlm",
        'python preprocess.py --mode="write" --file_path="./data/dataset1.txt" --save_prefix="dataset1" --save_path="./data/" '
        '--language "english" --do_split_sentences --do_keep_newlines --seq_length 1024 --num_workers 8 --tokenizer_path T',
        ("prepare",),
        {
            "split.length": 1024,
            "split.keep_newlines": True,
            "build.knowlm": True,
            "engine.workers": 8,
            "output_dir": "data/dataset1",
            "tokenizer": "T",
        },
    ),
    (
        "knowlm",
        """python preprocess.py --mode="merge" --merge_path_prefix="['data/dataset1', 'data/dataset2']" """
        '--merge_path_type=[0,0] --new_path_prefix="./data/english"',
        ("prepare", "merge"),
        {},
    ),
    ("knowlm", 'python preprocess.py --mode="read" --read_path_prefix="./data"', ("prepare", "inspect"), {}),
    (
        "knowlm",
        f"deepspeed --include localhost:0 train.py {KNOWLM_TRAIN} --per_device_train_batch_size 16",
        ("train",),
        {**KNOWLM, "train.global_batch_size": 128},
    ),
    (
        "knowlm",
        f"deepspeed --num_gpus 8 --num_nodes 3 --hostfile=host.txt train.py --gradient_accumulation_steps 3 {KNOWLM_TRAIN} "
        "--per_device_train_batch_size 20",
        ("train",),
        {**KNOWLM, "train.global_batch_size": 1440, "train.micro_batch_size": 20},
    ),
    ("knowlm", "python tools/find_trained_data.py", (), {}),
    (
        "knowlm",
        'python remove.py --read_data_path_prefix "/a/b/c/d" --write_data_path_prefix "/a/b/c/e" --remove_idx_path "/r.idx"',
        ("prepare", "drop"),
        {},
    ),
    (
        "scimind",
        "python run_mindformer.py --config scimind.yaml --run_mode predict --predict_data in.txt --use_parallel False "
        "--device_id 0 --save_file out.txt --load_checkpoint M",
        ("generate",),
        {"max_new_tokens": 512, "save_file": "out.txt", "model.path": "M"},
    ),
    (
        "scimind",
        "bash run_distribute.sh /user/config/jobstart_hccl.json scimind-train.yaml [0,8] train",
        ("train",),
        {
            "train.global_batch_size": 64,
            "train.epochs": 8.0,
            "optimizer.learning_rate": 5e-5,
            "optimizer.schedule": "cosine",
            "train.save_every": 400,
            "train.keep": 6,
        },
    ),
    (
        "scimind",
        "python run_mindformer.py --config scimind-train.yaml --run_mode train --profile True",
        ("train",),
        {"train.profile": {"start": 1, "steps": 10}},
    ),
]

REFUSED = [
    (
        "knowlm",
        "deepspeed --num_gpus 8 --num_nodes 3 --hostfile=host.txt ./preview/train.py --model_name_or_path /hf_llama "
        '--data_path /data/prefix --global_batch_distributed "[424,80]" --output_dir ./output3 '
        "--per_device_train_batch_size 21 --gradient_accumulation_steps 3",
        "per_batch: [424, 80]",
    ),
    ("knowlm", "python examples/generate_finetune.py --base_model B", "predict_data"),
    ("knowlm", "python examples/generate_lora.py --base_model B --run_ie_cases", "predict_data"),
    ("knowlm", "python examples/generate_lora.py --base_model B --run_general_cases", "predict_data"),
    ("alpaca", "python -m generate_instruction generate_instruction_following_data", "data.train"),
    ("scimind", "python llama_preprocess_2.py --dataset_type qa", "template: scimind"),
    ("k2", "python export_hf_checkpoint.py", "convert merge"),
]


@pytest.fixture
def old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration files that the commands name, with the old systems' values."""
    monkeypatch.chdir(tmp_path)
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    k2 = {
        "optimizer": {"type": "AdamW", "params": auto},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}},
        "gradient_clipping": "auto",
    }
    alpaca = {**k2, "scheduler": {"type": "WarmupDecayLR"}, "bf16": {"enabled": "auto"}}
    knowlm = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "fp16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1.5e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
    }
    scimind = {
        "runner_config": {"epochs": 8, "batch_size": 2},
        "optimizer": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "learning_rate": 5e-5},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 5e-5, "warmup_ratio": 0.03},
        "train_dataset": {"data_loader": {"dataset_dir": ""}},
        "parallel_config": {"data_parallel": 2, "model_parallel": 1, "pipeline_stage": 4, "micro_batch_num": 16},
        "callbacks": [{"type": "CheckpointMointor", "save_checkpoint_steps": 400, "keep_checkpoint_max": 6}],
        "runner_wrapper": {"use_clip_grad": True},
        "model": {"model_config": {"seq_length": 2048, "max_decode_length": 512, "top_k": 3, "do_sample": False}},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "ds_config_zero.json").write_text(json.dumps(k2))
    (tmp_path / "configs/default_offload_opt_param.json").write_text(json.dumps(alpaca))
    (tmp_path / "configs/config.json").write_text(json.dumps(knowlm))
    (tmp_path / "scimind.yaml").write_text(yaml.safe_dump(scimind))
    scimind |= {"load_checkpoint": "M", "train_dataset": {"data_loader": {"dataset_dir": "t.mindrecord"}}}
    (tmp_path / "scimind-train.yaml").write_text(yaml.safe_dump(scimind))
    return tmp_path


def translated(system: str, command: str) -> Translation:
    # KnowLM's commands for one machine take all of its GPUs.
    return translate(system, shlex.split(command, comments=True), 8 if "--include" in command else None)


@pytest.mark.parametrize(
    ("system", "command", "verb", "expected"), COMMANDS, ids=[f"{s}-{i}" for i, (s, *_) in enumerate(COMMANDS)]
)
def test_a_command_of_a_readme(
    old_files: Path, system: str, command: str, verb: tuple[str, ...], expected: dict[str, Any]
) -> None:
    translation = translated(system, command)
    assert translation.verb == verb
    assert {name: translation.values.get(name) for name in expected} == expected
    assert not [line for line in translation.lines if line.verdict == "refused"]
    # Each flag that was given has its line.
    for word in shlex.split(command, comments=True):
        if word.startswith("--") and word.split("=")[0] not in (
            "--nproc_per_node",
            "--master_port",
            "--num_gpus",
            "--include",
        ):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            if name not in ("num_nodes", "hostfile", "mode", "config") and verb[:1] != ("convert",):
                assert any(name in line.word for line in translation.lines), name
    if verb and verb[0] in CONFIGS and translation.values:
        build(nested(translation.values), CONFIGS[verb[0]])


@pytest.mark.parametrize(("system", "command", "way_out"), REFUSED)
def test_what_cannot_be_done_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    command: str,
    way_out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_as.main([system, "--", *shlex.split(command)]) == 2
    printed = capsys.readouterr()
    assert "refused" in printed.out
    assert way_out in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("system", "command", "message"),
    [
        ("knowm", "python finetune.py", "did you mean 'knowlm'?"),
        ("k2", "python finetun.py", "'finetun' is not a script of k2"),
        ("k2", "python finetune.py --base_modl X", "did you mean --base_model?"),
        ("k2", "python finetune.py --data_path X", "--base_model: missing"),
        ("k2", "python finetune.py --base_model X --num_epochs many", "--num_epochs: 'many' is not a number"),
        ("k2", "python finetune.py X", "belongs to no flag"),
        ("k2", "python finetune.py --base_model", "--base_model: needs a value"),
        ("k2", "python run_clm.py", "add --model_name_or_path DIR"),
        ("knowlm", "deepspeed train.py --model_name_or_path M --output_dir O", "add --devices N"),
        (
            "alpaca",
            "torchrun train.py --model_name_or_path M --output_dir O --deepspeed no.json",
            "there is no file 'no.json'",
        ),
        (
            "alpaca",
            "torchrun train.py --model_name_or_path M --output_dir O --lr_scheduler_type step",
            "'step' is not known",
        ),
        ("scimind", "python run_mindformer.py --config no.yaml", "there is no file 'no.yaml'"),
        ("darwin", "python sii_test.py MODEL", "data: missing"),
        ("k2", "--x", "no script"),
    ],
)
def test_bad_input_is_named(system: str, command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        translate(system, shlex.split(command))
    assert message in str(error.value)


def test_the_configuration_is_written_and_the_command_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = "python finetune.py --base_model M --data_path D.json --output_dir O"
    assert run_as.main(["alpaca-lora", "--dry_run", "--", *shlex.split(old)]) == 0
    text = (tmp_path / "run-as-alpaca-lora.yaml").read_text()
    assert text.startswith(f"# {old}\n")
    config = build(yaml.safe_load(text), RunConfig)
    assert config.lora is not None and config.lora.targets == ("q_proj", "v_proj")
    assert "jaxlm train --config run-as-alpaca-lora.yaml" in capsys.readouterr().out
    # The same again is no mistake; other settings do not replace the file.
    assert run_as.main(["alpaca-lora", "--dry_run", "--", *shlex.split(old)]) == 0
    assert run_as.main(["alpaca-lora", "--dry_run", "--", *shlex.split(old), "--lora_r", "4"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "run-as-alpaca-lora.yaml").read_text() == text


def test_every_system_has_a_readme_command() -> None:
    assert {system for system, *_ in COMMANDS} | {"knowlm-qlora"} == set(SYSTEMS)
