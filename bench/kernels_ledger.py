"""`ledger` end to end on the device: separate prefill and decode workers as subprocesses, a fresh
document, every answer checked (`penstock demo` with the local launcher).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.stats import median


def run(device: str, *, tokens: int, questions: int) -> list[dict[str, Any]]:
    """One row. Raises what `penstock demo` raises if the cluster does not start."""
    from cluster.config import resolve
    from cluster.demo import run as demo
    from cluster.launchers.common import free_port

    flags = {
        "model.model": "ledger",
        "model.device": device,
        "launcher.kind": "local",
        "front.port": free_port(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.json"
        config = resolve(flags).config
        demo(config, questions=questions, unanswerable=1, tokens=tokens, json_path=path)
        report = json.loads(path.read_text(encoding="utf-8"))
    later = [answer["ttft_s"] for answer in report["answers"][1:]]
    return [
        {
            "model": "ledger",
            "device": device,
            "document_tokens": report["document_tokens"],
            "right": report["right"],
            "questions": questions,
            "startup_s": report["startup_s"],
            "first_token_s": report["answers"][0]["ttft_s"],
            "first_token_cached_s": median(later) if later else None,
            "answer_s": median([answer["total_s"] for answer in report["answers"]]),
            "separate_processes": report["prefill_pid_differs_from_decode"],
            "decode_computed_prompt_tokens": report["decode_prompt_tokens_computed"],
        }
    ]
