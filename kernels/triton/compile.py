"""Compile every production configuration without a GPU and read what ptxas made of it.

    python -m kernels.triton.compile            # sm_90a, one line per kernel, exit 1 on a fault
    python -m kernels.triton.compile --table    # the same as Markdown, for docs/kernels.md
    python -m kernels.triton.compile --arch 80  # another target: 80, 90 (default) or 100

It tells registers, spilled bytes, shared memory, occupancy and the instructions used, and whether
ptxas had to serialise tensor-core instructions. It cannot tell time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton.launch import Case, Launch, recording

MODULES = (
    "quantize_kv",
    "hadamard",
    "mxfp4",
    "norm_rope",
    "linear",
    "compress",
    "mhc_fused",
    "moe_grouped",
    "moe_route",
    "sample",
    "combine",
    "sparse_attention",
    "entry_masses",
    "dense_attention",
    "decode_attention",
    "indexer_logits",
    "topk_blocks",
)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor has (CUDA programming guide, compute capabilities)."""

    registers: int
    shared_bytes: int
    shared_bytes_per_cta: int
    threads: int


LIMITS = {
    80: Limits(65536, 164 * 1024, 163 * 1024, 2048),
    90: Limits(65536, 228 * 1024, 227 * 1024, 2048),
    100: Limits(65536, 228 * 1024, 227 * 1024, 2048),
}


@dataclass(frozen=True)
class Finding:
    """One compiled kernel. `wgmma` counts m64 instructions, `mma` mma.sync, `tcgen05` Blackwell's;
    `copies` asynchronous global-to-shared copies (cp.async and TMA). `faults` is empty if it may
    ship on this target.
    """

    case: str
    kernel: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    wgmma: int
    mma: int
    tcgen05: int
    copies: int
    serialised: bool
    faults: tuple[str, ...] = ()


def cases() -> Iterator[Case]:
    for name in MODULES:
        yield from importlib.import_module(f"kernels.triton.{name}").CASES


def examine(case: Case, arch: int) -> list[Finding]:
    """Compile each distinct kernel launch of `case`. Raises what Triton raises if it cannot."""
    with recording() as launches:
        case.call()
    seen: dict[str, Finding] = {}
    for each in launches:
        source = _source(each)
        finding = _cached(each, source, arch)
        fault = tuple(_faults(finding, case.tensor_cores.get(finding.kernel, ""), arch))
        seen[source.hash()] = replace(finding, case=case.name, faults=fault)
    return list(seen.values())


def _source(each: Launch) -> ASTSource:
    names = each.kernel.arg_names
    signature: dict[str, str] = {}
    consts = dict(each.consts)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    runtime = iter(each.args)
    plain = {param.name for param in each.kernel.params if param.do_not_specialize}
    for position, name in enumerate(names):
        if name in each.consts:
            signature[name] = "constexpr"
            continue
        value = next(runtime)
        # The JIT does the same at run time: None and 1 become constants, multiples of 16 are told.
        special = name not in plain
        if value is None or (special and isinstance(value, int) and value == 1):
            signature[name], consts[name] = "constexpr", value
            continue
        signature[name], aligned = _type(value)
        if aligned and special:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=each.kernel, signature=signature, constexprs=consts, attrs=attrs)


def _type(value: object) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it is known to be a multiple of 16."""
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>", False
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype], True
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"a kernel argument of type {type(value).__name__} cannot be compiled offline")


def _cached(each: Launch, source: ASTSource, arch: int) -> Finding:
    """ptxas takes a second a kernel: findings are kept under the user's cache folder."""
    options = f"{arch}-{each.num_warps}-{each.num_stages}-{triton.__version__}"
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    key = hashlib.sha256(f"{source.hash()}-{options}-2".encode()).hexdigest()[:32]
    path = home / "penstock" / "kernels" / f"{key}.json"
    if path.exists():
        return Finding(**json.loads(path.read_text(encoding="utf-8")))
    finding = _compile(each, source, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(finding)), encoding="utf-8")
    scratch.replace(path)
    return finding


