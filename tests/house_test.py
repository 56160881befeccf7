"""The rules of this codebase that no linter knows.

Each rule is a function from source text to a list of complaints, so that each
can be shown a planted fault; below them, every file is held to the rules.
"""

import ast
import inspect
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterator

import pytest

from ppnet import config

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_MAX_FILE_LINES = 600
_MAX_FUNCTION_LINES = 100

# The only places that compile. Everything else is a pure function that someone
# else may jit, shard or differentiate.
_MAY_JIT = (
  "ppnet/train/program.py",
  "ppnet/models/generate.py",  # Serves: its loop is its own program.
  "ppnet/audit/",
  "ppnet/bench/",
  "tests/",
)
_MAY_CONFIGURE_JAX = ("ppnet/main.py", "tests/conftest.py")

# Methods whose names and meanings come from Flax, Grain or Python's unittest.
_HOOKS = frozenset({"setup", "map", "random_map", "filter", "batch"})

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _imported_names(tree: ast.Module) -> dict[str, str]:
  """Returns local name → dotted name of everything that is imported."""
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.asname:
          names[alias.asname] = alias.name
        else:
          root = alias.name.split(".")[0]
          names[root] = root
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
  return names


def _dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """Yields (line, full dotted name) for each use of an imported thing."""
  names = _imported_names(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield node.lineno, f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    parts = []
    while isinstance(node, ast.Attribute):
      parts.append(node.attr)
      node = node.value
    if isinstance(node, ast.Name) and node.id in names:
      yield node.lineno, ".".join([names[node.id], *reversed(parts)])


def uses(source: str, *, banned: tuple[str, ...]) -> list[str]:
  """Lines that use a banned dotted name, under any alias."""
  found = {
    (line, prefix)
    for line, name in _dotted_names(ast.parse(source))
    for prefix in banned
    if name == prefix or name.startswith(f"{prefix}.")
  }
  return [f"line {line}: {prefix}" for line, prefix in sorted(found)]


def defaulted_keys(source: str) -> list[str]:
  """Parameters and dataclass fields named as a key that have a default."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, _Function | ast.Lambda):
      args = node.args
      positional = [*args.posonlyargs, *args.args]
      pairs = [
        *zip(reversed(positional), reversed(args.defaults), strict=False),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
      ]
      named = [(arg.arg, default) for arg, default in pairs]
    elif isinstance(node, ast.ClassDef):
      named = [
        (field.target.id, field.value)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
      ]
    else:
      continue
    found += [
      f"line {node.lineno}: {name}"
      for name, default in named
      if default is not None and (name == "key" or name.endswith("_key"))
    ]
  return found


def _docstring_lines(tree: ast.AST) -> int:
  """Returns the number of lines that docstrings take in `tree`."""
  total = 0
  for node in ast.walk(tree):
    if isinstance(node, _Documented) and ast.get_docstring(node) is not None:
      text = node.body[0]
      total += (text.end_lineno or text.lineno) - text.lineno + 1
  return total


def too_long(source: str) -> list[str]:
  """The file and the functions over their limits; docstrings do not count."""
  tree = ast.parse(source)
  found = []
  lines = len(source.splitlines()) - _docstring_lines(tree)
  if lines > _MAX_FILE_LINES:
    found.append(f"file: {lines} lines > {_MAX_FILE_LINES}")
  for node in ast.walk(tree):
    if isinstance(node, _Function):
      lines = (node.end_lineno or node.lineno) - node.lineno + 1
      lines -= _docstring_lines(node)
      if lines > _MAX_FUNCTION_LINES:
        found.append(f"{node.name}: {lines} lines > {_MAX_FUNCTION_LINES}")
  return found


def missing_docstrings(source: str) -> list[str]:
  """The module, public functions, classes and methods without a docstring."""
  tree = ast.parse(source)
  if not tree.body:
    return []  # An empty __init__.py has nothing to say.
  found = [] if ast.get_docstring(tree) else ["module"]

  def visit(body: list[ast.stmt], prefix: str, hooks: frozenset[str]) -> None:
    for node in body:
      if not isinstance(node, _Function | ast.ClassDef):
        continue
      if node.name.startswith("_") or node.name in hooks:
        continue
      if not ast.get_docstring(node):
        found.append(f"line {node.lineno}: {prefix}{node.name}")
      if isinstance(node, ast.ClassDef):
        visit(node.body, f"{node.name}.", _HOOKS)

  visit(tree.body, "", frozenset())
  return found


def unconditional_skips(source: str) -> list[str]:
  """Tests and files that are skipped whatever the machine."""
  tree = ast.parse(source)
  found = []
  for node in ast.walk(tree):
    # `unittest.skip` and absltest's cover decorators and self.skipTest.
    if isinstance(node, ast.Attribute):
      name = ast.unparse(node)
      if name in ("pytest.mark.skip", "unittest.skip", "absltest.skip"):
        found.append(f"line {node.lineno}: {name}")
    if (
      isinstance(node, ast.Call)
      and ast.unparse(node.func) in ("pytest.mark.skipif", "unittest.skipIf")
      and node.args
      and isinstance(node.args[0], ast.Constant)
    ):
      found.append(f"line {node.lineno}: skipif of a constant")
    # A bare skip in a body; inside an `if` it has a condition.
    if isinstance(node, ast.Module | _Function):
      for statement in node.body:
        if isinstance(statement, ast.Expr | ast.Raise) and re.match(
          r"(raise )?(pytest\.skip|self\.skipTest|unittest\.SkipTest)\b",
          ast.unparse(statement),
        ):
          found.append(f"line {statement.lineno}: {ast.unparse(statement)}")
  return found


def ignored_tests(source: str) -> list[str]:
  """Lines of a tool's settings or script that leave test files out."""
  return [
    f"line {number}: {line.strip()}"
    for number, line in enumerate(source.splitlines(), 1)
    if re.search(r"--ignore\b|--ignore-glob|--deselect|collect_ignore", line)
  ]


def _sources(folder: str) -> list[pathlib.Path]:
  return sorted((_ROOT / folder).rglob("*.py"))


def _is_under(path: pathlib.Path, allowed: tuple[str, ...]) -> bool:
  name = path.relative_to(_ROOT).as_posix()
  return any(
    name.startswith(entry) if entry.endswith("/") else name == entry
    for entry in allowed
  )


def _hold(rule: Callable[[str], list[str]], paths: list[pathlib.Path]) -> None:
  """Holds each file to `rule`; fails with all that it finds."""
  assert paths, "No file to check: the rule would hold for lack of code."
  found = []
  for path in paths:
    try:
      complaints = rule(path.read_text())
    except SyntaxError as error:
      complaints = [f"line {error.lineno}: {error.msg}"]
    found += [f"{path.relative_to(_ROOT)}: {text}" for text in complaints]
  assert not found, "\n" + "\n".join(found)


# The rules, applied.


def test_jit_is_used_only_where_allowed():
  paths = [
    path
    for path in _sources("ppnet") + _sources("configs")
    if not _is_under(path, _MAY_JIT)
  ]
  banned = ("jax.jit", "jax.pjit", "jax.experimental.pjit", "flax.linen.jit")
  _hold(lambda text: uses(text, banned=banned), paths)


def test_jax_is_configured_only_where_allowed():
  paths = [
    path
    for folder in ("ppnet", "configs", "tests")
    for path in _sources(folder)
    if not _is_under(path, _MAY_CONFIGURE_JAX)
  ]
  banned = ("jax.config.update",)
  _hold(lambda text: uses(text, banned=banned), paths)


def test_private_jax_is_not_used():
  paths = [
    path
    for folder in ("ppnet", "configs", "tests")
    for path in _sources(folder)
  ]
  banned = ("jax._src",)
  _hold(lambda text: uses(text, banned=banned), paths)


def test_no_key_has_a_default():
  _hold(defaulted_keys, _sources("ppnet"))


def test_files_and_functions_are_short():
  paths = _sources("ppnet") + _sources("configs") + _sources("tests")
  _hold(too_long, paths)


def test_everything_public_has_a_docstring():
  paths = _sources("ppnet") + _sources("configs")
  _hold(missing_docstrings, paths)


def test_no_test_is_skipped_unconditionally():
  _hold(unconditional_skips, _sources("tests"))


def test_no_test_file_is_ignored():
  paths = [
    _ROOT / "pyproject.toml",
    _ROOT / "tests" / "conftest.py",
    _ROOT / ".ci" / "run",
    *sorted((_ROOT / "launch").glob("*.sh")),
  ]
  _hold(ignored_tests, paths)


def test_no_room_is_called_utils():
  names = [path for path in (_ROOT / "ppnet").rglob("*") if "util" in path.stem]
  assert [path for path in names if path.suffix != ".pyc"] == []


@pytest.mark.parametrize(
  "path",
  _sources("configs"),  # None at all is an error of its own (pyproject.toml).
  ids=lambda path: path.relative_to(_ROOT).as_posix(),
)
def test_config_builds_and_validates(path):
  scope = {"__file__": str(path), "__name__": "config_under_test"}
  exec(compile(path.read_text(), str(path), "exec"), scope)  # As a flag does.
  built = scope["get_config"]()
  assert isinstance(built, config.ExperimentConfig)
  config.validate(built)
  assert inspect.getdoc(scope["get_config"]) or scope.get("__doc__")


# Each rule sees a fault planted for it, and leaves its neighbour alone.


@pytest.mark.parametrize(
  ("source", "count"),
  [
    ("import jax\nf = jax.jit(g)", 1),
    ("import jax as j\nf = j.jit(g)", 1),
    ("from jax import jit\nf = jit(g)", 2),
    ("import functools, jax\n@functools.partial(jax.jit)\ndef f(): pass", 1),
    ("import jax\nf = jax.jit(g).lower(x)", 1),
    ("import jax\nf = jax.jit_is_not_this", 0),
    ('"""Call `jax.jit` yourself."""', 0),
  ],
)
def test_uses_finds_jit(source, count):
  assert len(uses(source, banned=("jax.jit",))) == count


def test_uses_finds_private_jax():
  source = "from jax._src import core\nimport jax\njax._src.config.x = 1"
  assert len(uses(source, banned=("jax._src",))) == 2
  assert uses("import jax\njax.tree.map", banned=("jax._src",)) == []


@pytest.mark.parametrize(
  ("source", "count"),
  [
    ("def f(x, key=None): pass", 1),
    ("def f(x, *, noise_key=None): pass", 1),
    ("def f(key, x=0, /): pass", 0),
    ("def f(x=0, /, key=1): pass", 1),
    ("f = lambda key=0: key", 1),
    ("class A:\n  key: int = 0\n  other_key: int", 1),
    ("def f(*, key, keyed=3, monkey=1, keys=None): pass", 0),
  ],
)
def test_defaulted_keys_finds_defaults(source, count):
  assert len(defaulted_keys(source)) == count


def test_too_long_counts_code_and_not_docstrings():
  doc = '  """Long.\n' + "\n" * 300 + '  """\n'
  short = "def f():\n" + doc + "  x = 1\n" * 99
  assert too_long(short) == []
  assert too_long(short + "  x = 2\n") == ["f: 101 lines > 100"]
  assert too_long("x = 1\n" * 600) == []
  assert too_long("x = 1\n" * 601) == ["file: 601 lines > 600"]


def test_missing_docstrings_finds_each_kind():
  source = textwrap.dedent("""
    def f(): pass
    def _g(): pass
    class A:
      def run(self): pass
      def setup(self): pass
      def __call__(self): pass
    """)
  found = " ".join(missing_docstrings(source))
  assert [found.count(name) for name in ("module", "f", "A.run")] == [1, 1, 1]
  assert "setup" not in found
  assert "_g" not in found
  assert missing_docstrings("") == []


@pytest.mark.parametrize(
  "source",
  [
    "@pytest.mark.skip\ndef test_a(): pass",
    "@pytest.mark.skip(reason='later')\ndef test_a(): pass",
    "pytestmark = [pytest.mark.skip]",
    "@pytest.mark.skipif(True, reason='later')\ndef test_a(): pass",
    "def test_a():\n  pytest.skip('later')",
    "pytest.skip('later', allow_module_level=True)",
    "class T:\n  def test_a(self):\n    self.skipTest('later')",
    "def test_a():\n  raise unittest.SkipTest('later')",
  ],
)
def test_unconditional_skips_finds(source):
  assert len(unconditional_skips(source)) == 1


def test_unconditional_skips_allows_conditions():
  source = (
    "@pytest.mark.skipif(n < 2, reason='one device')\n"
    "def test_a():\n  if n < 2:\n    pytest.skip('one device')"
  )
  assert unconditional_skips(source) == []


def test_ignored_tests_finds_flags():
  assert len(ignored_tests("addopts = '--ignore=tests/slow'")) == 1
  assert ignored_tests("ignore = ['E731']  # ruff") == []
