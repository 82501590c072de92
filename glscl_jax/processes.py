"""Several processes as one run: finds the cluster, joins it, watches it.

`launch/train.py` calls `find` and enters `joined` before anything touches a
device. A process that is alone is left as it is. jax aborts in C++ where it
misses a process, with a stack trace and, of a coordinator that is not there,
after minutes: so processes come together by `roll_call.py` first, and hear
from it what happens to each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import re
import socket
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from glscl_jax import errors, roll_call

JOIN_TIMEOUT = 300.0  # seconds; hosts of a pod start minutes apart
HEARTBEAT_TIMEOUT = 100.0  # seconds, as jax's
JAX_GRACE = 60  # seconds more that jax waits, so that its abort comes last
NEWS_SECONDS = 2.0  # a broken collective may be known before its reason
SHARED_SECONDS = 30.0  # until a network file system shows a new file
TPU_PORT = 8482  # jax's own choice
FIRST_PORT, NUM_PORTS = 61440, 4096  # above what systems hand out, as jax does

FLAG_NAMES = ("coordinator_address", "num_processes", "process_id")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"

ReadMetadata = Callable[[str], str | None]


class ProcessError(errors.UserError):
  """A run of several processes that cannot begin; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Which process of how many this is."""

  source: str  # who said so
  address: str  # HOST:PORT at which process 0 is found
  num_processes: int
  process_id: int
  local_device: int | None = None  # the only one to use; None: all


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that `find` and `joined` read."""
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT where process 0 is found, the same for all processes. Not "
    "needed on TPU pods, Slurm, and Open MPI before 5.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_processes", None, "Processes of the run.", flag_values=values
  )
  flags.DEFINE_integer(
    "process_id",
    None,
    "Number of this process: 0, 1, ..",
    flag_values=values,
  )
  flags.DEFINE_float(
    "join_timeout",
    JOIN_TIMEOUT,
    "Seconds until all processes must have started.",
    lower_bound=1.0,
    flag_values=values,
  )
  flags.DEFINE_float(
    "heartbeat_timeout",
    HEARTBEAT_TIMEOUT,
    "Seconds of silence after which a process counts as lost.",
    lower_bound=1.0,
    flag_values=values,
  )


def find(
  values: flags.FlagValues,
  *,
  environ: Mapping[str, str] = os.environ,
  read_metadata: ReadMetadata | None = None,
) -> Cluster | None:
  """The cluster this process belongs to; None where it is alone.

  Args:
    values: flags of `define_flags`; they go before what is detected.
    environ: tells of Slurm, Open MPI and TPUs.
    read_metadata: reads an attribute of this TPU VM; None: from its server,
      where this looks like a TPU VM.

  Raises:
    ProcessError: flags or variables that contradict each other.
  """
  given = {name: values[name].value for name in FLAG_NAMES}
  cluster = _of_flags(given)
  if cluster is None:
    address = given["coordinator_address"]
    for look in (_of_slurm, _of_open_mpi):
      cluster = cluster or look(environ, address)
    cluster = cluster or _of_tpu(environ, address, read_metadata)
    if cluster is None and address is not None:
      raise ProcessError(
        f"--coordinator_address={address}: no cluster was found that tells how "
        "many processes there are: add --num_processes and --process_id"
      )
  if cluster is None:
    return None
  _check(cluster)
  return cluster if cluster.num_processes > 1 else None


def _of_flags(given: Mapping[str, str | int | None]) -> Cluster | None:
  if given["num_processes"] is None and given["process_id"] is None:
    return None
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if missing and given["num_processes"] != 1:
    raise ProcessError(
      f"{' and '.join(missing)} missing: the three of "
      f"{', '.join(f'--{name}' for name in FLAG_NAMES)} go together"
    )
  return Cluster(
    source="flags",
    address=given["coordinator_address"] or "localhost:1",
    num_processes=given["num_processes"],
    process_id=given["process_id"] or 0,
  )


def _check(cluster: Cluster) -> None:
  number, of = cluster.process_id, cluster.num_processes
  if not 0 <= number < of:
    raise ProcessError(
      f"process {number} of {of} ({cluster.source}): --process_id counts from "
      f"0 to --num_processes - 1"
    )
  split_address(cluster.address)


def split_address(address: str) -> tuple[str, int]:
  """Host and port of HOST:PORT or [HOST]:PORT.

  Raises:
    ProcessError: it is neither.
  """
  found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d{1,5})", address)
  if found is None or not 0 < int(found[3]) < 1 << 16:
    raise ProcessError(f"--coordinator_address={address} is not HOST:PORT")
  return found[1] or found[2], int(found[3])


