r"""Compiles a recipe for accelerators that are not here: does it fit, how fast.

  python launch/compile.py --config=configs/glscl_base.py --topology=v5e:16x16
  python launch/compile.py --config=configs/X.py:arg --topology=v6e:4x4 \
    --config.data.batch_size=512 --config.mesh.fsdp=4 [--output=FILE.json]

Memory, products, memory traffic and collectives of a chip, and a bound of step
time and MFU. Needs libtpu (`pip install -e '.[tpu-aot]'`) on any Linux machine,
no TPU and no data. Exit code 0: it fits. 2: `error: ...` says what to change.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

# Before jax is imported. Devices of this machine are not asked for, and neither
# are those of the cloud.
os.environ.update(
  {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # 2026-11: on the stacks it gives itself libtpu 0.0.42 ends with SIGSEGV in
    # its choice of windows (configs/cmal_base.py at 5 samples a chip).
    "LIBTPU_INIT_ARGS": " ".join(
      f"--{name}={2**23}"
      for name in (
        "default_thread_stack_size",
        "fibers_default_thread_stack_size",
        "xla_internal_thread_stack_size_bytes",
      )
    ),
    "TF_CPP_MIN_LOG_LEVEL": "2",
  }
  | os.environ
)

from absl import flags

from glscl_jax import atomic, command_line, errors
from glscl_jax import config as config_lib
from glscl_jax.train import ahead_of_time


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error, ConfigError: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_string(
    "topology",
    None,
    f"What to compile for: {ahead_of_time.EXAMPLES}.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output", "", "JSON file of the figures.", flag_values=values
  )
  flags.DEFINE_string(
    "program", "", "Text file of the compiled program.", flag_values=values
  )
  return command_line.parse_recipe(
    values, argv, doc=__doc__, required=["topology"]
  )


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  config = config_lib.from_config_dict(values.config)
  for name in ("output", "program"):
    if values[name].value:
      errors.check_file(
        pathlib.Path(values[name].value),
        option=f"--{name}={values[name].value}",
      )
  plan, text = ahead_of_time.compile_ahead(config, values.topology)
  print(ahead_of_time.format_plan(plan))
  if values.output:
    atomic.write_text(pathlib.Path(values.output), plan.to_json() + "\n")
  if values.program:
    atomic.write_text(pathlib.Path(values.program), text)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
