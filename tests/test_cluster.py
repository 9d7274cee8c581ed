"""How a process learns which one it is: from flags, SLURM or Open MPI, and from nothing on a laptop."""

import contextlib
import importlib.util
import socket
import time

import pytest
import tiny

from parallel import distributed, membership
from parallel.cluster import Place, find_place, first_host, is_tpu_worker

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
    assert Place("[::1]:80", 2, 1).host_and_port == ("::1", 80)
    assert find_place(SLURM, "other:80").coordinator_address == "other:80"
    assert find_place(SLURM, "other:80").process_id == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("n[3-4]-ib,host2", "n3-ib"),
    ],
)
def test_the_first_host_of_slurm(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_slurm():
    place = find_place(SLURM)
    assert (place.num_processes, place.process_id, place.local_device_ids, place.found_by) == (4, 2, None, "SLURM")
    host, port = place.host_and_port
    assert host == "node003"
    assert 61_440 <= port < 65_536
    same = [find_place(SLURM | {"SLURM_PROCID": str(i)}).coordinator_address for i in range(4)]
    assert set(same) == {place.coordinator_address}
    assert find_place(SLURM | {"SLURM_STEP_ID": "1"}).coordinator_address != place.coordinator_address
    assert find_place(SLURM | {"JAX_COORDINATOR_PORT": "80"}).host_and_port == ("node003", 80)


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # a task has the whole node
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "5"}, None),  # what the scheduler shows is the task's own
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({}, (1,)),
    ],
)
def test_tasks_of_one_node_share_its_gpus(environ, gpus):
    of_node = {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert find_place(SLURM | of_node | environ).local_device_ids == gpus


def test_a_process_of_open_mpi():
    place = find_place(OPEN_MPI_5 | SLURM)  # mpirun inside a job of SLURM
    assert (place.num_processes, place.process_id, place.found_by) == (4, 3, "Open MPI")
    assert place.host_and_port[0] == "127.0.0.1"
    assert find_place(OPEN_MPI_4).host_and_port[0] == "10.96.0.1"
    six = OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"}
    assert find_place(six).host_and_port[0] == "fe80::b9b"
    of_hosts = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="does not say where process 0 is; give --coordinator_address HOST:PORT"):
        find_place(of_hosts)
    assert find_place(of_hosts, "first:80").coordinator_address == "first:80"


@pytest.fixture
def tpu(tmp_path, monkeypatch):
    """A file system with the devices of a TPU, and libtpu installed."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    vendor = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
    vendor.mkdir(parents=True)
    (vendor / "vendor").write_text("0x1ae0\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    return tmp_path


def test_only_a_machine_with_tpus_asks_for_a_pod(tpu, tmp_path_factory, monkeypatch):
    assert is_tpu_worker({}, tpu)
    assert is_tpu_worker({"JAX_PLATFORMS": "tpu,cpu"}, tpu)
    assert not is_tpu_worker({"JAX_PLATFORMS": "cpu"}, tpu)
    assert not is_tpu_worker({"TPU_SKIP_MDS_QUERY": "1"}, tpu)
    assert is_tpu_worker({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, tpu)
    assert not is_tpu_worker({}, tmp_path_factory.mktemp("laptop"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not is_tpu_worker({}, tpu)


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