def _of_slurm(
  environ: Mapping[str, str], address: str | None
) -> Cluster | None:
  """A step of srun. A batch script itself has no SLURM_STEP_NODELIST."""
  names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
  if not all(name in environ for name in names):
    return None
  tasks = int(environ["SLURM_STEP_NUM_TASKS"])
  port = FIRST_PORT + int(environ["SLURM_JOB_ID"]) % NUM_PORTS
  several = tasks > int(environ["SLURM_STEP_NUM_NODES"])
  return Cluster(
    source="Slurm",
    address=address or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
    num_processes=tasks,
    process_id=int(environ["SLURM_PROCID"]),
    local_device=int(environ["SLURM_LOCALID"]) if several else None,
  )


def first_host(node_list: str) -> str:
  """The first of Slurm's hosts: of "gpu[03-07,9],login" gpu03."""
  plain = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", node_list)
  return plain.split(",")[0]


def _of_open_mpi(
  environ: Mapping[str, str], address: str | None
) -> Cluster | None:
  if "OMPI_COMM_WORLD_SIZE" not in environ:
    return None
  size = int(environ["OMPI_COMM_WORLD_SIZE"])
  uri = "OMPI_MCA_orte_hnp_uri"  # not of Open MPI 5
  if address is None and uri in environ:
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; job numbers lie 4096 apart
    job = int(environ[uri].split(".")[0]) // 4096
    ip = re.search(r"tcp6?://\[?([^,\]]+?)[,\]:]", environ[uri])
    if ip is not None:
      address = f"{ip[1]}:{FIRST_PORT + job % NUM_PORTS}"
  if address is None and size > 1:
    raise ProcessError(
      f"Open MPI started {size} processes, but this version of it does not "
      "tell where: add --coordinator_address=HOST:PORT, the host that rank 0 "
      "is on and a free port of it"
    )
  several = int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"]) > 1
  return Cluster(
    source="Open MPI",
    address=address or "localhost:1",
    num_processes=size,
    process_id=int(environ["OMPI_COMM_WORLD_RANK"]),
    local_device=(
      int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]) if several else None
    ),
  )


