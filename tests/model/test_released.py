"""Checkpoints in the release's own format, from `examples/tiny_checkpoint.py`: loaded strictly and
only as far as a rank holds them, and the same function as their plain copies.

Longer than our files should be: its cases share checkpoints that take seconds to write.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.tiny_checkpoint import write_checkpoint
from model import load
from model.config import ModelConfig
from model.convert import convert
from model.engine import Segment
from model.grid import Grid
from model.load import load_engine
from model.plan import free_host_bytes, weight_bytes, work_bytes
from model.tensors import Kind
from model.torch_engine import TorchEngine
from model.weights import load_weights, open_checkpoint, read_weights
from penstock.errors import ModelLoadError

Tensors = dict[str, torch.Tensor]
TOKENS = [(7 * i * i + 3 * i) % 320 for i in range(290)]
OFF: dict[str, Any] = {"kv_cache_dtype": "fp32", "dtype": "float32"}
KINDS: dict[str, dict[str, Any]] = {
    "flash": {"like": "flash", "draft": "mtp"},
    "pro": {"like": "pro", "draft": "dspark"},
    "base": {"like": "flash", "base": True},
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`released(kind)` and `released(kind, plain=True)`: written once."""
    root = tmp_path_factory.mktemp("released")

    def get(kind: str, *, plain: bool = False) -> Path:
        folder = root / f"{kind}-{plain}"
        if not folder.exists():
            write_checkpoint(folder, plain=plain, **KINDS[kind])
        return folder

    return get


@pytest.fixture
def folder(released: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(released("flash"), tmp_path / "model"))


def logits(engine: TorchEngine, *, chunk: int = 512) -> torch.Tensor:
    """[T, V] of `TOKENS`."""
    sequence = engine.open(len(TOKENS))
    rows = []
    for at in range(0, len(TOKENS), chunk):
        (result,) = engine.forward([Segment(sequence, TOKENS[at : at + chunk], all_logits=True)])
        assert result.logits is not None
        rows += [result.logits.row(i) for i in range(len(result.logits))]
    engine.release(sequence)
    return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_checkpoint_is_bitwise_its_plain_copy_without_rounding(
    kind: str, released: Callable[..., Path]
) -> None:
    quantised = load_engine(released(kind), **OFF)
    plain = load_engine(released(kind, plain=True), **OFF)
    got, wanted = logits(quantised), logits(plain)
    print(f"{kind}: logits of std {wanted.std():.2f}, {quantised.info.description}")
    assert torch.equal(got, wanted)
    assert quantised.info.fingerprint != plain.info.fingerprint


def test_logits_of_a_released_checkpoint_through_the_command_line(
    released: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text(json.dumps(TOKENS))
    command = [
        *(sys.executable, "-m", "cluster.cli", "logits", str(released("flash"))),
        *("--tokens", str(tmp_path / "tokens.json"), "--out", str(tmp_path / "out.safetensors")),
        *("--prefill-tokens", "280", "--chunk-tokens", "100"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "out.safetensors")["logits"]
    engine = load_engine(released("flash"))
    assert "bfloat16" in engine.info.description
    assert torch.equal(got, logits(engine))


POINTS = ("none", "activations", "index", "index,scores", "auto")


@pytest.mark.parametrize(("dtype", "points"), [("bfloat16", POINTS), ("float32", POINTS[::4])])
def test_every_rounding_point_matters_alone_and_keeps_chunks_exact(
    dtype: str, points: tuple[str, ...], released: Callable[..., Path]
) -> None:
    seen: dict[str, torch.Tensor] = {}
    prints = set()
    for rounding in points:
        engine = load_engine(released("flash"), dtype=dtype, rounding=rounding)
        seen[rounding] = logits(engine)
        assert torch.equal(seen[rounding], logits(engine, chunk=37)), rounding
        prints.add(engine.info.fingerprint)
    off = seen["none"]
    for rounding, got in seen.items():
        change = (got - off).abs()
        print(f"{dtype} {rounding}: mean {change.mean():.3f}, worst {change.max():.2f}")
        assert (rounding == "none") == torch.equal(got, off)
        assert change.mean() < 0.5 * off.std()
    assert len(prints) == len(points)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "index,index_scores"}, "'index_scores' is none of"),
        ({"rounding": "scores"}, "goes with rounding 'index'"),
        ({"rounding": "index", "kv_cache_dtype": "fp32"}, "needs a rounded cache"),
    ],
)
def test_impossible_rounding_is_refused(
    options: dict[str, str], words: str, released: Callable[..., Path]
) -> None:
    with pytest.raises(ModelLoadError, match=words):
        load_engine(released("flash"), **options)
    with pytest.raises(ModelLoadError, match="this checkpoint has none"):
        load_engine(released("flash", plain=True), rounding="activations")


