import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from glscl_jax import config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "glscl_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [
  *MODULES,
  *sorted((ROOT / "configs").glob("*.py")),
  *sorted((ROOT / "launch").glob("*.py")),
]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = [
  *CODE,
  *SCRIPTS,
  *PAGES,
  *sorted((ROOT / "tests").rglob("*.py")),
  ROOT / "setup.py",
  ROOT / "pyproject.toml",
  ROOT / ".gitignore",
  ROOT / ".pre-commit-config.yaml",
  ROOT / ".github" / "workflows" / "ci.yml",
]

# A folder may import the folders of the rows below its own and its own row.
LAYERS = [
  {"launch", "configs"},
  {"command_line"},
  {"ablations", "train", "tasks", "export"},
  {"systems", "data", "sharding"},
  {"objectives", "models"},
  {"config", "types", "draws"},
  {"atomic", "errors", "huge_pages", "processes", "roll_call"},
]
LEVEL = {name: -row for row, names in enumerate(LAYERS) for name in names}
PURE = {"objectives"}  # functions of arrays: may import TYPES alone
TYPES = {"types", "draws"}
ALONE = {"config", *TYPES}  # besides the lowest row
# Who may import a library; the rest of the package must do without.
HOMES = {
  "flax": ("glscl_jax/models/",),
  "tensorflow": (),
  "torch": ("glscl_jax/train/torch_baseline.py",),
  "ml_collections": (
    "glscl_jax/config.py",
    "glscl_jax/command_line.py",
  ),
  "jax in data": ("glscl_jax/data/pipeline.py",),  # makes global arrays
}


def name_of(path):
  return str(path.relative_to(ROOT))


