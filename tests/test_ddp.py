"""Data parallel training: each process packs its own rows, and DistributedDataParallel averages as it always does."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness import BACKEND

if BACKEND != "pgcompile":
    pytest.skip("about pgcompile under DDP", allow_module_level=True)

import pgcompile

RANKS, BUCKET_MIB = 2, 1
SCRIPT = """
import sys
from test_ddp import *

dist.init_process_group("gloo")
model = LM()
parallel = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MIB)
loss(parallel, batch(dist.get_rank())).backward()
if dist.get_rank() == 0:
    torch.save([p.grad for p in model.parameters()], sys.argv[1])
dist.destroy_process_group()
"""


class LM(nn.Module):
    """In float64 its weights fill more than two buckets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 128), nn.Linear(128, 64)
        self.qkv = nn.ModuleList(nn.Linear(128, 384) for _ in range(6))
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for qkv in self.qkv:
            q, k, v = qkv(F.layer_norm(x, (128,)))[:, None].chunk(3, dim=-1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(x)


def batch(rank):
    ids = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(rank))
    ids[:, :32] = ids[0, :32].clone()
    return ids


def loss(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_two_processes(tmp_path):
    script, report, gradients = tmp_path / "train.py", tmp_path / "report.json", tmp_path / "gradients.pt"
    script.write_text(SCRIPT)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}".split()
    command = ["-m", "pgcompile", "run", "--options", "inner=eager", "--report", report, script, gradients]
    subprocess.run(
        [sys.executable, *torchrun, *command],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        check=True,
    )
    model = LM()
    torch.stack([loss(model, batch(rank)) for rank in range(RANKS)]).mean().backward()
    for found, parameter in zip(torch.load(gradients), model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-12)
    for name in ("report.json", "report.rank1.json"):
        (told,) = json.loads((tmp_path / name).read_text())["models"]
        assert told["graphs"] == ["packed"] and told["decisions"] == {"packed": 1}
        assert (told["dense_tokens"], told["packed_tokens"]) == (4 * 40, 32 + 4 * 8)


def test_the_hint_where_dynamo_cuts_for_ddp():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        parallel = DistributedDataParallel(LM(), bucket_cap_mb=BUCKET_MIB)
        cut = pgcompile.explain(parallel, batch(0))
        assert len(cut.graphs) > 1
        assert any("optimize_ddp = False" in reason.hint for reason in cut.breaks)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):  # as the hint says
            whole = pgcompile.explain(parallel, batch(0), options={"min_saving": 0})
        assert whole.status == "packed" and [b.packed_tokens for b in whole.batches] == [32 + 4 * 8]
    finally:
        dist.destroy_process_group()