def _compile(each: Launch, source: ASTSource, arch: int) -> Finding:
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": each.num_warps, "num_stages": each.num_stages},
    )
    ptx = str(compiled.asm["ptx"])
    log = _assemble(ptx, arch)
    registers = int(_first(r"Used (\d+) registers", log))
    spilled = int(_first(r"(\d+) bytes spill stores", log))
    shared = int(compiled.metadata.shared)
    # A warp-specialised kernel starts more warps than asked for; its PTX says how many threads.
    threads = int(_first(r"\.reqntid (\d+)", ptx) or each.num_warps * 32)
    limits = LIMITS[arch]
    return Finding(
        case="",
        kernel=each.kernel.__name__,
        warps=threads // 32,
        stages=each.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        ctas_per_sm=min(
            limits.registers // (max(registers, 16) * threads),
            limits.shared_bytes // (shared + 1024),
            limits.threads // threads,
        ),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", ptx)),
        serialised=bool(re.search(r"C75(1[0-5])|serializ", log)),
    )


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else "0"


def _assemble(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        target = _first(r"\.target\s+(sm_\w+)", ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas refused a kernel for {target}: {done.stderr.strip()[:300]}")
    return done.stderr


def _faults(found: Finding, tensor_cores: str, arch: int) -> Iterator[str]:
    if found.spilled_bytes:
        yield f"{found.spilled_bytes} B spilled"
    if found.serialised:
        yield "tensor-core instructions serialised"
    if found.shared_bytes > LIMITS[arch].shared_bytes_per_cta:
        yield f"shared memory over {LIMITS[arch].shared_bytes_per_cta} B"
    if not tensor_cores:
        return
    if arch == 90 and tensor_cores == "wgmma" and not found.wgmma:
        yield "no wgmma"
    if not found.wgmma + found.mma + found.tcgen05:
        yield "no tensor-core instruction"


COLUMNS = (
    "case",
    "kernel",
    "warps",
    "stages",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "ctas_per_sm",
    "wgmma",
    "mma",
    "tcgen05",
    "copies",
)


def markdown(findings: Iterable[Finding]) -> str:
    """The table of docs/kernels.md: of a kernel's variants within one case, the fullest."""
    heads = ("case", "kernel", "warps", "stages", "regs", "spill B", "smem B", "CTA/SM")
    lines = ["| " + " | ".join((*heads, *COLUMNS[8:], "faults")) + " |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 1))
    fullest: dict[tuple[str, str], Finding] = {}
    for each in findings:
        known = fullest.get((each.case, each.kernel))
        if known is None or (each.spilled_bytes, each.registers) > (
            known.spilled_bytes,
            known.registers,
        ):
            fullest[each.case, each.kernel] = each
    told: set[tuple[str, ...]] = set()
    for each in fullest.values():
        cells = [str(getattr(each, name)) for name in COLUMNS]
        cells[1] = f"`{cells[1].lstrip('_')}`"
        # The same kernel in a further case says nothing new.
        if tuple(cells[1:]) not in told:
            told.add(tuple(cells[1:]))
            lines.append("| " + " | ".join((*cells, "; ".join(each.faults) or "-")) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.triton.compile", description=__doc__)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(LIMITS))
    parser.add_argument("--table", action="store_true", help="print Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON object per kernel")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
        return 2
    findings: list[Finding] = []
    failed = 0
    for case in cases():
        if args.only not in case.name:
            continue
        try:
            found = examine(case, args.arch)
        except Exception as error:  # a sweep reports a failure and goes on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"{case.name}: does not compile: {lines[-1][:200]}", file=sys.stderr)
            failed += 1
            continue
        findings += found
        for each in found if not args.table else ():
            if args.json:
                print(json.dumps(asdict(each)), flush=True)
            else:
                cells = (f"{name}={getattr(each, name)}" for name in COLUMNS[2:])
                fault = f"  FAULT: {'; '.join(each.faults)}" if each.faults else ""
                print(f"{each.case}: {each.kernel} {' '.join(cells)}{fault}", flush=True)
    if args.table:
        print(markdown(findings))
    return 1 if failed or any(each.faults for each in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
