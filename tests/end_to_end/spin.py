"""A process of several that adds up numbers of all, until it is ended."""

from __future__ import annotations

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glscl_jax import processes


def run(port: int, number: int, folder: str) -> None:
  """Touches `folder/NUMBER` once the first sum is there."""
  file = os.open(f"{folder}/out-{number}", os.O_WRONLY | os.O_CREAT)
  os.dup2(file, 1)
  os.dup2(file, 2)
  cluster = processes.Cluster(
    source="test",
    address=f"localhost:{port}",
    num_processes=2,
    process_id=number,
  )
  with processes.joined(cluster, join_timeout=60.0, heartbeat_timeout=60.0):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    ones = jax.make_array_from_process_local_data(
      NamedSharding(mesh, P("data")), jnp.ones(4)
    )
    while True:
      assert float(add(ones)) == 8.0
      pathlib.Path(folder, str(number)).touch()
  sys.exit(0)
