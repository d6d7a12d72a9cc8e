"""`check`: the first batches, compared with the original."""

import logging

import pytest
import torch

from harness import (
    BACKEND,
    compiled,
    float64_everywhere,
)
from small_models import assert_equals_eager, batch_of, small_model

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import backend

pytestmark = pytest.mark.usefixtures("fresh")


def test_check_compares_the_first_batches(monkeypatch):
    from pgcompile import check

    checked = []
    original = check.compare
    monkeypatch.setattr(check, "compare", lambda *args: (checked.append(1), original(*args)))
    model = small_model("half_rotary")
    fast = compiled(model, {"check": 2})
    with float64_everywhere():
        for seed in range(4):
            assert_equals_eager(
                fast, model, batch_of(seed, padding="right")
            )  # its backward runs after the check's
    assert len(checked) == 2


def test_check_without_gradients():
    model, batch = small_model(), batch_of()
    with torch.no_grad():
        assert_equals_eager(compiled(model, {"check": 1}), model, batch)


@pytest.mark.parametrize("how", ["autocast", "loss in float32"])
def test_check_is_as_coarse_as_what_computes(how):
    model, batch = small_model(), batch_of(rows=8, positions=40)
    model = model.float() if how == "autocast" else model.bfloat16()

    def loss(input_ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return model(input_ids).float().log_softmax(-1)[..., 3]

    compiled(loss, {"check": 1, "strict": True})(batch.input_ids).sum().backward()
    assert pgcompile.stats().checked == 1


def test_check_leaves_out_what_is_drawn(caplog):
    model, batch = small_model(), batch_of()

    def noisy(input_ids):
        logits = model(input_ids)
        return logits + torch.rand_like(logits)

    with caplog.at_level(logging.WARNING, "pgcompile"):
        compiled(noisy, {"check": 1, "strict": True})(batch.input_ids)
    assert "not checked: the graph draws random numbers" in caplog.text and pgcompile.stats().checked == 0


@pytest.mark.parametrize("early_stop", [False, True])
def test_check_inside_of_checkpointing_compares_values(early_stop, monkeypatch):
    model, batch = small_model(), batch_of()
    fast = compiled(model, {"check": 2, "strict": True})

    def whole(call):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            logits = torch.utils.checkpoint.checkpoint(call, batch.input_ids, use_reentrant=False)
        return torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    for ours, theirs in zip(whole(fast), whole(model)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (
        pgcompile.stats().checked == 2 - early_stop
    )  # the second time, when backward recomputes the whole call
    original = backend.pack_column
    monkeypatch.setattr(backend, "pack_column", lambda *args: original(*args).roll(1, -1))
    torch._dynamo.reset()
    with pytest.raises(pgcompile.CheckError, match="output 0"):
        whole(compiled(model, {"check": 1}))


def test_check_misses_no_gradient(monkeypatch):
    """One that packing loses altogether."""
    model, batch = small_model(), batch_of()
    fast = compiled(model, {"check": 1})
    kept = next(iter(model.parameters()))
    late = backend.PackedCall._late
    monkeypatch.setattr(
        backend.PackedCall,
        "_late",
        lambda self, args, results, packed, plan: late(
            self, args, results, [p.detach() + 0 * kept.sum() for p in packed], plan
        ),
    )
    with pytest.raises(pgcompile.CheckError, match="gradient of argument"):
        fast(batch.input_ids)


@pytest.mark.parametrize("expected", [2.0, torch.inf, torch.nan])
@pytest.mark.parametrize("found", [2.5, torch.nan])
def test_check_names_the_worst_number(expected, found, monkeypatch):
    """Wherever it is among the pieces that are compared one by one."""
    from pgcompile import check

    monkeypatch.setattr(check, "PIECE", 7)
    right = torch.arange(60, dtype=torch.float64).view(5, 4, 3)
    wrong = right + 1e-9
    right[3, 1, 2], wrong[3, 1, 2] = expected, found
    if expected != expected and found != found:
        check._compare("it", wrong, right, 0.0)
    else:
        with pytest.raises(
            pgcompile.CheckError, match=rf"worst at \[3, 1, 2\]: {found} instead of {expected:.6g}"
        ):
            check._compare("it", wrong, right, 0.0)
    check._compare("nothing", right[:0], right[:0], 0.0)


def test_check_notices_wrong_values(monkeypatch):
    original = backend.pack_column
    monkeypatch.setattr(
        backend, "pack_column", lambda value, dims, plan: original(value, dims, plan).roll(1, -1)
    )
    model, batch = small_model(), batch_of()
    with pytest.raises(pgcompile.CheckError, match="output 0"):
        compiled(model, {"check": 1})(batch.input_ids)


def test_check_notices_wrong_gradients(monkeypatch):
    """The forward is right; the gradient of what is unpacked is halved."""
    from pgcompile import ops

    original = ops.sums_of_copies
    monkeypatch.setattr(ops, "sums_of_copies", lambda *args: lambda grad: original(*args)(grad) / 2)
    model, batch = small_model(), batch_of()
    with pytest.raises(pgcompile.CheckError, match="gradient"):
        compiled(model, {"check": 1})(batch.input_ids)
