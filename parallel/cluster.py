"""Which process of how many this is: by flags, or by the environment of SLURM, Open MPI or a pod of TPUs.

`jax.distributed` finds process 0 by itself under SLURM, Open MPI 4 and on TPUs. But it waits for others where a task is
the only one, takes one GPU a process whatever the node has, and needs mpi4py for Open MPI 5: handled here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import zlib
from collections.abc import Mapping

from errors import UserError

FLAGS = ("coordinator_address", "num_processes", "process_id")
FIRST_PORT, NUM_PORTS = 61_440, 4_096  # the end of the range of ports that no service has for itself
# A TPU VM without a metadata server lists its workers in one of these.
TPU_WORKERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of a run.

    Attributes:
      coordinator_address: HOST:PORT of process 0, the same for all; None: JAX finds it.
      num_processes: of the run.
      process_id: of this process, counted from 0.
      local_device_ids: GPUs of this host that it takes; empty: all that it sees.
      found_by: "flags", "SLURM" or "Open MPI".
    """

    coordinator_address: str | None
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] = ()
    found_by: str = "flags"

    @property
    def detection(self) -> str:
        """The method by which `jax.distributed.initialize` finds process 0."""
        return "deactivate" if self.coordinator_address else {"SLURM": "slurm", "Open MPI": "ompi"}[self.found_by]

    def __str__(self) -> str:
        where = self.coordinator_address or f"the address that JAX finds by {self.found_by}"
        return f"process {self.process_id} of {self.num_processes}, with process 0 at {where}"


def check_address(address: str) -> tuple[str, int]:
    """Return host, without the brackets of IPv6, and port.

    Raises:
      UserError: if the address is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or (":" in host and not host.startswith("[")) or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address={address}: expected HOST:PORT of the machine of process 0, such as 10.0.0.1:1234 "
            "or [::1]:1234"
        )
    return host.strip("[]"), int(port)


def _by_flags(address: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    given = dict(zip(FLAGS, (address, num_processes, process_id), strict=True))
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(FLAGS):
        return None
    if address is None or num_processes is None or process_id is None:
        present = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
        raise UserError(
            f"{present} without {', '.join(missing)}: give all three, the same address and number to every process and "
            "each an id of its own"
        )
    check_address(address)
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}; expected 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} with --num_processes={num_processes}; expected 0 to {num_processes - 1}"
        )
    return Place(address, num_processes, process_id)


def _own_gpus(environ: Mapping[str, str], index: int, count: int) -> tuple[int, ...]:
    """Return the GPUs of one of several processes of a host that all see the same ones."""
    visible = [each for each in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    if count == 1 or len(visible) == 1 or "SLURM_GPUS_PER_TASK" in environ:  # SLURM shows each task its own
        return ()
    share = len(visible) // count
    return tuple(range(index * share, (index + 1) * share)) if share else (index,)


def _by_slurm(environ: Mapping[str, str], address: str | None) -> Place | None:
    """Return the place of a task of srun; None outside one, or if it is the only one."""
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    count = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if count < 2 or any(name not in environ for name in names):
        return None
    tasks = re.findall(r"(?:^|,)(\d+)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # such as "2(x3),1"
    gpus = _own_gpus(environ, int(environ["SLURM_LOCALID"]), max(map(int, tasks), default=1))
    return Place(address, count, int(environ["SLURM_PROCID"]), gpus, "SLURM")


def _by_open_mpi(environ: Mapping[str, str], address: str | None) -> Place | None:
    """Return the place of a process of mpirun; None outside one, or if it is the only one."""
    count, on_host = (int(environ.get(f"OMPI_COMM_WORLD_{name}", 1)) for name in ("SIZE", "LOCAL_SIZE"))
    if count < 2:
        return None
    if address is None and "OMPI_MCA_orte_hnp_uri" not in environ:  # version 5, which does not say where mpirun is
        if on_host < count:
            raise UserError(
                f"Open MPI started {count} processes on several hosts and does not say where process 0 is; give "
                "--coordinator_address HOST:PORT, HOST the first of mpirun's hosts"
            )
        port = FIRST_PORT + zlib.crc32(environ.get("PMIX_NAMESPACE", "").encode()) % NUM_PORTS
        address = f"127.0.0.1:{environ.get('JAX_COORDINATOR_PORT') or port}"
    gpus = _own_gpus(environ, int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)), on_host)
    return Place(address, count, int(environ["OMPI_COMM_WORLD_RANK"]), gpus, "Open MPI")


def find_place(
    environ: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Return the place of this process; None if it is the only one, or a worker of a pod of TPUs.

    Flags come first; an address alone is enough where the environment has the rest. Open MPI comes before SLURM, under
    which mpirun may run.

    Raises:
      UserError: naming a flag that is wrong or missing.
    """
    if num_processes is None and process_id is None:
        if coordinator_address is not None:
            check_address(coordinator_address)
        found = _by_open_mpi(environ, coordinator_address) or _by_slurm(environ, coordinator_address)
        if found:
            return found
    place = _by_flags(coordinator_address, num_processes, process_id)
    return place if place and place.num_processes > 1 else None


def is_tpu_worker(environ: Mapping[str, str]) -> bool:
    """Return whether this machine may be part of a pod of TPUs, so that JAX may ask its metadata server.

    JAX, once imported, has set TPU_SKIP_MDS_QUERY where it saw no TPUs.
    """
    if "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu") or not importlib.util.find_spec("libtpu"):
        return False
    return "TPU_SKIP_MDS_QUERY" not in environ or any(environ.get(name) for name in TPU_WORKERS)
