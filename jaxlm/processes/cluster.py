"""Which process of which run this is, by the configuration, the environment, or the cluster that started it."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxlm.config import DistributedConfig
from jaxlm.errors import UserError
from jaxlm.processes.roll_call import Process


def on_tpu_vm() -> bool:
    """Whether JAX has found TPU chips on this machine, and is to use them."""
    from jax._src import cloud_tpu_init  # what `import jax` has detected; it has no public name

    return bool(cloud_tpu_init.running_in_cloud_tpu_vm) and not only_cpu()


def only_cpu() -> bool:
    """Whether the configuration limits JAX to the CPU (JAX_PLATFORMS)."""
    return (getattr(jax.config, "jax_platforms", None) or "").split(",")[0] == "cpu"


def find_cluster(environ: Mapping[str, str], on_tpu_vm: bool) -> str | None:
    """The kind of cluster that has started several processes, by the variables it sets; None for a single process.

    Args:
        environ: the environment.
        on_tpu_vm: whether JAX found TPU chips on this machine.
    """

    def count(name: str) -> int:
        return int(environ[name]) if environ.get(name, "").isdigit() else 1

    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    # SLURM_STEP_NODELIST: started by srun, and not the batch script around it.
    if count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environ:
        return "Slurm"
    if on_tpu_vm and ("," in workers or count("MEGASCALE_NUM_SLICES") > 1):
        return "TPU on GKE"
    if on_tpu_vm and not workers and "TPU_SKIP_MDS_QUERY" not in environ:
        return "TPU pod"
    if not on_tpu_vm and "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes job"
    return None


def find_process(config: DistributedConfig, environ: Mapping[str, str], on_tpu_vm: bool = False) -> Process | None:
    """Which process of which run this is: by the configuration, else JAX_* variables, else the cluster's variables.

    Returns:
        None for a single process.

    Raises:
        UserError: for numbers that do not fit, naming what is missing.
    """
    coordinator = config.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(config.num_processes, environ, "JAX_NUM_PROCESSES")
    process = _number(config.process_id, environ, "JAX_PROCESS_ID")
    cluster = find_cluster(environ, on_tpu_vm)
    if cluster == "Open MPI":  # its versions agree on no variable for the address
        processes = int(environ["OMPI_COMM_WORLD_SIZE"]) if processes is None else processes
        process = int(environ["OMPI_COMM_WORLD_RANK"]) if process is None else process
    if cluster is not None and None in (coordinator, processes, process):
        coordinator, processes, process = _ask_cluster(cluster, config.timeout, coordinator, processes, process)
    if (coordinator, processes, process) == (None, None, None) or processes == 1:
        return None
    numbers = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [f"--{name}" for name, value in numbers.items() if value is None]
    if missing or coordinator is None or processes is None or process is None:
        where = f"{cluster} does not set it" if cluster else "no cluster that sets it was found"
        raise UserError(
            f"distributed: {', '.join(missing)} missing ({where}); give --coordinator HOST:PORT, "
            "--num_processes N and --process_id I"
        )
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"distributed.process_id: {process} of {processes} processes; it must be from 0 to {max(processes, 1) - 1}"
        )
    return Process(coordinator, processes, process)


def _number(given: int | None, environ: Mapping[str, str], name: str) -> int | None:
    if given is not None or name not in environ:
        return given
    if not environ[name].isdigit():
        raise UserError(f"{name}: {environ[name]!r} in the environment is not a whole number")
    return int(environ[name])


def _ask_cluster(
    cluster: str, timeout: int, coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str | None, int | None, int | None]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it has no public name

    try:
        numbers = ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, process, None, None, timeout)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UserError(
            f"distributed: this is a process of {cluster}, whose other processes could not be found "
            f"({type(error).__name__}: {error}); give --coordinator HOST:PORT, --num_processes N and --process_id I"
        ) from error
    return numbers[:3]