def folder_of(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return parts[1] if parts[0] == "glscl_jax" else parts[0]


def imports_of(source):
  """Dotted names of everything a file imports, at any depth."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(folder, source):
  """Imports of `source`, a file of `folder`, that break the layering."""
  for name in imports_of(source):
    package, _, rest = name.partition(".")
    target = rest.split(".")[0]
    if package != "glscl_jax" or target not in LEVEL or target == folder:
      continue
    if (
      LEVEL[target] > LEVEL[folder]
      or (folder in ALONE and LEVEL[target] == LEVEL[folder])
      or (folder in PURE and target not in TYPES)
    ):
      yield name


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_imports_go_down_the_layers(path):
  if path == PACKAGE / "__init__.py":
    assert not list(imports_of(path.read_text()))
    return
  assert folder_of(path) in LEVEL, f"which layer is {path} of?"
  assert not list(forbidden_imports(folder_of(path), path.read_text()))


@pytest.mark.parametrize(
  ("folder", "source", "forbidden"),
  [
    ("models", "from glscl_jax.systems import glscl", True),
    ("models", "from glscl_jax import sharding", True),
    ("models", "from glscl_jax import config, types", False),
    ("objectives", "from glscl_jax import config", True),
    ("objectives", "def f():\n  import glscl_jax.models.layers", True),
    ("objectives", "from glscl_jax import draws, types", False),
    ("config", "from glscl_jax import types", True),
    ("config", "from glscl_jax import errors", False),
    ("train", "from glscl_jax.tasks import retrieval", False),
    ("data", "from glscl_jax.train import step", True),
  ],
)
def test_the_layering_test_sees_a_breach(folder, source, forbidden):
  assert bool(list(forbidden_imports(folder, source))) == forbidden


def test_folders_of_one_layer_do_not_import_each_other_in_a_circle():
  edges = set()
  for path in MODULES:
    folder = folder_of(path)
    for name in imports_of(path.read_text()):
      target = (name.split(".") + [""])[1]
      if name.startswith("glscl_jax") and LEVEL.get(target) == LEVEL.get(
        folder
      ):
        edges.add((folder, target))
  circles = [(a, b) for a, b in edges if a != b and (b, a) in edges]
  assert not circles


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_libraries_stay_where_they_belong(path):
  for name in imports_of(path.read_text()):
    library = name.split(".")[0]
    if library == "jax" and folder_of(path) == "data":
      library = "jax in data"
    homes = HOMES.get(library, ("",))
    assert name_of(path).startswith(homes), f"{name} in {path}"


def ruff(*arguments, source=None):
  return subprocess.run(
    [sys.executable, "-m", "ruff", *arguments],
    cwd=ROOT,
    input=source,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
  """Formatting, import order, likely bugs, and missing docstrings."""
  run = ruff(*command, ".")
  assert run.returncode == 0, run.stdout + run.stderr


def test_ruff_sees_a_missing_docstring():
  source = '"""Module."""\n\n\ndef f():\n  pass\n'
  run = ruff("check", "--stdin-filename=glscl_jax/x.py", "-", source=source)
  assert "D103" in run.stdout


def lookups_with_defaults(source):
  """Calls like config.train.get("seed", 0), where a typo is a default."""
  for node in ast.walk(ast.parse(source)):
    if (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Attribute)
      and node.func.attr == "get"
      and re.search(r"\bconfig\b", ast.unparse(node.func.value))
    ):
      yield ast.unparse(node)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_config_values_have_no_second_default(path):
  assert not list(lookups_with_defaults(path.read_text()))


def test_the_lookup_test_sees_a_second_default():
  assert list(lookups_with_defaults("a = config.train.get('seed', 0)"))
  assert not list(lookups_with_defaults("a = table.get('seed', 0)"))


@pytest.mark.parametrize("path", TEXT, ids=name_of)
def test_text_is_plain(path):
  text = path.read_text()
  assert text.isascii(), [
    line for line in text.split("\n") if not line.isascii()
  ]
  assert text == "" or text.endswith("\n")
  assert not re.search(r"[ \t]+$", text, re.MULTILINE)


@pytest.mark.parametrize("path", CODE + SCRIPTS, ids=name_of)
def test_nothing_is_left_for_later(path):
  words = ["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]
  assert not [word for word in words if word in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_file_names_say_something(path):
  vague = {"utils", "util", "helper", "helpers", "common", "misc", "lib"}
  assert not vague & set(path.stem.split("_"))


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shell_scripts_parse_and_stop_at_errors(path):
  subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
  assert "set -euo pipefail" in path.read_text()


# Commands in the pages for readers.


def commands_in(page):
  """Each command line of the fenced bash blocks, continuations joined."""
  for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", page, re.DOTALL):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
      if words:
        yield words


def flags_of(script):
  text = script.read_text()
  if "processes.define_flags(" in text:
    text += (PACKAGE / "processes.py").read_text()
  return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)) | {
    name.lstrip("-") for name in re.findall(r'add_argument\(\s*"(--\w+)"', text)
  }


def problems_of(words):
  """What a reader who types this command would stumble over."""
  script = next((w for w in words if w.endswith((".py", ".sh"))), None)
  if script is None or script.startswith("-"):
    return
  path = ROOT / script
  if not path.exists():
    yield f"no {script}"
    return
  known = flags_of(path) if script.endswith(".py") else None
  for word in words[words.index(script) + 1 :]:
    flag, _, value = word.partition("=")
    if known is None or not flag.startswith("--"):
      continue
    if flag == "--config":
      if not (ROOT / value.split(":")[0]).exists():
        yield f"no recipe {value}"
    elif flag.startswith("--config."):
      place = config.Config()
      for name in flag.split(".")[1:]:
        if not hasattr(place, name):
          yield f"no value {flag}"
          break
        place = getattr(place, name)
    elif flag.removeprefix("--").removeprefix("no") not in known and (
      flag.removeprefix("--") not in known
    ):
      yield f"{script} has no {flag}"


PAGE_COMMANDS = [
  (page, words)
  for page in PAGES
  if page.name != "CHANGELOG.md"
  for words in commands_in(page.read_text())
]


@pytest.mark.parametrize(
  ("page", "words"),
  PAGE_COMMANDS,
  ids=[f"{page.name}: {' '.join(words)}" for page, words in PAGE_COMMANDS],
)
def test_commands_in_the_pages_exist(page, words):
  assert not list(problems_of(words))


def test_the_readme_shows_the_two_commands():
  commands = [
    " ".join(words) for page, words in PAGE_COMMANDS if page.name == "README.md"
  ]
  assert "bash launch/quickstart.sh" in commands
  assert "bash launch/test.sh" in commands


def test_the_command_test_sees_mistakes():
  page = "```bash\npython launch/prepare.py --sorce=emoji\n```"
  (words,) = commands_in(page)
  assert list(problems_of(words)) == ["launch/prepare.py has no --sorce"]
  assert list(problems_of(["bash", "launch/nothing.sh"]))
  assert not list(problems_of(["bash", "launch/test.sh"]))
