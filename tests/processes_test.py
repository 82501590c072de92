"""Which cluster a process finds, and what contradicts."""

from __future__ import annotations

import pytest
from absl import flags

from glscl_jax import processes

SLURM = {
  "SLURM_JOB_ID": "8195",
  "SLURM_STEP_NODELIST": "gpu[03-04,09],login1",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NUM_NODES": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "12288.0;tcp://10.96.0.1,10.148.0.1:34911"}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.h,t-1.h", "TPU_WORKER_ID": "1"}
SLICES = {
  "MEGASCALE_NUM_SLICES": "2",
  "MEGASCALE_SLICE_ID": "1",
  "MEGASCALE_COORDINATOR_ADDRESS": "s-0.h:8080",
}


def find(*arguments, environ=None, metadata=None):
  values = flags.FlagValues()
  processes.define_flags(values)
  values(["train.py", *arguments])
  told = metadata or {}
  return processes.find(
    values,
    environ=environ or {},
    read_metadata=lambda name: told[name] if name in told else None,
  )


def place(cluster):
  return cluster.address, cluster.num_processes, cluster.process_id


def test_a_process_that_is_alone_is_left_alone():
  assert find() is None
  assert find("--num_processes=1", "--process_id=0") is None


def test_flags_say_it_all():
  found = find(
    "--coordinator_address=a.b:99",
    "--num_processes=3",
    "--process_id=2",
    environ=SLURM,
  )
  assert found.source == "flags"
  assert place(found) == ("a.b:99", 3, 2)
  assert found.local_device is None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--num_processes=2"],
      "--coordinator_address and --process_id missing: the three of",
    ),
    (["--num_processes=2", "--process_id=0"], "--coordinator_address missing"),
    (["--coordinator_address=a:1"], "no cluster was found that tells how many"),
    (
      ["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
      "process 2 of 2 .flags.: --process_id counts from 0",
    ),
    (
      ["--coordinator_address=a", "--num_processes=2", "--process_id=0"],
      "--coordinator_address=a is not HOST:PORT",
    ),
    (
      ["--coordinator_address=a:70000", "--num_processes=2", "--process_id=0"],
      "--coordinator_address=a:70000 is not HOST:PORT",
    ),
  ],
)
def test_flags_that_contradict_each_other_are_named(arguments, message):
  with pytest.raises(processes.ProcessError, match=message):
    find(*arguments)


@pytest.mark.parametrize(
  ("address", "expected"),
  [("10.0.0.1:80", ("10.0.0.1", 80)), ("[fe80::1]:8482", ("fe80::1", 8482))],
)
def test_addresses_have_a_host_and_a_port(address, expected):
  assert processes.split_address(address) == expected


def test_a_step_of_slurm_is_found():
  found = find(environ=SLURM)
  assert found.source == "Slurm"
  assert place(found) == ("gpu03:61443", 4, 2)  # 8195 = 2 * 4096 + 3
  # One process of a host takes all of its GPUs.
  assert found.local_device is None


def test_several_processes_of_a_host_take_a_device_each():
  two_nodes = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
  assert find(environ=two_nodes).local_device == 1


def test_a_batch_script_of_slurm_is_no_cluster():
  alone = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
  assert find(environ=alone) is None
  assert find(environ=SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | ONE_TASK) is None


ONE_TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node001", "node001"),
    ("node001,host2", "node001"),
    ("node[001-015],host2", "node001"),
    ("node[7,9-15]-ib,host2", "node7-ib"),
    ("r[1-2]n[03-04]", "r1n03"),
  ],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
  assert processes.first_host(nodes) == first


def test_open_mpi_is_found():
  found = find(environ=OPEN_MPI | ORTE)
  assert place(found) == ("10.96.0.1:61443", 2, 1)
  assert found.local_device is None


def test_an_open_mpi_that_tells_no_address_asks_for_it():
  with pytest.raises(processes.ProcessError, match="add --coordinator_address"):
    find(environ=OPEN_MPI)
  found = find("--coordinator_address=a:7", environ=OPEN_MPI)
  assert place(found) == ("a:7", 2, 1)


def test_a_pod_of_gke_is_found():
  assert place(find(environ=GKE)) == ("t-0.h:8482", 2, 1)


def test_slices_of_gke_are_numbered_one_after_the_other():
  assert place(find(environ=GKE | SLICES)) == ("s-0.h:8482", 4, 3)


@pytest.mark.parametrize("platform", ["cpu", "cuda,cpu"])
def test_a_run_on_another_platform_asks_no_tpu(platform):
  assert find(environ=GKE | {"JAX_PLATFORMS": platform}) is None


def test_one_host_of_gke_is_alone():
  assert find(environ=GKE | {"TPU_WORKER_HOSTNAMES": "t-0.h"} | FIRST) is None


FIRST = {"TPU_WORKER_ID": "0"}


@pytest.mark.parametrize(
  "endpoints", ["10.0.0.2,10.0.0.3", "w:0:10.0.0.2,w:1:10.0.0.3"]
)
def test_workers_of_a_tpu_vm_are_found_in_its_metadata(endpoints):
  metadata = {
    "attributes/worker-network-endpoints": endpoints,
    "attributes/agent-worker-number": "1",
  }
  assert place(find(metadata=metadata)) == ("10.0.0.2:8482", 2, 1)
  slices = "A: 'x'\n" + "".join(f"{k}: '{v}'\n" for k, v in SLICES.items())
  metadata["attributes/tpu-env"] = slices
  assert place(find(metadata=metadata)) == ("s-0.h:8482", 4, 3)
