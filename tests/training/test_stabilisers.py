"""Stabilisers do what they say: projection, recomputation, older routing, balance; Muon; export."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from cluster.cli import main  # noqa: E402
from tests.training.test_network import randomize  # noqa: E402
from tests.training.test_robustness import TINY, config, run, stage  # noqa: E402
from training import checkpoint, export, losses, vocabulary  # noqa: E402
from training.anticipate import Anticipation, Spikes  # noqa: E402
from training.config import NetworkConfig, Stabilisers  # noqa: E402
from training.loop import balance_routers  # noqa: E402
from training.muon import FAST, Muon, orthogonalize  # noqa: E402
from training.network import Batch, Network  # noqa: E402
from training.streams import sinkhorn  # noqa: E402


def batch(seed: int, rows: int = 2, tokens: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (rows, tokens), generator=generator)
    positions = torch.arange(tokens).expand(rows, tokens)
    asked = torch.arange(rows * tokens)[tokens // 2 :: 7]
    return Batch(ids, positions, torch.full((rows,), tokens), asked)


def test_the_projection_is_doubly_stochastic_and_its_gradient_is_the_numeric_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, 3, generator=generator, dtype=torch.float64)
    mix = sinkhorn(logits, 20, 1e-6)
    ones = torch.ones(4, 3, dtype=torch.float64)
    assert (mix >= 0).all()
    assert torch.allclose(mix.sum(0), ones, atol=1e-4)
    assert torch.allclose(mix.sum(1), ones, atol=5e-3)
    # So it never enlarges: its largest singular value is 1.
    assert torch.linalg.matrix_norm(mix.permute(2, 0, 1), 2).max() < 1.005
    for iterations in (1, 4, 20):
        assert torch.autograd.gradcheck(
            lambda x, n=iterations: sinkhorn(x, n, 1e-6), (logits.clone().requires_grad_(),)
        )


def test_recomputed_mixing_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        network = Network(TINY, recompute=recompute)
        logits, _ = network(batch(1))
        logits.square().mean().backward()
        grads.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, value in grads[0].items():
        assert torch.equal(value, grads[1][name]), name


def test_routing_takes_the_indices_of_the_snapshot_and_the_weights_of_today() -> None:
    torch.manual_seed(2)
    network = Network(TINY)
    anticipation = Anticipation(
        Stabilisers.model_validate({"anticipatory": "on", "lag": 2}), network
    )
    data = batch(3)

    def ids(of: Network) -> list[Any]:
        of(data)
        return [moe.ids.clone() for moe in of.routers()]

    chosen = []
    for step in range(4):
        anticipation.route(step, lambda each: each(data))
        chosen.append(ids(network))
        with torch.no_grad():
            for moe in network.routers():
                moe.gate.weight.copy_(torch.randn_like(moe.gate.weight))
    last = network.routers()[-1]
    # Steps 0 to 2 are as old as the first weights allow; step 3 is two steps behind its own.
    assert torch.equal(chosen[0][-1], chosen[1][-1]) and torch.equal(chosen[1][-1], chosen[2][-1])
    assert not torch.equal(chosen[2][-1], chosen[3][-1])
    assert last.scores is not None and last.scores.requires_grad
    anticipation.release()
    assert not torch.equal(ids(network)[-1], chosen[3][-1])


def test_a_spike_is_far_above_the_recent_median() -> None:
    spikes = Spikes(2.0)
    assert not any(spikes.seen(1.0 + 0.01 * i) for i in range(20))
    assert not spikes.seen(1.9)
    assert spikes.seen(2.6) and spikes.seen(2.6)
    assert not Spikes(2.0).seen(100.0)


def test_a_spike_rolls_back_and_switches_anticipation_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        stages=(stage("A", steps=28),), checkpoint_every_steps=0,
        stabilisers=Stabilisers.model_validate({"anticipatory": "spike", "rollback_every": 5,
                                                "anticipatory_steps": 4, "lag": 2}),
    )  # fmt: skip
    real, calls, lines = losses.compute, [], []

    def spiked(*args: Any) -> losses.Outcome:
        outcome = real(*args)
        calls.append(1)
        if len(calls) == 24:
            return losses.Outcome(**(vars(outcome) | {"loss": outcome.loss * 50}))
        return outcome

    monkeypatch.setattr(losses, "compute", spiked)
    monkeypatch.setattr("builtins.print", lambda line: lines.append(line))
    told, curve, network = run(cfg, tmp_path)
    steps = [step for step, _ in told]
    assert steps == [*range(1, 24), *range(21, 29)], steps
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert [line["step"] for line in curve] == sorted({line["step"] for line in curve})
    final = checkpoint.load(checkpoint.known(tmp_path)[-1], cfg.digest())
    assert final.facts["rollbacks"] == 1 and final.facts["until"] == 27
    assert all(moe.forced is None for moe in network.routers())


def test_a_run_that_anticipates_resumes_bit_for_bit(tmp_path: pathlib.Path) -> None:
    settings = Stabilisers.model_validate({"anticipatory": "on", "lag": 2,
                                           "sequence_balance": 0.01})  # fmt: skip
    cfg = config(stages=(stage("A", steps=7),), stabilisers=settings)
    whole, curve, _ = run(cfg, tmp_path / "whole")
    assert [path.name[-14:-6] for path in checkpoint.known(tmp_path / "whole")] == [
        "00000006", "00000007",
    ]  # fmt: skip
    again, resumed, _ = run(
        cfg, tmp_path / "again", resume=checkpoint.path_of(tmp_path / "whole", 6)
    )
    assert again == whole[6:] and resumed == curve


def test_the_balance_loss_is_one_at_balance_and_more_when_experts_starve() -> None:
    torch.manual_seed(4)
    network, data = Network(TINY), batch(5)
    network(data)
    routers = [moe for moe in network.routers() if not moe.gate.hashed]
    even = float(losses.sequence_balance(network, data).detach())
    assert even == pytest.approx(len(routers), rel=0.25)
    with torch.no_grad():
        for moe in routers:
            moe.gate.weight.zero_()
            moe.gate.get_buffer("bias").copy_(torch.tensor([5.0, 4.0, 0.0, 0.0]))
    network(data)
    for moe in routers:
        assert moe.load is not None and moe.load.tolist()[2:] == [0, 0]
        # Equal scores: P is even, f is 2, 2, 0, 0.
        before = moe.gate.get_buffer("bias").clone()
        balance_routers(network, 0.003)
        change = moe.gate.get_buffer("bias") - before
        assert change[:2].tolist() == pytest.approx([-0.003] * 2, abs=1e-6)
        assert change[2:].tolist() == pytest.approx([0.003] * 2, abs=1e-6)
        break
    loss = losses.sequence_balance(network, data)
    assert float(loss.detach()) == pytest.approx(len(routers), rel=1e-4)
    loss.backward()
    assert routers[0].gate.weight.grad is not None


def test_our_muon_is_torchs_where_that_covers_it() -> None:
    """torch.optim.Muon has one set of coefficients, bfloat16, two dimensions and 0.2 as its scale;
    with five fast steps on one matrix ours is the same direction.
    """
    torch.manual_seed(6)
    ours, theirs = (torch.nn.Parameter(torch.eye(24, 40)) for _ in range(2))
    muon = Muon([(ours, (1, 24, 40), 1.0)], weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", ns_steps=5
    )
    momentum = torch.zeros(24, 40)
    for step in range(3):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        before = ours.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step(0.1)
        reference.step()
        momentum = 0.95 * momentum + gradient
        update = gradient + 0.95 * momentum
        want = before * (1 - 0.1 * 0.1) - 0.1 * 0.18 * 40**0.5 * orthogonalize(update)
        assert torch.allclose(ours, want, atol=1e-5)
        rough = orthogonalize(update[None], (FAST,) * 5)[0]
        cosine = torch.nn.functional.cosine_similarity
        assert cosine(rough.flatten(), orthogonalize(update).flatten(), dim=0) > 0.95
    moved = torch.nn.functional.cosine_similarity(
        (ours - torch.eye(24, 40)).flatten(), (theirs - torch.eye(24, 40)).flatten(), dim=0
    )
    assert moved > 0.95


def test_an_exported_model_is_the_same_function_when_it_is_served(tmp_path: pathlib.Path) -> None:
    """mHC and MoE with every term at work: `penstock logits` against the training network."""
    torch.manual_seed(7)
    network = Network(NetworkConfig(swiglu_limit=0.5, index_n_heads=8))
    randomize(network, 7)
    export.export(network, tmp_path / "model")
    loaded = export.load(tmp_path / "model")
    text = "the code of bakilo is 4821. " * 20
    tokens = vocabulary.tokenizer().encode(text).ids
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    out = tmp_path / "logits.safetensors"
    arguments = f"logits {tmp_path / 'model'} --tokens {tmp_path / 'tokens.json'} --out {out}"
    assert main([*arguments.split(), "--kv-cache-dtype", "fp32"]) == 0
    served = load_file(out)["logits"]
    length = len(tokens)
    data = Batch(
        torch.tensor([tokens]), torch.arange(length)[None], torch.tensor([length]),
        torch.arange(length),
    )  # fmt: skip
    with torch.no_grad():
        ours, _ = loaded(data)
    worst = float((ours - served).abs().max())
    print(f"{length} tokens: worst difference {worst:.2e}, spread {float(ours.std()):.2f}")
    assert worst <= 2e-4
