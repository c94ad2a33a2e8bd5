"""Parts of training on their own: loss, attention, schedule, commits, targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_scheduler

from ftray.config import Schedule
from ftray.errors import ArtefactError, ModelError
from ftray.model.adapters import targets
from ftray.model.attention import Packed, packed_attention
from ftray.train import commits, loss
from ftray.train.commits import Commit, Progress, State, to_keep
from ftray.train.loss import Head, _ChunkedCrossEntropy
from ftray.train.schedule import rate_factor, warmup_steps
from tests.toys import CountingLinear


class _Config:
    final_logit_softcapping = None


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_chunked_loss_equals_cross_entropy(monkeypatch, count, trained_head, cap, smoothing):
    monkeypatch.setattr(loss, "LOSS_CHUNK_TOKENS", 5)
    torch.manual_seed(0)
    head = nn.Linear(16, 100, bias=True).requires_grad_(trained_head)
    config = _Config()
    config.final_logit_softcapping = cap
    hidden, labels = torch.randn(count, 16, requires_grad=True), torch.randint(100, (count,))
    parameters = [p for p in head.parameters() if p.requires_grad]
    mine = _ChunkedCrossEntropy.apply(hidden, labels, Head(head, config), smoothing, *parameters).sum()
    grads = torch.autograd.grad(mine * 0.5, [hidden, *parameters])
    logits = head(hidden)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    theirs = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(grads, torch.autograd.grad(theirs * 0.5, [hidden, *parameters]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_never_holds_all_logits(monkeypatch):
    """Peak of what autograd keeps: no tensor of tokens × vocabulary outlives its chunk."""
    monkeypatch.setattr(loss, "LOSS_CHUNK_TOKENS", 8)
    head = CountingLinear(16, 1000, bias=False).requires_grad_(False)
    hidden = torch.randn(100, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        total = _ChunkedCrossEntropy.apply(hidden, torch.randint(1000, (100,)), Head(head, _Config()), 0.0)
    assert max(head.calls) == 8
    assert max([*saved, 0]) < 100 * 1000
    total.sum().backward()


@pytest.mark.parametrize("lengths", [[5], [3, 9, 1], [4, 4, 4]])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_equals_each_sequence_alone(lengths, window):
    torch.manual_seed(0)
    total, heads, kv_heads, size = sum(lengths), 4, 2, 8
    query = torch.randn(1, heads, total, size, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, total, size, requires_grad=True) for _ in range(2))
    packed = Packed.of(torch.tensor(lengths))
    out, _ = packed_attention(nn.Module(), query, key, value, None, packed=packed, sliding_window=window)
    start, parts = 0, []
    for n in lengths:
        piece = slice(start, start + n)
        place = torch.arange(n)
        distance = place[:, None] - place[None, :]
        mask = (distance >= 0) & (distance < (window or n + 1))
        k, v = (x[:, :, piece].repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        parts.append(F.scaled_dot_product_attention(query[:, :, piece], k, v, attn_mask=mask).transpose(1, 2))
        start += n
    alone = torch.cat(parts, 1)
    torch.testing.assert_close(out, alone)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), [query, key, value])
    theirs = torch.autograd.grad((alone * weight).sum(), [query, key, value])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_those_of_transformers(name, warmup):
    theirs_name = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, name)
    extra = {"num_decay_steps": 10, "decay_type": "linear"} if name == "wsd" else None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(theirs_name, optimizer, warmup, 50, scheduler_specific_kwargs=extra)
    schedule = Schedule(name=name, warmup=warmup, decay=0.2)
    for step in range(50):
        assert rate_factor(schedule, step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warmup_as_a_share():
    assert warmup_steps(Schedule(warmup=0.03), 250) == 8
    assert warmup_steps(Schedule(warmup=10), 250) == 10
    assert warmup_steps(Schedule(warmup=0), 250) == 0
    assert warmup_steps(Schedule(warmup=0.03), 1) == 0  # else its rate would be none
    assert warmup_steps(Schedule(warmup=0.9), 5) == 4


def test_final_rate():
    assert rate_factor(Schedule(name="cosine", warmup=0, final=0.1), 100, 100) == pytest.approx(0.1)


def test_commit_comes_back_as_it_went(tmp_path):
    progress = Progress(step=7, cursor=112, best_loss=1.5, best_step=4)
    commit = Commit(
        progress, State({"a": torch.randn(3, 2)}, {"0/exp_avg": torch.randn(3, 2)}, {"0/step": 7}), {"seed": 1}
    )
    where = commits.write(str(tmp_path), commit)
    back = commits.read(where)
    assert back.progress == progress
    assert torch.equal(back.state.model["a"], commit.state.model["a"])
    assert torch.equal(back.state.optimizer["0/exp_avg"], commit.state.optimizer["0/exp_avg"])
    assert (back.state.plain, back.identity) == ({"0/step": 7}, {"seed": 1})
    assert not list((tmp_path / "commits").glob(".*"))


def test_older_commits_took_the_base_for_a_best_step():
    """What they say of it is true of early stopping alone."""
    old = {"step": 8, "base_loss": 1.0, "best_loss": 1.0, "best_step": 0, "since_best": 2}
    progress = Progress.of(old)
    assert (progress.best_loss, progress.best_step) == (None, None)
    assert (progress.to_beat, progress.since_best) == (1.0, 2)
    better = Progress.of(old | {"best_loss": 0.5, "best_step": 4})
    assert (better.best_loss, better.best_step, better.to_beat) == (0.5, 4, 0.5)
    assert Progress.of(asdict(better)) == better


def test_a_large_commit_is_written_in_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "SHARD_BYTES", 100)
    state = State({f"p{i}": torch.randn(9) for i in range(7)}, {f"p{i}/exp_avg": torch.randn(30) for i in range(2)})
    where = commits.write(str(tmp_path), Commit(Progress(step=1), state))
    files = {path.name for path in Path(where).glob("*.safetensors")}
    assert files == {
        *("model.safetensors", "model-2.safetensors", "model-3.safetensors", "model-4.safetensors"),
        *("optimizer.safetensors", "optimizer-2.safetensors"),
    }
    back = commits.read(where).state
    for mine, theirs in ((back.model, state.model), (back.optimizer, state.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_commit_on_an_object_store():
    import fsspec

    folder = "memory://commits-test/run"
    for step in (1, 2, 3):
        commits.write(folder, Commit(Progress(step=step), State({"a": torch.full((2,), float(step))}, {})))
    commits.prune(folder, newest=3, keep_last=1, best=1)
    assert commits.steps_of(folder) == [1, 3]
    found = commits.latest(folder, pytest.fail)
    assert found
    assert found.progress.step == 3
    fsspec.filesystem("memory").rm("/commits-test", recursive=True)


def test_read_refuses_what_is_not_whole(tmp_path):
    where = commits.write(str(tmp_path), Commit(Progress(step=1), State({"a": torch.ones(2)}, {})))
    (tmp_path / "commits/step-00000001/state.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"state.json has 2 bytes"):
        commits.read(where)


def test_what_is_kept():
    assert to_keep([1, 2, 3, 4], keep_last=2, best=1) == {1, 3, 4}
    assert to_keep([1, 2], keep_last=5, best=None) == {1, 2}


def test_targets_that_match_nothing_list_what_could():
    with pytest.raises(ModelError, match=r"(?s)'q_prj' matches no linear layer.*k_proj, q_proj"):
        targets(["q_prj"], ["layers.0.attn.q_proj", "layers.0.attn.k_proj"])