def _of_tpu(
  environ: Mapping[str, str],
  address: str | None,
  read_metadata: ReadMetadata | None,
) -> Cluster | None:
  """A TPU pod: GKE says who is there in variables, a TPU VM when asked."""
  platforms = environ["JAX_PLATFORMS"] if "JAX_PLATFORMS" in environ else ""
  if platforms and "tpu" not in platforms.split(","):
    return None
  facts = {
    name: environ[name]
    for name in (
      "MEGASCALE_COORDINATOR_ADDRESS",
      "MEGASCALE_NUM_SLICES",
      "MEGASCALE_SLICE_ID",
    )
    if name in environ
  }
  hosts = ""
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    hosts = hosts or (environ[name] if name in environ else "")
  if hosts and "TPU_WORKER_ID" in environ:
    number = environ["TPU_WORKER_ID"]
  else:
    if read_metadata is None:
      read_metadata = _read_metadata if _is_tpu_vm(environ) else lambda _: None
    hosts = read_metadata("attributes/worker-network-endpoints")
    number = read_metadata("attributes/agent-worker-number")
    told = read_metadata("attributes/tpu-env") or ""
    # Lines like MEGASCALE_NUM_SLICES: '2'
    facts = dict(re.findall(r"(MEGASCALE_\w+): *'?([^'\s]+)", told)) | facts
  if not hosts or number is None:
    return None
  # HOST, HOST:PORT, or NAME:ID:HOST
  listed = [host.split(":") for host in hosts.split(",")]
  first = listed[0][2] if len(listed[0]) == 3 else listed[0][0]
  slices, slice_id = 1, 0
  if "MEGASCALE_NUM_SLICES" in facts:
    slices = int(facts["MEGASCALE_NUM_SLICES"])
    slice_id = int(facts["MEGASCALE_SLICE_ID"])
    first = facts["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0]
  return Cluster(
    source="TPU pod",
    address=address or f"{first}:{TPU_PORT}",
    num_processes=len(listed) * slices,
    process_id=int(number) + slice_id * len(listed),
  )


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
  """Whether a TPU is here. libtpu alone may be here to compile for one."""
  return (
    "TPU_SKIP_MDS_QUERY" not in environ
    and importlib.util.find_spec("libtpu") is not None
    and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
  )


def _read_metadata(name: str) -> str | None:
  request = urllib.request.Request(
    METADATA + name, headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return None  # no machine of Google's, or it has no such attribute


@contextlib.contextmanager
def joined(
  cluster: Cluster | None, *, join_timeout: float, heartbeat_timeout: float
) -> Iterator[roll_call.RollCall | None]:
  """Within, this process is one of the cluster's to jax.

  An error inside ends this process at once, after the others were told: what
  would wait for them is left out. Where another process is lost or fails, this
  one ends from a thread, in the midst of whatever it does.

  Args:
    cluster: of `find`; None: nothing is done.
    join_timeout: seconds until all must be there.
    heartbeat_timeout: seconds of silence after which one counts as lost.

  Yields:
    What the processes hear from each other by; None where it is alone.

  Raises:
    RollCallError: not all have come.
  """
  if cluster is None:
    yield None
    return
  host, port = split_address(cluster.address)
  seat = roll_call.Seat(
    host=host,
    port=port,
    process_id=cluster.process_id,
    num_processes=cluster.num_processes,
    join_timeout=join_timeout,
    heartbeat_timeout=heartbeat_timeout,
  )
  calls, service_port = roll_call.join(seat, offer=_find_port, on_end=_end)
  try:
    _initialize(cluster, host, service_port, join_timeout, heartbeat_timeout)
    yield calls
    jax.distributed.shutdown()  # all have come here
  except errors.UserError as error:
    calls.wait_for_news(NEWS_SECONDS)
    calls.fail(str(error), code=2)
    _end(roll_call.Verdict(text=str(error), code=2))
  except KeyboardInterrupt:
    calls.fail("it was interrupted", code=130)
    _end(roll_call.Verdict(text="interrupted", code=130))
  except Exception as error:
    calls.wait_for_news(NEWS_SECONDS)
    traceback.print_exc()
    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    calls.fail(f"{last:.300} (its output has more)", code=1)
    _end(roll_call.Verdict(text=last, code=1))
  calls.leave()


def _initialize(
  cluster: Cluster,
  host: str,
  port: int,
  join_timeout: float,
  heartbeat_timeout: float,
) -> None:
  # It would take SIGTERM for itself and, in a run that is continued, lose one
  # that comes before the first step.
  jax.config.update("jax_enable_preemption_service", False)
  address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
  inside = "[::1]" if host == "::1" else "127.0.0.1"
  jax.distributed.initialize(
    address,
    cluster.num_processes,
    cluster.process_id,
    local_device_ids=cluster.local_device,
    # jax would take one GPU of a host that has one process for all.
    cluster_detection_method="deactivate",
    coordinator_bind_address=(
      f"{inside}:{port}" if roll_call.is_loopback(host) else None
    ),
    initialization_timeout=round(join_timeout),
    heartbeat_timeout_seconds=round(heartbeat_timeout) + JAX_GRACE,
  )


def _find_port() -> int:
  with socket.socket() as free:
    free.bind(("", 0))
    return free.getsockname()[1]


def _end(verdict: roll_call.Verdict) -> None:
  """Ends this process, whatever its threads wait for and hold."""
  os.write(2, f"error: {verdict.text}\n".encode())
  for worker in multiprocessing.active_children():
    worker.terminate()
  os._exit(verdict.code)


def check_shared(folder: pathlib.Path, *, option: str) -> None:
  """Checks that all processes see one and the same folder.

  Args:
    folder: exists in every process.
    option: what the user gave, such as "--workdir=DIR"; begins the message.

  Raises:
    ProcessError: naming the processes that see another one.
  """
  if jax.process_count() == 1:
    return
  token = int.from_bytes(os.urandom(3), "little")
  token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
  mark = folder / f".process-0-{token:06x}"
  if jax.process_index() == 0:
    mark.touch()
  end = time.monotonic() + SHARED_SECONDS
  seen = False
  while not seen and time.monotonic() < end:
    os.listdir(folder)  # lets network file systems look again
    seen = mark.exists()
    time.sleep(0.0 if seen else 0.5)
  seen_N = multihost_utils.process_allgather(np.int32(seen))
  if jax.process_index() == 0:
    mark.unlink()
  if not seen_N.all():
    blind = ", ".join(map(str, np.flatnonzero(seen_N == 0)))
    raise ProcessError(
      f"{option}: processes {blind} do not see what process 0 writes there; "
      "name a folder of a file system that all hosts share"
    )