GRIDS = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)]


@pytest.mark.parametrize("kind", ["flash", "pro", "base"])
def test_ranks_read_their_parts_only_and_agree_on_the_digest(
    kind: str, released: Callable[..., Path]
) -> None:
    path = released(kind)
    config = ModelConfig.load(path)
    whole = load_weights(path, config, drafts=True)
    table = open_checkpoint(path, config).table
    for tp, ep, cp in GRIDS:
        if kind != "pro" and tp * ep > 2:
            continue
        for plane in range(cp):
            shares, read = [], []
            for rank in range(tp * ep):
                grid = Grid(tp, ep, cp, plane * tp * ep + rank)
                mine = load_weights(path, config, grid=grid, drafts=True)
                shares.append(mine.share)
                read.append(mine.bytes_read)
                for name, weight in table.items():
                    part = weight.slices(grid)
                    if part is None:
                        assert name not in mine.tensors
                    else:
                        assert torch.equal(mine.tensors[name], whole.tensors[name][part]), name
            assert mine.digest_of(shares) == whole.digest
            print(f"{kind} tp{tp} ep{ep} cp{cp}: read {read} of {whole.bytes_read} bytes")
            assert all(size < whole.bytes_read for size in read) or tp * ep == 1


def test_the_digest_sees_any_changed_byte(folder: Path) -> None:
    config = ModelConfig.load(folder)
    digests = {load_weights(folder, config).digest}
    for name, byte in (
        ("embed.weight", 12345),
        ("layers.1.ffn.experts.3.w2.weight", 77),
        ("layers.1.ffn.experts.3.w2.scale", 9),
        ("layers.2.attn.wo_b.scale", 0),
        ("norm.weight", 2),
    ):
        entry = open_checkpoint(folder, config).shards.entries[name]
        with entry.path.open("r+b") as file:
            file.seek(entry.at + byte)
            old = file.read(1)[0]
            file.seek(entry.at + byte)
            file.write(bytes([old ^ 1]))
        digests.add(load_weights(folder, config).digest)
    assert len(digests) == 6
    drafted = load_weights(folder, config, drafts=True).digest
    assert drafted not in digests


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit all tensors; they are written back as one file."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


