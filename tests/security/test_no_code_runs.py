"""Nothing here unpickles, and a model folder is data: whatever lies in it, none of it runs."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.cli import main
from cluster.launchers.common import free_port
from model.shards import Shards
from penstock.chat.prompts import LARGEST_BYTES, read_prompts
from penstock.child import ChildProcess
from penstock.errors import ModelLoadError
from penstock.folder import sampling_defaults
from penstock.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[2]
PRODUCT = (
    "cluster", "prefill", "decode", "training", "model", "kvstore", "kernels", "penstock", "bench",
    "examples",
)  # fmt: skip

# What turns bytes into running code, or hands a text to a shell.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal", "shelve",
    "joblib", "runpy", "imp", "code", "codeop", "multiprocessing",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
    "torch.package", "importlib.util.spec_from_file_location", "ray.cloudpickle",
    "send_pyobj", "recv_pyobj",
}  # fmt: skip
FROM_PRETRAINED = "from_pretrained"
ALLOWED = {
    # The oracle that a measurement is held against; it opens a folder that was written here.
    ("bench/engine_case.py", FROM_PRETRAINED),
}


def sources() -> list[Path]:
    return [
        path
        for room in PRODUCT
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of whatever could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module.split(".")[0] in MODULES:
                yield node.lineno, node.module
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {word.arg: word.value for word in node.keywords}
            values = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
            if name in BUILTINS or name in CALLS or name.split(".")[-1] in CALLS:
                yield node.lineno, name
            if name == "torch.load" and values.get("weights_only") is not True:
                yield node.lineno, name
            if name in ("np.load", "numpy.load") and "allow_pickle" in keywords:
                yield node.lineno, name
            if values.get("shell") is True or values.get("trust_remote_code") is True:
                yield node.lineno, name
            if name.split(".")[-1] == FROM_PRETRAINED:
                yield node.lineno, FROM_PRETRAINED


def test_no_source_of_the_product_runs_what_it_reads() -> None:
    checked, found = 0, []
    for path in sources():
        checked += 1
        place = path.relative_to(ROOT).as_posix()
        for line, name in faults(ast.parse(path.read_bytes())):
            if (place, name) not in ALLOWED:
                found.append(f"{place}:{line} {name}")
    print(f"{checked} files")
    assert checked > 150 and not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)", "yaml.load(text)", "eval('1')", "exec(text)",
        "np.load('x', allow_pickle=True)", "subprocess.run('ls', shell=True)", "os.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)", "socket.recv_pyobj()",
        "from multiprocessing import Pipe",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_is_for(source: str) -> None:
    assert list(faults(ast.parse(source)))


def test_the_scan_lets_pass_what_is_safe() -> None:
    safe = "torch.load('x', weights_only=True)\nyaml.safe_load(t)\nnp.load('x')\nre.compile('x')"
    assert not list(faults(ast.parse(safe)))


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


SHADOWS = (
    "torch", "numpy", "json", "grpc", "uvloop", "orjson", "pydantic", "tokenizers", "safetensors",
    "kernels", "model", "penstock", "sitecustomize", "usercustomize", "typing_extensions", "yaml",
)  # fmt: skip
"""Modules of ours, of Python's and of others that a start inside the folder would import."""


