"""Processes of several that are cheap: no model is compiled."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glscl_jax import processes


def joined(port: int, number: int, folder: str):
  """One of two; what it prints goes to `folder/out-NUMBER`."""
  file = os.open(f"{folder}/out-{number}", os.O_WRONLY | os.O_CREAT)
  os.dup2(file, 1)
  os.dup2(file, 2)
  cluster = processes.Cluster(
    source="test",
    address=f"localhost:{port}",
    num_processes=2,
    process_id=number,
  )
  return processes.joined(cluster, join_timeout=60.0, heartbeat_timeout=60.0)


def add_up(port: int, number: int, folder: str) -> None:
  """Sums over both for ever; touches `folder/NUMBER` after the first."""
  with joined(port, number, folder):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    ones = jax.make_array_from_process_local_data(
      NamedSharding(mesh, P("data")), jnp.ones(4)
    )
    while True:
      assert float(add(ones)) == 8.0
      pathlib.Path(folder, str(number)).touch()


def look(port: int, number: int, folder: str) -> None:
  """Asks for a folder of its own, as if it were one for both."""
  processes.SHARED_SECONDS = 0.5
  own = pathlib.Path(folder, f"own-{number}")
  own.mkdir()
  with joined(port, number, folder):
    processes.check_shared(own, option="--workdir=own")
