"""How a process learns which one it is: from flags, SLURM or Open MPI, and from nothing on a laptop."""

import contextlib
import importlib.util
import os
import socket
import time

import pytest
import tiny

from parallel import distributed, membership
from parallel.cluster import Place, check_address, find_place, is_tpu_worker

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[003-006]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "PMIX_NAMESPACE": "prterun-host-123@1",
}
OPEN_MPI_4 = OPEN_MPI_5 | {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def test_a_laptop_is_alone():
    assert find_place({}) is None
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    assert find_place(SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun -n1 in a larger job
    assert find_place({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert find_place({}, "a:1", 1, 0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "--coordinator_address without --num_processes, --process_id: give all three"),
        ((None, 2, None), "--num_processes without --coordinator_address, --process_id"),
        (("a:1", 2, None), "--coordinator_address, --num_processes without --process_id"),
        (("a:1", 2, 2), "--process_id=2 with --num_processes=2; expected 0 to 1"),
        (("a:1", 2, -1), "--process_id=-1 with --num_processes=2; expected 0 to 1"),
        (("a:1", 0, 0), "--num_processes=0; expected 1 or more"),
        (("a", 2, 0), "--coordinator_address=a: expected HOST:PORT"),
        (("a:", 2, 0), "expected HOST:PORT"),
        ((":1", 2, 0), "expected HOST:PORT"),
        (("a:70000", 2, 0), "expected HOST:PORT"),
        (("::1:80", 2, 0), r"such as 10.0.0.1:1234 or \[::1\]:1234"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        find_place({}, *given)


def test_flags_come_before_the_environment():
    assert find_place(SLURM, "[::1]:80", 2, 1) == Place("[::1]:80", 2, 1)
    assert check_address("[::1]:80") == ("::1", 80)
    assert find_place(SLURM, "other:80") == Place("other:80", 4, 2, (), "SLURM")
    assert find_place(SLURM, "other:80").detection == "deactivate"


def test_a_task_of_slurm():
    assert find_place(SLURM) == Place(None, 4, 2, (), "SLURM")
    assert find_place(SLURM).detection == "slurm"  # JAX finds the first node


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ()),  # a task has the whole node
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "5"}, ()),  # what the scheduler shows is the task's own
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, ()),
        ({}, (1,)),
    ],
)
def test_tasks_of_one_node_share_its_gpus(environ, gpus):
    of_node = {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert find_place(SLURM | of_node | environ).local_device_ids == gpus


def test_a_process_of_open_mpi():
    place = find_place(OPEN_MPI_5 | SLURM)  # mpirun inside a job of SLURM
    assert (place.num_processes, place.process_id, place.found_by) == (4, 3, "Open MPI")
    host, port = check_address(place.coordinator_address)
    assert host == "127.0.0.1"
    assert 61_440 <= port < 65_536
    assert {find_place(OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": str(i)}).coordinator_address for i in range(4)} == {
        place.coordinator_address
    }
    assert find_place(OPEN_MPI_5 | {"JAX_COORDINATOR_PORT": "80"}).coordinator_address == "127.0.0.1:80"
    assert (find_place(OPEN_MPI_4).coordinator_address, find_place(OPEN_MPI_4).detection) == (None, "ompi")
    of_hosts = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="does not say where process 0 is; give --coordinator_address HOST:PORT"):
        find_place(of_hosts)
    assert find_place(of_hosts, "first:80").coordinator_address == "first:80"


def test_only_a_machine_with_tpus_asks_for_a_pod(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    assert is_tpu_worker({})
    assert is_tpu_worker({"JAX_PLATFORMS": "tpu,cpu"})
    assert not is_tpu_worker({"JAX_PLATFORMS": "cpu"})
    assert not is_tpu_worker({"TPU_SKIP_MDS_QUERY": "1"})
    assert is_tpu_worker({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"})
    if not os.path.exists("/dev/accel0"):
        assert "TPU_SKIP_MDS_QUERY" in os.environ  # by JAX, when it was imported
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not is_tpu_worker({})


def test_nobody_is_asked_and_nothing_waited_for_on_a_laptop(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("jax.distributed was started")

    monkeypatch.setattr(membership.jax.distributed, "initialize", refuse)
    monkeypatch.setattr(distributed, "find_place", lambda *args: None)
    distributed.initialize()
    assert distributed.is_alone()
    assert distributed.is_main_process()


def test_a_coordinator_that_cannot_be_reached_is_told_in_time():
    with contextlib.closing(socket.socket()) as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ValueError, match=rf"process 1 of 2 could not reach process 0 at {address} within 1 s"):
            distributed.initialize(address, 2, 1, start_seconds=1.0)
    assert time.monotonic() - start < 10
    assert distributed.is_alone()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("doctor", ["--num_processes=2"], "--mode doctor runs in one process and does not take --num_processes; modes"),
        pytest.param("train", ["--process_id=0"], "--process_id without", marks=pytest.mark.exhaustive),
    ],
)
def test_a_mistake_in_the_flags_ends_in_one_sentence(mode, flags, message, tmp_path):
    command = tiny.command("train", tmp_path, *flags)
    command[command.index("train")] = mode
    result = tiny.run(command)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