WO_A = "layers.0.attn.wo_a"
EXPERT = "layers.3.ffn.experts.5.w1"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{WO_A}.scale"), f"{WO_A}.scale is missing"),
        (lambda t: t.pop(f"{EXPERT}.scale"), f"{EXPERT}.scale is missing"),
        (
            lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"][:, :4].contiguous()}),
            f"{EXPERT}.scale is [256, 4], not [256, 8]",
        ),
        (
            lambda t: t.update({f"{WO_A}.scale": t[f"{WO_A}.scale"].float()}),
            f"{WO_A}.scale is F32, not F8_E8M0",
        ),
        (
            lambda t: t.update({f"{WO_A}.weight": t[f"{WO_A}.weight"].float()}),
            f"{WO_A}.weight is F32, not F8_E4M3",
        ),
        (
            lambda t: t.update({"norm.scale": torch.zeros(1)}),
            "norm.scale is unexpected because norm.weight is not stored as FP8 or FP4",
        ),
        (lambda t: t.pop("mtp.0.hnorm.weight"), "mtp.0.hnorm.weight is missing"),
        (
            lambda t: t.update({"mtp.1.norm.weight": torch.zeros(4)}),
            "mtp.1.norm.weight is unexpected",
        ),
        (
            lambda t: bytes_of(t[f"{WO_A}.weight"]).view(-1)[99:100].fill_(0x7F),
            f"{WO_A}.weight has values that are not finite",
        ),
        (
            lambda t: bytes_of(t[f"{EXPERT}.scale"]).view(-1)[99:100].fill_(255),
            f"{EXPERT}.weight has a scale that is NaN",
        ),
        (
            lambda t: t["norm.weight"][3:4].fill_(float("inf")),
            "norm.weight has values that are not finite",
        ),
        (
            lambda t: t["layers.2.attn.attn_sink"][:1].fill_(float("nan")),
            "layers.2.attn.attn_sink has values that are not finite",
        ),
    ],
)
def test_a_faulty_checkpoint_is_refused_by_the_tensors_name(
    edit: Callable[[Tensors], object], words: str, folder: Path
) -> None:
    change(folder, edit)
    with pytest.raises(ModelLoadError) as caught:
        load_engine(folder)
    print(caught.value.message)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_without_its_draft_module_serves_without_drafts(folder: Path) -> None:
    def strip(t: Tensors) -> None:
        for name in [name for name in t if name.startswith("mtp.")]:
            del t[name]

    before = load_engine(folder).info
    change(folder, strip)
    assert load_engine(folder, draft_tokens="auto").info == before
    with pytest.raises(ModelLoadError, match="holds no draft module"):
        load_engine(folder, draft_tokens=1)


def test_files_that_are_not_whole_are_refused(folder: Path) -> None:
    second = sorted(folder.glob("*.safetensors"))[1]
    data = second.read_bytes()
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for content, words in (
        (data[:-1], "the file at"),
        (data[:6], "its header"),
        (b"\xff" * 8 + data[8:], "its header"),
        (data + b"x", "the file at"),
    ):
        second.write_bytes(content)
        with pytest.raises(ModelLoadError, match=f"not a whole safetensors file.*{words}"):
            load_engine(folder)
    second.unlink()
    with pytest.raises(ModelLoadError, match=f"names {second.name}, which is not there"):
        load_engine(folder)
    second.write_bytes(data)
    moved = {**listed["weight_map"], "norm.weight": second.name}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ModelLoadError, match=r"norm\.weight"):
        load_engine(folder)
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../norm.safetensors"}}))
    with pytest.raises(ModelLoadError, match="not a file of this folder"):
        load_engine(folder)


def test_repacking_to_fp8_changes_no_logit(released: Callable[..., Path], tmp_path: Path) -> None:
    source, target = released("pro"), tmp_path / "fp8"
    assert convert(source, target) == 3 * 8 * (5 + 3)
    config = ModelConfig.load(target)
    table = open_checkpoint(target, config).table
    assert {w.kind for w in table.values() if w.expert is not None} == {Kind.FP8}
    assert (target / "generation_config.json").exists()
    assert torch.equal(logits(load_engine(source)), logits(load_engine(target)))
    with pytest.raises(ModelLoadError, match="is not an empty folder"):
        convert(source, target)
    with pytest.raises(ModelLoadError, match="no FP4 experts"):
        convert(target, tmp_path / "again")