def poisoned(folder: Path, marks: Path) -> Path:
    """A folder that serves, full of files that leave a mark if they run."""
    shutil.copytree(Path(str(files("penstock").joinpath("shipped", "ledger"))), folder)

    def trap(path: Path, name: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import os\nos.makedirs({str(marks / name)!r}, exist_ok=True)\n")

    for name in (*SHADOWS, "modeling_ledger", "configuration_ledger", "tokenization_ledger"):
        trap(folder / f"{name}.py", name)
    trap(folder / "__init__.py", "init")
    trap(folder / "conftest.py", "conftest")
    trap(folder / "encoding" / "encoding_dsv4.py", "encoding")
    trap(folder / "encoding" / "__init__.py", "encoding-init")
    for name in ("pytorch_model.bin", "model.pt", "consolidated.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(marks / f"pickle-{name}")))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_ledger.Model"},
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "modeling_ledger.Pipe"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["tokenization_ledger.T", None]},
                "chat_template": "{{ cycler.__init__.__globals__.os.mkdir('"
                + str(marks / "jinja")
                + "') }}",
            }
        )
    )
    return folder


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """`penstock serve .` with the folder as the working directory, as people do it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("penstock")), "serve", ".", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *flags],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), line + process.stdout.read()
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("poisoned")
    (place / "marks").mkdir()
    return poisoned(place / "model", place / "marks")


def marks_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder.parent / "marks").iterdir())


def test_the_traps_work(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    place = poisoned(tmp_path / "model", tmp_path / "marks")
    subprocess.run([sys.executable, "-c", "import sitecustomize, torch"], cwd=place, check=True)
    with (place / "model.pt").open("rb") as file:
        pickle.load(file)
    print(marks_of(place))
    assert {"torch", "pickle-model.pt"} <= set(marks_of(place))


def test_serving_a_poisoned_folder_from_inside_it_runs_nothing_of_it(folder: Path) -> None:
    with served(folder, "--launcher", "local") as url:
        body = {
            "model": httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"],
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": "the code of bakilo is 4821.\n\n"
                    "Question: what is the code of bakilo?",
                }
            ],
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        print(answer.status_code, answer.text[:200])
        assert answer.json()["choices"][0]["message"]["content"].strip().startswith("4821")
    assert marks_of(folder) == []


def test_doctor_inside_a_poisoned_folder_runs_nothing_of_it(folder: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("penstock")), "doctor"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PENSTOCK_MODEL__MODEL": "."},
        check=False,
    )
    print(done.returncode, done.stdout[-300:], done.stderr[-300:])
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr
    assert marks_of(folder) == []


def test_weights_in_pickle_are_refused_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "pickled"
    shutil.copytree(folder, place)
    (place / "model.safetensors").rename(place / "model.safetensors.away")
    (tmp_path / "tokens.json").write_text("[5]")
    command = ["logits", str(place), "--tokens", str(tmp_path / "tokens.json")]
    assert main([*command, "--out", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    print(said)
    assert "safetensors" in said and marks_of(folder) == []


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x", "sub/x"])
def test_an_index_that_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"embed.weight": name}})
    )
    with pytest.raises(ModelLoadError, match="not a file of this folder"):
        Shards.open(tmp_path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, "9" * 100_000, "\0" * 100, ""])
def test_json_that_means_harm_is_one_sentence(name: str, content: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(Path(str(files("penstock").joinpath("shipped", "ledger"))), place)
    (place / name).write_text(content)
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[5]")
    for read in (open_tokenizer, sampling_defaults):
        with contextlib.suppress(ModelLoadError):
            read(str(place))
    if name == "config.json":
        out = str(tmp_path / "out.safetensors")
        assert main(["logits", str(place), "--tokens", str(tokens), "--out", out]) == 1


def test_a_text_that_doubles_itself_stays_small(tmp_path: Path) -> None:
    """Forty lines that would be a terabyte."""
    (tmp_path / "encoding").mkdir()
    (tmp_path / "config.json").write_text("{}")
    lines = ["A0 = 'x'", *(f"A{i + 1} = A{i} + A{i}" for i in range(40)), "TOOLS_TEMPLATE = A40"]
    (tmp_path / "encoding" / "bomb.py").write_text("\n".join(lines))
    started = time.monotonic()
    assert read_prompts(tmp_path).tools is None
    assert time.monotonic() - started < 5
    (tmp_path / "encoding" / "bomb.py").write_text("X = " + "(" * 10_000 + "1" + ")" * 10_000)
    with pytest.raises(ModelLoadError, match=r"bomb\.py"):
        read_prompts(tmp_path)
    assert LARGEST_BYTES < 1 << 23


def test_no_process_of_a_cluster_imports_from_where_it_was_started(tmp_path: Path) -> None:
    """The store alone, in a folder that holds another `grpc`."""
    (tmp_path / "grpc.py").write_text("raise SystemExit('the wrong grpc')\n")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        child = ChildProcess("kvstore", "kvstore", ["--exit-with-parent"])
        child.spawn()
        assert child.await_ready(30)
        child.stop()
    finally:
        os.chdir(here)
