"""Every production configuration compiles for Hopper without a GPU: nothing spilled, tensor cores
where expected and not serialised, shared memory within the limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels.device import ReferenceDeviceOps
from kernels.triton.compile import COLUMNS, MODULES, Finding, cases, markdown
from kernels.triton.launch import Launch, recording
from kernels.triton.ops import TritonDeviceOps


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a process that interprets kernels cannot compile them."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.triton.compile", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def public(ops: type[ReferenceDeviceOps]) -> set[str]:
    return {name for name in vars(ops) if not name.startswith("_")}


def test_every_op_has_both_implementations() -> None:
    assert public(TritonDeviceOps) == public(ReferenceDeviceOps)


def test_every_kernel_is_in_a_production_configuration() -> None:
    launched: list[Launch] = []
    with recording() as launches:
        for case in cases():
            case.call()
        launched += launches
    seen = {each.kernel.__name__ for each in launched}
    known = set()
    for name in MODULES:
        module = sys.modules[f"kernels.triton.{name}"]
        for symbol, value in vars(module).items():
            kernel = getattr(value, "fn", None)
            if symbol.startswith("_") and getattr(kernel, "__module__", "") == module.__name__:
                known.add(symbol)
    assert known
    assert known == seen


@pytest.mark.timeout(600)
def test_production_configurations_compile_for_hopper() -> None:
    done = run("--json")
    findings = [Finding(**json.loads(line)) for line in done.stdout.splitlines()]
    faults = [f"{each.case} {each.kernel}: {each.faults}" for each in findings if each.faults]
    assert done.returncode == 0, (done.stderr, faults)
    assert {each.case for each in findings} == {case.name for case in cases()}
    head, rule, *lines = markdown(findings).splitlines()
    assert head.count("|") == rule.count("|") == len(COLUMNS) + 2
    assert {line.split("|")[2].strip(" `") for line in lines} == {
        each.kernel.lstrip("_") for each in findings
    }


_ONE_BINARY = """
import torch
from kernels.triton import linear, mhc_fused, norm_rope
from kernels.triton.compile import _source
from kernels.triton.launch import meta, recording

def f32(*shape):
    return meta(*shape, dtype=torch.float32)

found = set()
for rows in (1, 5, 16, 70):
    with recording() as launches:
        linear.linear(meta(rows, 1, 1024), meta(1, 512, 1024), dtype=torch.float32)
        norm_rope.norm_rope(
            meta(rows, 64, 512), None, f32(rows, 32), f32(rows, 32), eps=1e-6, dtype=torch.float16
        )
        mhc_fused.mhc_pre(
            meta(rows, 4, 4096), f32(24, 16384), f32(3), f32(24), iters=20, eps=1e-6, norm_eps=1e-6
        )
    found.add(tuple(_source(each).hash() for each in launches))
assert len(found) == 1, found
"""


def test_one_row_and_many_run_the_same_binary() -> None:
    """Triton would compile another one for counts of 1 and of multiples of 16."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _ONE_BINARY]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_interprets_says_so() -> None:
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "kernels.triton.compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 2
    assert "unset it" in done.stdout