def test_a_tile_that_fp8_cannot_hold_stops_the_repacking_by_name(
    folder: Path, tmp_path: Path
) -> None:
    change(folder, lambda t: bytes_of(t[f"{EXPERT}.scale"])[7, 0].fill_(250))
    command = [sys.executable, "-m", "model.convert", str(folder), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--expert-dtype", "fp8"], capture_output=True, text=True, check=False
    )
    print(done.stderr)
    assert done.returncode == 1
    assert f"{EXPERT}.weight has FP4 scales too far apart" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(
    released: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = released("flash")
    config = ModelConfig.load(path)
    monkeypatch.setattr(load, "free_host_bytes", lambda: 8 << 20)
    with pytest.raises(ModelLoadError, match="has 8 MiB free; use more ranks") as caught:
        load_engine(path)
    print(caught.value.message)
    weights = weight_bytes(open_checkpoint(path, config).backbone, Grid(), element_bytes=2)
    free = weights + work_bytes(config, Grid()) + (16 << 20)
    monkeypatch.setattr(load, "free_host_bytes", lambda: free)
    with pytest.raises(ModelLoadError, match="lower --max-model-len from 65536 to") as caught:
        load_engine(released("flash"))
    print(caught.value.message)
    fits = int(caught.value.message.split(" to ")[-1].split(" ")[0])
    load_engine(released("flash"), max_model_len=fits).close()
    with pytest.raises(ModelLoadError, match="lower --max-model-len"):
        load_engine(released("flash"), max_model_len=fits + 2048)


def test_free_memory_is_what_the_kernel_and_every_cgroup_above_leave(tmp_path: Path) -> None:
    def group(path: Path, limit: str, used: int, cached: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")

    meminfo, root, own = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own"
    assert free_host_bytes(meminfo, root, own) is None
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:   5000 kB\n")
    assert free_host_bytes(meminfo, root, own) == 5000 * 1024
    own.write_text("0::/pod/one\n")
    group(root / "pod" / "one", "max", 0, 0)
    group(root / "pod", "4000000", 3000000, 500000)
    assert free_host_bytes(meminfo, root, own) == 1500000
    group(root / "pod" / "one", "1000", 400, 100)
    assert free_host_bytes(meminfo, root, own) == 700


_MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
from model.load import load_engine
def status(key):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith(key)) * 1024
load_engine(sys.argv[1], max_model_len=1024).close()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
engine = load_engine(sys.argv[2], max_model_len=1024)
print(before, status("VmHWM"), status("VmRSS"))
"""


def test_loading_takes_little_more_memory_than_what_stays(
    released: Callable[..., Path], tmp_path: Path
) -> None:
    """The issue allows 1 GiB above the shard; here buffers must stay below 192 MiB."""
    sizes = {"vocab_size": 100_000, "num_hash_layers": 0}
    big = write_checkpoint(tmp_path / "big", shards=3, changes=sizes)
    config = ModelConfig.load(big)
    resident = weight_bytes(open_checkpoint(big, config).table, Grid(), element_bytes=2)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(released("flash")), str(big)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, peak, after = (int(word) for word in done.stdout.split())
    files = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    print(
        f"files {files >> 20} MiB, resident {resident >> 20} MiB, "
        f"grown by {(after - before) >> 20} MiB, peak {(peak - before) >> 20} MiB"
    )
    assert peak - before <= resident + (192 << 20)


def test_reading_through_a_rank_of_four_touches_a_part_of_the_bytes(
    released: Callable[..., Path],
) -> None:
    path = released("pro")
    checkpoint = open_checkpoint(path, ModelConfig.load(path))
    with checkpoint.shards:
        read_weights(checkpoint, dtype=torch.bfloat16, grid=Grid(ep=4, rank=1))
        experts = sum(
            entry.size_bytes
            for name, entry in checkpoint.shards.entries.items()
            if ".experts." in name and name.startswith("layers.")
        )
        total = sum(
            entry.size_bytes
            for name, entry in checkpoint.shards.entries.items()
            if name.startswith(("layers.", "embed", "head", "norm", "hc"))
        )
        print(f"{checkpoint.shards.bytes_read} of {total} bytes, experts {experts}")
        assert checkpoint.shards.bytes_read <= total - experts * 3 // 4
