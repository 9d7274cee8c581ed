"""Which process of how many this is: by flags, or as SLURM or Open MPI say in the environment.

JAX can look for some of this itself. It then takes one GPU for each process, whatever the node has, needs mpi4py for
Open MPI 5, and waits for a metadata server where there may be none; what is read here needs nothing but the
environment. Only pods of TPUs are left to JAX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from errors import UserError

FLAGS = ("coordinator_address", "num_processes", "process_id")
FIRST_PORT, NUM_PORTS = 61_440, 4_096  # the end of the range of ports that no service has for itself
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus
# A TPU VM that is told not to ask its metadata server learns of other workers by these alone.
TPU_WORKERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of a run.

    Attributes:
      coordinator_address: HOST:PORT of process 0, the same for all.
      num_processes: of the run.
      process_id: of this process, counted from 0.
      local_device_ids: GPUs of this host that it takes; None: all that it sees.
      found_by: who says so, for the log.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    found_by: str = "flags"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Host name or address, without the brackets of IPv6, and port."""
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


# --- flags -----------------------------------------------------------------------------------------------------------


def check_address(address: str) -> str:
    """Returns the address.

    Raises:
      UserError: if it is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or (":" in host and not host.startswith("[")) or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address={address}: expected HOST:PORT of the machine of process 0, such as 10.0.0.1:1234 "
            "or [::1]:1234"
        )
    return address


def place_by_flags(address: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """Returns the place that the flags give; None if there are none.

    Raises:
      UserError: if only some are given, or they do not go together.
    """
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


# --- environment -----------------------------------------------------------------------------------------------------


def _port(environ: Mapping[str, str], job: str) -> int:
    """Returns a port that all processes of a job know, and that differs between most jobs."""
    return int(environ.get("JAX_COORDINATOR_PORT") or FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS)


def _own_gpus(environ: Mapping[str, str], index: int, count: int) -> tuple[int, ...] | None:
    """Returns the GPUs of one of several processes of a host that all see the same ones; None: all that it sees."""
    if count == 1 or "SLURM_GPUS_PER_TASK" in environ:  # SLURM shows each task its own
        return None
    visible = [each for each in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    share = len(visible) // count
    if len(visible) == 1:
        return None
    return tuple(range(index * share, (index + 1) * share)) if share else (index,)


def first_host(nodes: str) -> str:
    """Returns the first name of a list of SLURM's, such as "node[001-004,007],other"."""
    found = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _tasks_of_hosts(tasks: str) -> int:
    """Returns the largest number of tasks of a host in SLURM's "2(x3),1"."""
    return max((int(number) for number in re.findall(r"(?:^|,)(\d+)", tasks)), default=1)


def place_by_slurm(environ: Mapping[str, str]) -> Place | None:
    """Returns the place of a task of srun; None outside one, or if it is the only one."""
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    count = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if count < 2 or any(name not in environ for name in names):
        return None
    port = _port(environ, f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}")
    on_host = _tasks_of_hosts(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return Place(
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        count,
        int(environ["SLURM_PROCID"]),
        _own_gpus(environ, int(environ["SLURM_LOCALID"]), on_host),
        found_by="SLURM",
    )


def _open_mpi_address(environ: Mapping[str, str], address: str | None, on_host: int, count: int) -> str:
    """Returns where process 0 of Open MPI is: with mpirun itself (version 4), or on this host as all others are.

    Raises:
      UserError: if the environment does not say.
    """
    if address is not None:
        return check_address(address)
    launcher = environ.get("OMPI_MCA_orte_hnp_uri", "")  # such as "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    port = _port(environ, launcher.partition(".")[0] or environ.get("PMIX_NAMESPACE", ""))
    if on_host == count:
        return f"127.0.0.1:{port}"
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", launcher)
    if not found:
        raise UserError(
            f"Open MPI started {count} processes on several hosts and does not say where process 0 is; give "
            "--coordinator_address HOST:PORT, HOST the first of mpirun's hosts"
        )
    return f"{found[1]}:{port}" if found[1] else f"[{found[2]}]:{port}"


def place_by_open_mpi(environ: Mapping[str, str], address: str | None = None) -> Place | None:
    """Returns the place of a process of mpirun; None outside one, or if it is the only one.

    Raises:
      UserError: if the address is missing and the environment does not say it.
    """
    count = int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    if count < 2:
        return None
    on_host = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    return Place(
        _open_mpi_address(environ, address, on_host, count),
        count,
        int(environ["OMPI_COMM_WORLD_RANK"]),
        _own_gpus(environ, int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)), on_host),
        found_by="Open MPI",
    )


def find_place(
    environ: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Returns the place of this process; None if it is the only one, or a worker of a pod of TPUs.

    Flags come first. An address alone is enough where the environment says the rest. Open MPI comes before SLURM, under
    which mpirun may itself run.

    Raises:
      UserError: naming a flag that is wrong or missing.
    """
    if num_processes is None and process_id is None:
        if coordinator_address is not None:
            check_address(coordinator_address)
        found = place_by_open_mpi(environ, coordinator_address) or place_by_slurm(environ)
        if found:
            return dataclasses.replace(found, coordinator_address=coordinator_address or found.coordinator_address)
    place = place_by_flags(coordinator_address, num_processes, process_id)
    return place if place and place.num_processes > 1 else None


def is_tpu_worker(environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Says whether this machine has TPUs that may be part of a pod, so that JAX may ask its metadata server.

    Args:
      environ: environment variables.
      root: of the file system.
    """
    if "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu") or not importlib.util.find_spec("libtpu"):
        return False
    if "TPU_SKIP_MDS_QUERY" in environ and not any(environ.get(name) for name in TPU_WORKERS):
        return False
    has_devices = any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*"))
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    return has_devices and any(path.read_text().strip() == GOOGLE for path in vendors)
