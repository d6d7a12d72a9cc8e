"""Graphs that look packable and aren't, and their legitimate twins. Each is one function and a line about it.

A case says where its function sits in a small language model, what may happen to it, and why. `# <--` marks the line
that a refusal must name. Whatever happens, values and gradients are the original's: that is test_refusals.py.

    between(...)     op(m, x, ids, mask, *extra) -> x       on the stream, between two attentions
    attention(...)   op(m, q, k, v, ids, mask, *extra)      instead of the first attention; all [N, H, S, D]
    hidden(...)      op(m, x, ids, mask, *extra)            on the stream after the last attention, before the head
    logits(...)      op(m, logits, ids, mask, *extra)       after the head
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from harness import Batch, random_tree_batch, rewire

VOCAB, HIDDEN, HEADS, LONGEST = 13, 8, 4, 16


# ---------------------------------------------------------------------------------------------------------------------
# What a case is
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """statuses: what may happen. kinds: with a refusal, at least one fallback has one of these; empty means any."""

    statuses: frozenset[str]
    kinds: frozenset[str] = frozenset()


PACKS = Outcome(frozenset({"packed"}))
ANYTHING = Outcome(frozenset({"packed", "islands", "dense", "eager", "none"}))


def refused(*kinds: str) -> Outcome:
    """Must not pack: it isn't a function of the token's class."""
    return Outcome(frozenset({"eager", "dense"}), frozenset(kinds))


def either(*kinds: str) -> Outcome:
    """Could be packed or run as an island by an analysis that is clever enough; may be refused."""
    return Outcome(frozenset({"packed", "islands", "eager", "dense"}), frozenset(kinds))


TOKENS = ("token_mixing", "row_layout", "unknown_op")
ROWS = ("row_mixing", "row_layout", "unknown_op")
BOTH = ("token_mixing", "row_mixing", "row_layout", "unknown_op")
NOT_CAUSAL = ("not_causal", "mask_not_understood", "token_mixing")
SIZE = ("size_as_number", "unknown_op")
WRITTEN = either(*BOTH, *NOT_CAUSAL, "mutation", "unknown_op")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    place: str
    op: Callable
    outcome: Outcome
    module: Callable[[], nn.Module] | None = None  # m.extra
    inputs: Callable[[Batch], tuple] = lambda batch: ()  # further positional arguments
    embedding: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments of nn.Embedding
    padding: str = "none"
    min_positions: int = 1

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return rewire(Stream(self))

    def arguments(self, rows: int, positions: int, seed: int = 0) -> tuple:
        """The same tensors for the same numbers, new ones each time: a case may write into them."""
        torch.manual_seed(seed)
        batch = random_tree_batch(
            rows=rows, positions=positions, vocab=VOCAB, padding=self.padding, seed=seed
        )
        return batch.input_ids, batch.attention_mask, *self.inputs(batch)

    @property
    def marked_lines(self) -> set[int]:
        """The lines of this file that a refusal may name; the whole function where none is marked."""
        functions = [Stream.forward] if self.embedding else [self.op]
        if self.place == "attention":
            functions += [causal_mask, additive_causal, scores_of, _with_sinks, _masked_scores]
        marked, spanned = set(), set()
        for function in functions:
            source, first = inspect.getsourcelines(function)
            marked |= {first + offset for offset, line in enumerate(source) if "# <--" in line}
            spanned |= set(range(first, first + len(source)))
        return marked or spanned


CASES: dict[str, Case] = {}


def _register(place: str) -> Callable:
    def with_outcome(outcome: Outcome, **details) -> Callable:
        def decorate(op: Callable) -> Callable:
            assert op.__name__ not in CASES, op.__name__
            CASES[op.__name__] = Case(op.__name__, place, op, outcome, **details)
            return op

        return decorate

    return with_outcome


between, attention, hidden, logits = (
    _register(place) for place in ("between", "attention", "hidden", "logits")
)


# ---------------------------------------------------------------------------------------------------------------------
# The model around it
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, attend):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Stream(nn.Module):
    """Embedding, attention or [attention], [between], attention, [hidden], head, [logits]. No positions: the causal
    mask alone orders the tokens, so that as much as possible is shared."""

    def __init__(self, case: Case):
        super().__init__()
        self.op, self.place = case.op, case.place
        self.embed = nn.Embedding(VOCAB, HIDDEN, **case.embedding)
        self.first, self.second = Attention(), Attention()
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.extra = case.module() if case.module else None
        self.register_buffer("state", torch.zeros(HIDDEN))
        self.register_buffer("table", torch.linspace(-1, 1, LONGEST * LONGEST).sin().view(LONGEST, LONGEST))

    def forward(self, ids, mask=None, *extra):
        def causal(q, k, v):
            if mask is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            index = torch.arange(ids.shape[1], device=ids.device)
            allowed = (index[:, None] >= index[None, :]) & mask[:, None, None, :].bool()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

        def given(q, k, v):
            return self.op(self, q, k, v, ids, mask, *extra)

        x = self.embed(ids)  # <--
        x = x + self.first(self.norm(x), given if self.place == "attention" else causal)
        if self.place == "between":
            x = self.op(self, x, ids, mask, *extra)
        x = x + self.second(self.norm(x), causal)
        if self.place == "hidden":
            x = self.op(self, x, ids, mask, *extra)
        y = self.head(x)
        return self.op(self, y, ids, mask, *extra) if self.place == "logits" else y


# ---------------------------------------------------------------------------------------------------------------------
# Between attentions: reading other tokens
# ---------------------------------------------------------------------------------------------------------------------


@between(refused(*TOKENS))
def shift_left(m, x, ids, mask):
    return x + F.pad(x[:, 1:], (0, 0, 0, 1))  # <--


@between(either(*TOKENS))
def shift_right(m, x, ids, mask):
    return x + F.pad(x[:, :-1], (0, 0, 1, 0))  # <--


@between(either(*TOKENS))
def shift_right_by_cat(m, x, ids, mask):
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)  # <--


@between(refused(*TOKENS))
def shift_left_by_cat(m, x, ids, mask):
    return x + torch.cat([x[:, 1:], x[:, -1:]], dim=1)  # <--


@between(refused(*TOKENS))
def roll_positions(m, x, ids, mask):
    return x + x.roll(1, dims=1)  # <--


@between(refused(*ROWS))
def roll_rows(m, x, ids, mask):
    return x + torch.roll(x, 1, 0)  # <--


@between(refused(*BOTH))
def roll_everything(m, x, ids, mask):
    return x + x.roll(HIDDEN)  # <--


@between(refused(*TOKENS))
def flip_positions(m, x, ids, mask):
    return x + x.flip(1)  # <--


@between(refused(*ROWS))
def flip_rows(m, x, ids, mask):
    return x + x.flip(0)  # <--


@between(PACKS)
def flip_features(m, x, ids, mask):
    return x + x.flip(-1)


@between(refused(*ROWS))
def cumsum_over_rows(m, x, ids, mask):
    return x + x.cumsum(0)  # <--


@between(refused(*TOKENS))
def cumsum_reversed(m, x, ids, mask):
    return x + x.flip(1).cumsum(1).flip(1)  # <--


@between(refused(*TOKENS))
def cumsum_reversed_by_total(m, x, ids, mask):
    total = x.sum(1, keepdim=True)  # <--
    return x + total - x.cumsum(1)  # <--


@between(either(*TOKENS))
def cumsum_causal(m, x, ids, mask):
    return x + 0.1 * x.cumsum(dim=1)  # <--


@between(either(*TOKENS))
def cummax_causal(m, x, ids, mask):
    return x + x.cummax(dim=-2).values  # <--


@between(PACKS)
def cumsum_over_features(m, x, ids, mask):
    return x + x.cumsum(-1)


@between(refused(*TOKENS))
def mean_over_positions(m, x, ids, mask):
    return x + x.mean(1, keepdim=True)  # <--


@between(refused(*ROWS))
def mean_over_rows(m, x, ids, mask):
    return x + x.mean(dim=0)  # <--


@between(refused(*BOTH))
def mean_over_everything(m, x, ids, mask):
    return x - x.mean()  # <--


@between(refused(*BOTH))
def quantize_with_one_scale(m, x, ids, mask):
    scale = x.abs().amax() / 127  # <--
    return x + ((x / scale).round() * scale - x).detach()


@between(PACKS)
def quantize_with_a_scale_for_each_token(m, x, ids, mask):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return x + ((x / scale).round() * scale - x).detach()


@between(refused(*TOKENS))
def max_over_positions(m, x, ids, mask):
    return x + x.amax(dim=-2, keepdim=True)  # <--


@between(refused(*ROWS))
def max_over_rows(m, x, ids, mask):
    return x + x.max(dim=0, keepdim=True).values  # <--


@between(refused(*BOTH))
def norm_over_everything(m, x, ids, mask):
    return x / x.norm()  # <--


@between(refused(*TOKENS))
def normalize_over_positions(m, x, ids, mask):
    return x + F.normalize(x, dim=1)  # <--


@between(PACKS)
def normalize_over_features(m, x, ids, mask):
    return x + F.normalize(x, dim=2)


@between(refused(*TOKENS))
def layer_norm_over_positions(m, x, ids, mask):
    return x + F.layer_norm(x, x.shape[1:])  # <--


@between(refused(*BOTH))
def group_norm(m, x, ids, mask):
    return x + F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)  # <--


@between(refused(*BOTH))
def instance_norm(m, x, ids, mask):
    return x + F.instance_norm(x.transpose(1, 2)).transpose(1, 2)  # <--


@between(refused(*TOKENS))
def sort_positions(m, x, ids, mask):
    return x + x.sort(dim=1).values  # <--


@between(refused(*ROWS))
def sort_rows(m, x, ids, mask):
    return x + x.sort(dim=0)[0]  # <--


@between(refused(*TOKENS))
def topk_positions(m, x, ids, mask):
    return x + x.topk(1, dim=1).values  # <--


@between(PACKS)
def softmax_over_features(m, x, ids, mask):
    return x + x.softmax(-1)


@between(refused(*TOKENS))
def softmax_over_positions(m, x, ids, mask):
    return x + x.softmax(1)  # <--


@between(refused(*ROWS))
def softmax_over_rows(m, x, ids, mask):
    return x + F.softmax(x, dim=0)  # <--


@between(refused(*TOKENS))
def logsumexp_over_positions(m, x, ids, mask):
    return x - torch.logsumexp(x, dim=-2, keepdim=True)  # <--


@between(refused(*TOKENS))
def last_token(m, x, ids, mask):
    return x + x[:, -1:]  # <--


@between(either(*TOKENS))
def first_token(m, x, ids, mask):
    return x + x[:, :1]  # <--


@between(refused(*TOKENS))
def middle_token(m, x, ids, mask):
    return x + x[:, x.shape[1] // 2, None]  # <--


@between(refused(*BOTH))
def first_row(m, x, ids, mask):
    return x + x[:1]  # <--


@between(refused(*BOTH))
def last_row(m, x, ids, mask):
    return x + x.select(0, -1)  # <--


@between(refused(*TOKENS), min_positions=2)
def every_other_token(m, x, ids, mask):
    pooled = F.pad(x, (0, 0, 0, 1))[:, 1::2]  # <--
    return x + pooled.repeat_interleave(2, dim=1)[:, : x.shape[1]]  # <--


@between(refused(*TOKENS))
def swap_halves(m, x, ids, mask):
    half = x.shape[1] // 2
    return x + torch.cat([x[:, half:], x[:, :half]], 1)  # <--


@between(refused(*TOKENS), module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1))
def conv_symmetric(m, x, ids, mask):
    return x + m.extra(x.transpose(1, 2)).transpose(1, 2)  # <--


@between(either(*TOKENS), module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2))
def conv_causal(m, x, ids, mask):
    return x + m.extra(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)  # <--


@between(
    either(*TOKENS, "padding_read"),
    module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, groups=HIDDEN),
    padding="left",
)
def conv_causal_reads_left_padding(m, x, ids, mask):
    return x + m.extra(x.mT)[..., : x.shape[1]].mT  # <--


@between(
    refused(*TOKENS, "padding_read"),
    module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding="same", groups=HIDDEN),
    padding="right",
)
def conv_reads_right_padding(m, x, ids, mask):
    return x + m.extra(x.mT).mT  # <--


@between(refused(*BOTH), module=lambda: nn.Conv2d(1, 1, 3, padding=1))
def conv_2d(m, x, ids, mask):
    return x + m.extra(x[:, None])[:, 0]  # <--


@between(either(*BOTH), module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 1))
def conv_pointwise(m, x, ids, mask):
    return x + m.extra(x.transpose(1, 2)).transpose(1, 2)


@between(refused(*TOKENS))
def average_pool(m, x, ids, mask):
    return x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)  # <--


@between(refused(*TOKENS, "padding_read"), padding="right")
def mean_reads_padding(m, x, ids, mask):
    return x + x.mean(dim=1, keepdim=True)  # <--


@between(refused(*TOKENS, "padding_read"), padding="left")
def masked_mean(m, x, ids, mask):
    weights = mask[..., None].to(x.dtype)
    return x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)  # <--


@between(ANYTHING, module=lambda: nn.LSTM(HIDDEN, HIDDEN, batch_first=True))
def lstm(m, x, ids, mask):
    return x + m.extra(x)[0]  # <--


@between(
    ANYTHING,  # Dynamo breaks the graph around it; what is left may pack
    module=lambda: nn.GRU(HIDDEN, HIDDEN // 2, batch_first=True, bidirectional=True),
)
def gru_bidirectional(m, x, ids, mask):
    return x + m.extra(x)[0]  # <--


@between(ANYTHING, module=lambda: nn.GRU(HIDDEN, HIDDEN))
def gru_over_rows(m, x, ids, mask):
    return x + m.extra(x)[0]  # <--


@between(refused(*TOKENS))
def einsum_over_positions(m, x, ids, mask):
    return x + torch.einsum("nsd,nse->nde", x, x).mean(-1)[:, None]  # <--


@between(refused(*TOKENS))
def mixer(m, x, ids, mask):
    S = x.shape[1]
    return x + torch.einsum("nsd,ts->ntd", x, m.table[:S, :S])  # <--


@between(refused(*TOKENS))
def mixer_by_linear(m, x, ids, mask):
    S = x.shape[1]
    return x + F.linear(x.transpose(1, 2), m.table[:S, :S]).transpose(1, 2)  # <--


@between(either(*TOKENS))
def mixer_causal(m, x, ids, mask):
    S = x.shape[1]
    return x + m.table[:S, :S].tril() @ x  # <--


@between(refused(*ROWS))
def mixer_over_rows(m, x, ids, mask):
    N = x.shape[0]
    return x + torch.tensordot(m.table[:N, :N], x, dims=1)  # <--


@between(refused(*TOKENS))
def gram_without_softmax(m, x, ids, mask):
    return x + (x @ x.transpose(1, 2)) @ x  # <--


@between(either(*TOKENS))
def gram_causal(m, x, ids, mask):
    return x + (x @ x.mT).tril() @ x  # <--


@between(refused(*ROWS))
def gram_over_rows(m, x, ids, mask):
    by_position = x.transpose(0, 1)
    return x + ((by_position @ by_position.mT) @ by_position).transpose(0, 1)  # <--


@between(refused(*TOKENS))
def unfold_windows(m, x, ids, mask):
    return x + F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).sum(-1)  # <--


@between(either(*TOKENS))
def pad_and_cut(m, x, ids, mask):
    return F.pad(x, (0, 0, 0, 3))[:, : x.shape[1]] * 2.0


@between(refused(*TOKENS))
def pad_front_and_cut(m, x, ids, mask):
    return x + F.pad(x, (0, 0, 2, 2))[:, 4:]  # <--


@between(refused(*TOKENS))
def gather_by_data(m, x, ids, mask):
    S = x.shape[1]
    return x + x.gather(1, (ids % S)[..., None].expand_as(x))  # <--


@between(refused(*BOTH), inputs=lambda batch: (torch.arange(batch.input_ids.shape[1]).flip(0),))
def permute_positions(m, x, ids, mask, permutation):
    return x + x[:, permutation]  # <--


@between(refused(*BOTH), inputs=lambda batch: (torch.arange(batch.input_ids.shape[0]).roll(1),))
def permute_rows(m, x, ids, mask, permutation):
    return x + x.index_select(0, permutation)  # <--


@between(refused(*BOTH), inputs=lambda batch: (torch.arange(batch.input_ids.numel()).flip(0),))
def permute_tokens(m, x, ids, mask, permutation):
    return x + x.reshape(-1, HIDDEN)[permutation].view_as(x)  # <--


@between(refused(*TOKENS))
def scatter_add_positions(m, x, ids, mask):
    index = (ids % x.shape[1])[..., None].expand_as(x)
    return x + torch.zeros_like(x).scatter_add(1, index, x)  # <--


@between(refused(*BOTH))
def index_add_by_id(m, x, ids, mask):
    sums = torch.zeros(VOCAB, HIDDEN, dtype=x.dtype).index_add(0, ids.flatten(), x.flatten(0, 1))  # <--
    return x + sums[ids]  # <--


@between(either())  # Dynamo breaks the graph here: its parts pack, and nobody shares across the break
def select_by_data(m, x, ids, mask):
    return x + x[ids > 6].sum(0)  # <--


@between(refused(*BOTH))
def rows_and_positions_swapped(m, x, ids, mask):
    N, S, d = x.shape
    return x + x.view(S, N, d).transpose(0, 1)  # <--


@between(refused(*BOTH))
def transpose_then_reshape(m, x, ids, mask):
    return x + x.transpose(0, 1).reshape(x.shape)  # <--


@between(PACKS)
def transpose_there_and_back(m, x, ids, mask):
    return x + x.transpose(0, 1).tanh().transpose(0, 1)


@between(refused(*TOKENS), min_positions=2)
def pool_adjacent(m, x, ids, mask):
    N, S, d = x.shape
    even = x[:, : S // 2 * 2].reshape(N, S // 2, 2 * d)  # <--
    return x + even.mean(1).view(N, 2, d).sum(1, keepdim=True)  # <--


@between(refused(*TOKENS))
def features_into_positions(m, x, ids, mask):
    N, S, d = x.shape
    return x + x.reshape(N, d, S).transpose(1, 2)  # <--


@between(refused(*TOKENS))
def whole_row_as_features(m, x, ids, mask):
    return x + x.flatten(1).mean(-1)[:, None, None]  # <--


@between(PACKS)
def flatten_tokens_and_back(m, x, ids, mask):
    N, S, d = x.shape
    return (m.norm(x.view(N * S, d)) * 2).view(N, S, d)


@between(refused(*TOKENS))
def difference_of_neighbours(m, x, ids, mask):
    return x + torch.diff(x, dim=1, append=x[:, -1:])  # <--


@between(refused(*TOKENS))
def loop_over_positions_backwards(m, x, ids, mask):
    columns = list(x.unbind(1))  # <--
    for s in range(len(columns) - 2, -1, -1):
        columns[s] = columns[s] + 0.5 * columns[s + 1]  # <--
    return torch.stack(columns, 1)  # <--


@between(refused(*BOTH))
def loop_over_rows_carrying(m, x, ids, mask):
    rows, carry = [], 0.0
    for row in x:  # <--
        carry = 0.5 * carry + row  # <--
        rows.append(carry)
    return torch.stack(rows)  # <--


@between(refused(*ROWS, "token_mixing"))
def outer_product_of_rows(m, x, ids, mask):
    return x + (x[:, None] * x[None, :]).mean(1)  # <--


# ---------------------------------------------------------------------------------------------------------------------
# Between attentions: batch statistics, sizes, indices
# ---------------------------------------------------------------------------------------------------------------------


@between(refused(*BOTH, "mutation"), module=lambda: nn.BatchNorm1d(HIDDEN))
def batch_norm_training(m, x, ids, mask):
    return x + m.extra(x.transpose(1, 2)).transpose(1, 2)  # <--


@between(refused(*BOTH, "mutation"), module=lambda: nn.BatchNorm1d(HIDDEN))
def batch_norm_of_flat_tokens(m, x, ids, mask):
    return x + m.extra(x.flatten(0, 1)).view_as(x)  # <--


@between(either(*BOTH), module=lambda: nn.BatchNorm1d(HIDDEN).eval())
def batch_norm_eval(m, x, ids, mask):
    return x + m.extra(x.flatten(0, 1)).view_as(x)  # <--


@between(either(*SIZE))
def divide_by_positions(m, x, ids, mask):
    return x / ids.shape[1]  # <--


@between(either(*SIZE))
def times_rows(m, x, ids, mask):
    return x * x.shape[0]  # <--


@between(either(*SIZE))
def divide_by_tokens(m, x, ids, mask):
    return x / (x.numel() / HIDDEN)  # <--


@between(either(*SIZE))
def times_log_positions(m, x, ids, mask):
    return x * math.log(x.size(1) + 1.0)  # <--


@between(either(*SIZE))
def more_than_six_positions(m, x, ids, mask):
    return x * 2 if x.shape[1] > 6 else x - 1


@between(either(*SIZE))
def full_of_positions(m, x, ids, mask):
    return x + torch.full((1, 1, 1), float(x.shape[1]), dtype=x.dtype)  # <--


@between(either(*ROWS, *SIZE, "ambiguous_seed"))
def row_index(m, x, ids, mask):
    return x + torch.arange(x.shape[0])[:, None, None] * 0.1  # <--


@between(PACKS)
def column_index(m, x, ids, mask):
    return x + torch.arange(x.shape[1])[:, None] * 0.1


@between(PACKS)
def position_parity(m, x, ids, mask):
    return torch.where((torch.arange(x.shape[1]) % 2 == 0)[None, :, None], x, -x)


@between(either(*TOKENS, *SIZE), padding="left")
def distance_to_the_end(m, x, ids, mask):
    S = ids.shape[1]
    return x + (S - 1 - torch.arange(S))[:, None] * 0.1  # <--


@between(either(*BOTH, "ambiguous_seed"))
def token_index(m, x, ids, mask):
    return x + torch.arange(ids.numel()).view(*ids.shape, 1) * 0.01  # <--


@between(either("mutation", *BOTH))
def half_of_the_positions(m, x, ids, mask):
    S = x.shape[1]
    x = x.clone()
    x[:, S // 2 :] = x[:, S // 2 :] * 2.0  # <--
    return x


# Computed from data alone, on the dense batch, before the stream: any function is fine, since its result is compared.
@between(PACKS)
def embedding_of_the_next_id(m, x, ids, mask):
    return x + m.embed(ids.roll(-1, dims=1))


@between(PACKS)
def embedding_of_the_id_below(m, x, ids, mask):
    return x + m.embed(ids.roll(1, 0))


@between(either(*BOTH, "nothing_to_pack", "ambiguous_seed"))
def count_of_the_id_in_the_batch(m, x, ids, mask):
    counts = (ids[:, :, None, None] == ids[None, None]).sum((2, 3))
    return x * counts[..., None]


@between(either(*BOTH, "ambiguous_seed"))
def row_mean_of_ids(m, x, ids, mask):
    return x * ids.to(x.dtype).mean(1)[:, None, None]  # <--


@between(either(*BOTH, "ambiguous_seed"))
def batch_mean_of_ids(m, x, ids, mask):
    return x * ids.to(x.dtype).mean()  # <--


# ---------------------------------------------------------------------------------------------------------------------
# Between attentions: gradients, randomness, state, other inputs
# ---------------------------------------------------------------------------------------------------------------------


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.5, 0.5)


class SignGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.sign()


class NormalizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (gradient.norm() + 1.0)


class ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -0.3 * gradient


@between(refused("autograd_function", "unknown_op"))
def clipped_gradient(m, x, ids, mask):
    return ClippedGradient.apply(x)  # <--


@between(refused("autograd_function", "unknown_op"))
def sign_gradient(m, x, ids, mask):
    return x + SignGradient.apply(x)  # <--


@between(refused("autograd_function", "unknown_op"))
def normalized_gradient(m, x, ids, mask):
    return NormalizedGradient.apply(x) * 2  # <--


@between(either("autograd_function", "unknown_op"))
def reversed_gradient(m, x, ids, mask):
    return ReversedGradient.apply(x)  # <--


@between(either("autograd_function", "unknown_op"))
def straight_through(m, x, ids, mask):
    return x + (x.round() - x).detach()


@between(ANYTHING)
def gradient_hook(m, x, ids, mask):
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))  # <--
    return y


@between(ANYTHING)
def gradient_hook_on_a_parameter(m, x, ids, mask):
    return m.extra(x)


CASES["gradient_hook_on_a_parameter"] = dataclasses.replace(
    CASES["gradient_hook_on_a_parameter"], module=lambda: _with_hook(nn.Linear(HIDDEN, HIDDEN))
)


def _halved(gradient):
    return gradient / 2


def _with_hook(linear):
    linear.weight.register_hook(_halved)
    return linear


@between(refused("embedding_gradient", "unknown_op"), embedding={"scale_grad_by_freq": True})
def embedding_scaled_by_frequency(m, x, ids, mask):
    return x


@between(
    refused(
        "embedding_gradient", "unknown_op", "mutation", "no_token_stream", "nothing_to_pack", "ambiguous_seed"
    ),
    embedding={"max_norm": 0.7},
)
def embedding_max_norm(m, x, ids, mask):
    return x


@between(either("embedding_gradient", "unknown_op"), embedding={"sparse": True})
def embedding_sparse(m, x, ids, mask):
    return x


@between(either("embedding_gradient", "unknown_op"), embedding={"padding_idx": 3})
def embedding_padding_index(m, x, ids, mask):
    return x


@between(refused("randomness", "unknown_op"), module=lambda: nn.Dropout(0.3))
def dropout(m, x, ids, mask):
    return m.extra(x)  # <--


@between(PACKS, module=lambda: nn.Dropout(0.3).eval())
def dropout_off(m, x, ids, mask):
    return m.extra(x)


@between(refused("randomness", "unknown_op"), module=lambda: nn.AlphaDropout(0.3))
def dropout_alpha(m, x, ids, mask):
    return m.extra(x)  # <--


@between(refused("randomness", "unknown_op"))
def noise(m, x, ids, mask):
    return x + 0.1 * torch.randn_like(x)  # <--


@between(either("randomness", "unknown_op", "row_mixing", "ambiguous_seed"))
def stochastic_depth(m, x, ids, mask):
    return x * (torch.rand(x.shape[0], 1, 1) > 0.5)  # <--


@between(refused("randomness", "unknown_op"))
def random_relu(m, x, ids, mask):
    return F.rrelu(x, training=True)  # <--


@between(refused("mutation", *BOTH))
def running_mean(m, x, ids, mask):
    m.state.mul_(0.9).add_(x.detach().mean((0, 1)))  # <--
    return x + m.state


@between(refused("mutation", *BOTH))
def buffer_overwritten(m, x, ids, mask):
    m.state.copy_(x.detach()[-1, -1])  # <--
    return x * m.state.sigmoid()


@between(either("mutation", *BOTH))
def running_mean_unused(m, x, ids, mask):
    m.state.mul_(0.9).add_(x.detach().mean((0, 1)))  # <--
    return x


@between(either("mutation", *BOTH, "ambiguous_seed"), inputs=lambda batch: (batch.input_ids.clone(),))
def input_overwritten(m, x, ids, mask, others):
    others[:, 0] = 5  # <--
    return x + m.embed(others)


@between(either("mutation", *BOTH))
def first_position_overwritten(m, x, ids, mask):
    y = x * 1.0
    y[:, 0] = 0.5  # <--
    return y


@between(either("mutation", *BOTH))
def last_position_overwritten(m, x, ids, mask):
    y = x * 1.0
    y[:, -1] = y[:, 0]  # <--
    return y


@between(refused("mutation", *BOTH))
def last_row_overwritten(m, x, ids, mask):
    y = x * 1.0
    y[-1].mul_(2.0)  # <--
    return y


@between(either("mutation", "unknown_op"))
def feature_overwritten(m, x, ids, mask):
    y = x * 1.0
    y[..., 0] = 0.5
    return y


@between(either("mutation", "unknown_op"))
def pointwise_in_place(m, x, ids, mask):
    y = x * 1.0
    y += 1.0
    return y.mul_(m.state.cos()).tanh_()


@between(either("mutation", "unknown_op"))
def in_place_through_a_view(m, x, ids, mask):
    y = x * 1.0
    left = y[..., : HIDDEN // 2]
    left.mul_(3.0)
    return y


@between(
    either("ambiguous_seed", "unknown_op"),
    inputs=lambda batch: (torch.randn(*batch.input_ids.shape, HIDDEN, dtype=torch.float64).requires_grad_(),),
)
def float_input_with_gradient(m, x, ids, mask, features):
    return x + features  # <--


@between(
    either("ambiguous_seed", "unknown_op"),
    # Equal where ids are equal: values alone would allow sharing, the gradient of every copy is still its own.
    inputs=lambda batch: (
        (batch.input_ids[..., None] * torch.ones(HIDDEN, dtype=torch.float64)).requires_grad_(),
    ),
)
def float_input_with_gradient_equal_values(m, x, ids, mask, features):
    return x * features  # <--


@between(
    either("ambiguous_seed", "unknown_op"),
    inputs=lambda batch: (torch.randn(*batch.input_ids.shape, HIDDEN, dtype=torch.float64),),
)
def float_input(m, x, ids, mask, features):
    return x + features  # <--


@between(
    either("ambiguous_seed", *ROWS),
    inputs=lambda batch: (
        torch.randn(batch.input_ids.shape[0], 1, HIDDEN, dtype=torch.float64).requires_grad_(),
    ),
)
def row_vector_with_gradient(m, x, ids, mask, vector):
    return x + vector  # <--


@between(
    either("ambiguous_seed", *ROWS),
    inputs=lambda batch: (torch.randn(batch.input_ids.shape[0], dtype=torch.float64),),
)
def row_scale(m, x, ids, mask, scale):
    return x * scale[:, None, None]  # <--


@between(
    either("ambiguous_seed", "unknown_op"),
    inputs=lambda batch: (torch.where(batch.input_ids > 5, -0.0, 0.0).double(),),
)
def signed_zeros(m, x, ids, mask, column):
    return x + torch.copysign(torch.ones_like(column), column)[..., None]


@between(
    either("ambiguous_seed", "unknown_op"),
    inputs=lambda batch: (torch.where(batch.input_ids > 11, float("nan"), 1.0).double(),),
)
def nan_column(m, x, ids, mask, column):
    return x * column.nan_to_num(2.0)[..., None]


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def scores_of(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def _masked_scores(q, k):
    return scores_of(q, k).masked_fill(~causal_mask(q.shape[-2]), float("-inf"))


def causal_mask(S):
    return torch.ones(S, S, dtype=torch.bool).tril()


@attention(PACKS)
def plain_causal(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2])
    return scores_of(q, k).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL))
def sdpa_without_mask(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k, v)  # <--


@attention(refused(*NOT_CAUSAL))
def softmax_without_mask(m, q, k, v, ids, mask):
    return scores_of(q, k).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL), padding="right")
def padding_mask_only(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())


@attention(refused(*NOT_CAUSAL))
def sees_the_next_token(m, q, k, v, ids, mask):
    allowed = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(diagonal=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*NOT_CAUSAL))
def sees_the_next_token_by_index(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=index[:, None] + 1 >= index)


@attention(either(*NOT_CAUSAL, "fully_masked_query"))
def sees_only_the_past(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=index[:, None] > index)


@attention(refused(*NOT_CAUSAL, "finite_mask", "fully_masked_query"))
def sees_only_the_past_by_lowest(m, q, k, v, ids, mask):
    # The first query is masked everywhere: it attends to all keys alike, the future included.
    scores = scores_of(q, k)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~causal_mask(q.shape[-2]).tril(-1), lowest).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "finite_mask", "fully_masked_query"))
def triu_zero(m, q, k, v, ids, mask):
    S = q.shape[-2]
    additive = torch.triu(torch.full((S, S), torch.finfo(q.dtype).min, dtype=q.dtype), diagonal=0)
    return (scores_of(q, k) + additive).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL))
def sees_only_the_future(m, q, k, v, ids, mask):
    S = q.shape[-2]
    additive = torch.tril(torch.full((S, S), float("-inf"), dtype=q.dtype), diagonal=-1)
    return (scores_of(q, k) + additive).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL))
def transposed_mask(m, q, k, v, ids, mask):
    return scores_of(q, k).masked_fill(~causal_mask(q.shape[-2]).T, float("-inf")).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "mutation", "unknown_op"), min_positions=2)
def one_future_entry(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2])
    allowed[0, -1] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def additive_causal(q):
    size = q.shape[-2]
    return torch.zeros(size, size, dtype=q.dtype).masked_fill(~causal_mask(size), float("-inf"))


@attention(refused(*NOT_CAUSAL, "mutation", "unknown_op"), min_positions=2)
def one_future_entry_of_an_additive_mask(m, q, k, v, ids, mask):
    added = additive_causal(q)
    added[0, -1] = 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


@attention(refused(*NOT_CAUSAL, "mutation", "unknown_op"), min_positions=2)
def one_future_entry_of_a_sum_of_masks(m, q, k, v, ids, mask):
    added = additive_causal(q) + additive_causal(q)
    added.view(-1)[1:2].zero_()
    return (scores_of(q, k) + added).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "mutation", "unknown_op"), min_positions=2)
def future_entries_through_a_view_that_no_schema_tells(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2])
    torch.atleast_3d(allowed).fill_(True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def one_future_entry_by_index(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    allowed = (index[:, None] >= index) | ((index[:, None] == 1) & (index == 4))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(either(*NOT_CAUSAL, "unknown_op"))
def one_past_entry_missing(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    allowed = (index[:, None] >= index) & ~((index[:, None] == 3) & (index == 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def causal_for_few_positions_only(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    allowed = (index[:, None] >= index) | (index - index[:, None] > 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def buffer_causal_for_few_positions_only(m, q, k, v, ids, mask):
    S = q.shape[-2]
    allowed = (m.table.abs() < 9).tril() | (torch.arange(LONGEST) == 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:S, :S])


@attention(refused(*NOT_CAUSAL, "unknown_op", "row_mixing"))
def first_head_sees_everything(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2]) | (torch.arange(HEADS) == 0)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*NOT_CAUSAL, "unknown_op", "row_mixing"))
def first_row_sees_everything(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2]) | (torch.arange(q.shape[0]) == 0)[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused("finite_mask", *NOT_CAUSAL))
def finite_mask_minus_ten(m, q, k, v, ids, mask):
    return scores_of(q, k).masked_fill(~causal_mask(q.shape[-2]), -10.0).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def finite_mask_minus_ten_thousand(m, q, k, v, ids, mask):
    additive = (1.0 - causal_mask(q.shape[-2]).to(q.dtype)) * -10000.0
    return (scores_of(q, k) + additive).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def finite_mask_minus_1e9(m, q, k, v, ids, mask):
    return torch.where(causal_mask(q.shape[-2]), scores_of(q, k), -1e9).softmax(-1) @ v


@attention(PACKS)
def lowest_scaled_down(m, q, k, v, ids, mask):
    masked = (q @ k.mT).masked_fill(~causal_mask(q.shape[-2]), torch.finfo(q.dtype).min)
    return (masked / 3).softmax(-1) @ v


@attention(either("finite_mask"))
def lowest_scaled_up(m, q, k, v, ids, mask):
    masked = (q @ k.mT).masked_fill(~causal_mask(q.shape[-2]), torch.finfo(q.dtype).min)
    return (masked * 3).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def lowest_scaled_to_a_bias(m, q, k, v, ids, mask):
    masked = (q @ k.mT).masked_fill(~causal_mask(q.shape[-2]), torch.finfo(q.dtype).min)
    return (masked * 1e-307).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def finite_mask_in_sdpa(m, q, k, v, ids, mask):
    S = q.shape[-2]
    additive = torch.full((S, S), -5.0, dtype=q.dtype).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive)


@attention(refused("finite_mask", *NOT_CAUSAL))
def lowest_of_another_dtype(m, q, k, v, ids, mask):
    # What is -inf to float16 is a bias in float64.
    lowest = torch.finfo(torch.float16).min
    return scores_of(q, k).masked_fill(~causal_mask(q.shape[-2]), lowest).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def mask_by_multiplication(m, q, k, v, ids, mask):
    return (scores_of(q, k) * causal_mask(q.shape[-2])).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "finite_mask"))
def masked_with_zero(m, q, k, v, ids, mask):
    return scores_of(q, k).masked_fill(~causal_mask(q.shape[-2]), 0.0).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def masked_after_softmax(m, q, k, v, ids, mask):
    return scores_of(q, k).softmax(-1).tril() @ v


@attention(either(*NOT_CAUSAL, "unknown_op"))
def renormalised_after_softmax(m, q, k, v, ids, mask):
    weights = scores_of(q, k).softmax(-1) * causal_mask(q.shape[-2])
    return weights / weights.sum(-1, keepdim=True) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def second_softmax(m, q, k, v, ids, mask):
    weights = _masked_scores(q, k).softmax(-1)
    return weights.softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def softmax_over_queries(m, q, k, v, ids, mask):
    return _masked_scores(q, k).softmax(-2) @ v


@attention(either(*NOT_CAUSAL, "unknown_op"))
def softmax_over_heads(m, q, k, v, ids, mask):
    return scores_of(q, k).softmax(1) * causal_mask(q.shape[-2]) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def weights_plus_constant(m, q, k, v, ids, mask):
    weights = _masked_scores(q, k).softmax(-1)
    return (weights + 0.01) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def weights_minus_mean(m, q, k, v, ids, mask):
    weights = _masked_scores(q, k).softmax(-1)
    return (weights - weights.mean(-1, keepdim=True)) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def largest_scores_only(m, q, k, v, ids, mask):
    scores = scores_of(q, k)
    lowest_kept = scores.topk(2, dim=-1).values[..., -1:]
    scores = scores.masked_fill(scores < lowest_kept, float("-inf"))
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1).nan_to_num() @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def scores_minus_maximum_of_everything(m, q, k, v, ids, mask):
    scores = scores_of(q, k)
    scores = scores / scores.abs().amax((-2, -1), keepdim=True)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(refused(*NOT_CAUSAL, "unknown_op"))
def talking_positions(m, q, k, v, ids, mask):
    S = q.shape[-2]
    weights = scores_of(q, k).masked_fill(~causal_mask(S), float("-inf")).softmax(-1)
    return m.table[:S, :S] @ weights @ v


@attention(either(*NOT_CAUSAL, "unknown_op"))
def talking_heads(m, q, k, v, ids, mask):
    scores = torch.einsum("nhqk,gh->ngqk", scores_of(q, k), m.table[:HEADS, :HEADS])
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL))
def attention_over_rows(m, q, k, v, ids, mask):
    q, k, v = (t.permute(2, 1, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 1, 0, 3)


@attention(refused(*BOTH, *NOT_CAUSAL))
def attention_over_heads(m, q, k, v, ids, mask):
    # "Positions" are the heads here, and causal among them: each token by itself. Fine, but no token attention.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return y + y.mean(2, keepdim=True)


@attention(either(*BOTH, *NOT_CAUSAL))
def attention_over_heads_only(m, q, k, v, ids, mask):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@attention(refused(*BOTH, *NOT_CAUSAL))
def rows_as_one_sequence(m, q, k, v, ids, mask):
    N, H, S, D = q.shape
    q, k, v = (t.transpose(0, 1).reshape(1, H, N * S, D) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).view(H, N, S, D).transpose(0, 1)


@attention(refused(*BOTH, *NOT_CAUSAL))
def keys_of_the_first_row(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:1].expand_as(v), is_causal=True)


@attention(refused(*BOTH, *NOT_CAUSAL))
def keys_of_the_next_row(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k.roll(1, 0), v, is_causal=True)  # <--


@attention(refused(*BOTH, *NOT_CAUSAL))
def keys_shifted(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k.roll(-1, 2), v.roll(-1, 2), is_causal=True)  # <--


@attention(refused(*BOTH, *NOT_CAUSAL))
def values_flipped(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k, v.flip(-2), is_causal=True)  # <--


@attention(refused(*BOTH, *NOT_CAUSAL))
def last_query_for_all(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q[:, :, -1:], k, v).expand_as(q)  # <--


@attention(refused(*BOTH, *NOT_CAUSAL), min_positions=2)
def compressed_keys(m, q, k, v, ids, mask):
    k, v = k[:, :, ::2] + k[:, :, -1:], v[:, :, ::2]  # <--
    return F.scaled_dot_product_attention(q, k, v)


@attention(either(*BOTH, *NOT_CAUSAL))
def sink_key_in_front(m, q, k, v, ids, mask):
    # is_causal aligns to the top left: with one key in front, each token sees one token less.
    k, v = (torch.cat([torch.zeros_like(t[:, :, :1]), t], 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@attention(refused(*BOTH, *NOT_CAUSAL))
def causal_by_data(m, q, k, v, ids, mask):
    allowed = ids[:, None, :, None] >= ids[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(refused(*BOTH, *NOT_CAUSAL), inputs=lambda batch: (batch.dense_positions.flip(1),))
def causal_by_descending_positions(m, q, k, v, ids, mask, positions):
    allowed = positions[:, None, :, None] >= positions[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(either(*BOTH, *NOT_CAUSAL))
def same_token_only(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2]) & (ids[:, None, :, None] == ids[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(either(*BOTH, *NOT_CAUSAL), inputs=lambda batch: (batch.input_ids[:, 0] % 3 + 1,))
def prefix_lm(m, q, k, v, ids, mask, prefix):
    index = torch.arange(q.shape[-2])
    allowed = (index[:, None] >= index) | (index[None, None, None] < prefix[:, None, None, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@attention(either(*BOTH, *NOT_CAUSAL))
def window_of_three(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    distance = index[:, None] - index
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 3))


@attention(refused(*BOTH, *NOT_CAUSAL))
def window_of_three_both_ways(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(index[:, None] - index).abs() < 3)


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_by_distance(m, q, k, v, ids, mask):
    index = torch.arange(q.shape[-2])
    distance = (index - index[:, None]).to(q.dtype)
    scores = scores_of(q, k) + 0.3 * distance
    return scores.masked_fill(distance > 0, float("-inf")).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL, "finite_mask"))
def bias_by_absolute_indices(m, q, k, v, ids, mask):
    S = q.shape[-2]
    scores = scores_of(q, k) + m.table[:S, :S]
    return scores.masked_fill(~causal_mask(S), float("-inf")).softmax(-1) @ v


@attention(
    either(*BOTH, *NOT_CAUSAL),
    inputs=lambda batch: (torch.randn(16, 16, dtype=torch.float64).requires_grad_(),),
)
def bias_with_gradient(m, q, k, v, ids, mask, bias):
    S = q.shape[-2]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[:S, :S] + torch.full((S, S), -torch.inf).triu(1)
    )


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_by_length(m, q, k, v, ids, mask):
    S = q.shape[-2]
    scores = scores_of(q, k) * math.log(S + 1.0)
    return scores.masked_fill(~causal_mask(S), float("-inf")).softmax(-1) @ v


# Biases of keys (ALiBi).
def slopes():
    return torch.tensor([0.9, -0.3, 0.2, 0.05], dtype=torch.float64)[:, None, None]


def indices(x):
    return torch.arange(x.shape[-2], dtype=x.dtype)


@attention(PACKS)
def bias_of_keys(m, q, k, v, ids, mask):
    scores = scores_of(q, k) + slopes() * indices(k)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def bias_of_keys_for_all_heads(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (0.3 * indices(k) + scores).softmax(-1) @ v


@attention(PACKS)
def bias_of_keys_then_scaled(m, q, k, v, ids, mask):
    scores = -2 * (q @ k.mT + slopes() * indices(k)) / 3
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def bias_of_keys_then_capped(m, q, k, v, ids, mask):
    scores = torch.tanh((scores_of(q, k) + slopes() * indices(k)) / 3) * -2
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_of_keys_to_capped_scores(m, q, k, v, ids, mask):
    scores = torch.tanh(scores_of(q, k) / 3) * 3 + slopes() * indices(k)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_of_keys_alone(m, q, k, v, ids, mask):
    scores = scores_of(q, k) * 0 + slopes() * indices(k)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def two_biases_of_keys(m, q, k, v, ids, mask):
    scores = scores_of(q, k) + slopes() * indices(k) + indices(k).cos()
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_of_queries(m, q, k, v, ids, mask):
    scores = scores_of(q, k) + slopes() * indices(q)[:, None]
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS, padding="left")
def bias_of_keys_from_padding(m, q, k, v, ids, mask):
    count = ((mask.cumsum(-1) - 1) * mask)[:, None].double()
    bias = (slopes() * count[:, None]).reshape(-1, 1, q.shape[-2])
    scores = bias.baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.7, alpha=0.4).view(
        -1, HEADS, *[q.shape[-2]] * 2
    )
    allowed = causal_mask(q.shape[-2]) & mask[:, None, None].bool()
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights.view(-1, *weights.shape[2:]) @ v.flatten(0, 1)).view(v.shape)


@attention(PACKS, padding="right")
def finite_bias_of_padding(m, q, k, v, ids, mask):
    scores = scores_of(q, k) + (1.0 - mask[:, None, None].double()) * -7.0
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def bias_of_keys_in_the_mask(m, q, k, v, ids, mask):
    bias = (slopes() * indices(k))[None]
    additive = bias.masked_fill(~causal_mask(q.shape[-2]), torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive)


@attention(PACKS)
def bias_of_keys_added_to_the_mask(m, q, k, v, ids, mask):
    additive = torch.where(causal_mask(q.shape[-2]), 0.0, -torch.inf) + slopes() * indices(k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=0.1)


@attention(WRITTEN)
def bias_of_keys_written_behind_the_mask(m, q, k, v, ids, mask):
    bias = slopes() * indices(k)
    additive = torch.where(causal_mask(q.shape[-2]), 0.0, -torch.inf) + bias
    bias.mul_(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive) + 0 * bias.sum()


@attention(
    PACKS,
    inputs=lambda batch: (
        torch.randn(1, HEADS, 1, batch.input_ids.shape[1], dtype=torch.float64).requires_grad_(),
    ),
)
def bias_of_keys_with_gradient(m, q, k, v, ids, mask, bias):
    scores = scores_of(q, k) + bias
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS, module=lambda: nn.Linear(1, HEADS, bias=False))
def bias_of_keys_with_sinks(m, q, k, v, ids, mask):
    joined = _with_sinks(q, k, m.extra.weight[None, :, :, None], slopes() * indices(k))
    return joined.softmax(-1)[..., :-1] @ v


@attention(PACKS)
def bias_of_keys_that_groups_of_heads_share(m, q, k, v, ids, mask):
    k, v = (x[:, ::2].repeat_interleave(2, 1) for x in (k, v))
    additive = torch.where(causal_mask(q.shape[-2]), 0.0, -torch.inf) + slopes() * indices(k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive)


@attention(PACKS)
def bias_of_keys_without_heads_that_groups_share(m, q, k, v, ids, mask):
    k, v = (x[:, ::2].repeat_interleave(2, 1) for x in (k, v))
    additive = torch.where(causal_mask(q.shape[-2]), 0.0, -torch.inf) + 0.3 * indices(k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive)


def half_precision_mask(allowed):
    return torch.zeros(allowed.shape, dtype=torch.float16).masked_fill(~allowed, -65504)


@attention(refused("finite_mask", *NOT_CAUSAL))
def lowest_of_a_smaller_type_scaled_down(m, q, k, v, ids, mask):
    return ((scores_of(q, k) + half_precision_mask(causal_mask(q.shape[-2]))) / 20000).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def lowest_of_a_smaller_type_below_a_bias(m, q, k, v, ids, mask):
    scores = scores_of(q, k) + half_precision_mask(causal_mask(q.shape[-2])) + indices(k) * 1e5
    return scores.softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL))
def lowest_scaled_down_below_a_bias(m, q, k, v, ids, mask):
    scores = (q @ k.mT * 1e150).masked_fill(~causal_mask(q.shape[-2]), torch.finfo(q.dtype).min) * 1e-150
    return (scores + indices(k) * 1e160).softmax(-1) @ v


@attention(refused("finite_mask", *NOT_CAUSAL), padding="left")
def lowest_scaled_up_and_down(m, q, k, v, ids, mask):
    """It overflows: padding, which sees nothing, is NaN."""
    allowed = causal_mask(q.shape[-2]) & mask[:, None, None].bool()
    return (scores_of(q, k).masked_fill(~allowed, torch.finfo(q.dtype).min) * 4 / 4).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_of_keys_of_another_rank(m, q, k, v, ids, mask):
    scores = q[:, 0] @ k[:, 0].mT + indices(k)[None, None, None]
    weights = scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1)
    return (weights @ v[:, 0])[0, :, None].expand_as(v)


@attention(either(*BOTH, *NOT_CAUSAL))
def bias_of_keys_that_makes_heads(m, q, k, v, ids, mask):
    scores = scores_of(q[:, :1], k[:, :1]) + slopes() * indices(k)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v[:, :1]


@attention(
    refused(*NOT_CAUSAL),
    padding="right",
    inputs=lambda batch: (batch.attention_mask.double().log() * 0,),
)
def bias_of_keys_that_is_nan_at_padding(m, q, k, v, ids, mask, bias):
    """What is dropped isn't harmless: every query of such a row adds it to a masked score."""
    allowed = causal_mask(q.shape[-2]) & mask[:, None, None].bool()
    return (scores_of(q, k).masked_fill(~allowed, float("-inf")) + bias[:, None, None]).softmax(-1) @ v


def signs(batch):
    rows, positions = batch.input_ids.shape
    return (
        torch.ones(rows, HEADS, 1, positions).double() * (-1.0) ** torch.arange(rows)[:, None, None, None],
    )


@attention(PACKS, inputs=signs)
def bias_of_keys_of_opposite_signs(m, q, k, v, ids, mask, bias):
    """Flipping the sign bits of two entries must change a token's fingerprint."""
    scores = scores_of(q, k) + bias
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def bias_of_keys_that_heads_share(m, q, k, v, ids, mask):
    scores = scores_of(q, k[:, :1]) + slopes() * indices(k)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v[:, :1]


@attention(PACKS)
def scores_soft_capped(m, q, k, v, ids, mask):
    scores = 5 * torch.tanh(scores_of(q, k) / 5)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def scores_soft_capped_and_turned_around(m, q, k, v, ids, mask):
    scores = (scores_of(q, k) * 0.2).tanh() * -3
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL, "finite_mask"))
def scores_soft_capped_after_the_mask(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (5 * torch.tanh(scores / 5)).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def scores_soft_capped_twice(m, q, k, v, ids, mask):
    scores = 2 * torch.tanh(5 * torch.tanh(scores_of(q, k) / 5))
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def scores_less_their_maximum(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL))
def scores_less_the_maximum_over_queries(m, q, k, v, ids, mask):
    scores = scores_of(q, k)
    scores = scores - scores.max(-2, keepdim=True).values  # <--
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


def _with_sinks(q, k, sinks, bias=None):
    scores = scores_of(q, k) if bias is None else scores_of(q, k) + bias
    scores = scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf"))
    return torch.cat([scores, sinks.expand(q.shape[0], -1, q.shape[-2], 1)], -1)


@attention(PACKS, module=lambda: nn.Linear(1, HEADS, bias=False))
def sinks(m, q, k, v, ids, mask):
    scores = _with_sinks(q, k, m.extra.weight[None, :, :, None])
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


@attention(PACKS, module=lambda: nn.Linear(1, HEADS, bias=False))
def sinks_computed_from_parameters(m, q, k, v, ids, mask):
    sinks = m.extra.weight.square().reshape(1, -1, 1, 1)
    return _with_sinks(q, k, sinks).softmax(-1)[..., : q.shape[-2]] @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def sinks_computed_from_queries(m, q, k, v, ids, mask):
    return _with_sinks(q, k, q.sum(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


@attention(either(*BOTH, *NOT_CAUSAL), module=lambda: nn.Linear(1, 1, bias=False))
def one_sink_for_all_heads(m, q, k, v, ids, mask):
    return _with_sinks(q, k, m.extra.weight[None, None].expand(1, HEADS, 1, 1)).softmax(-1)[..., :-1] @ v


@attention(refused(*BOTH, *NOT_CAUSAL))
def sinks_computed_from_all_queries(m, q, k, v, ids, mask):
    return _with_sinks(q, k, q.mean((0, 2, 3), keepdim=True)).softmax(-1)[..., :-1] @ v


@attention(refused(*BOTH, *NOT_CAUSAL), module=lambda: nn.Linear(1, HEADS, bias=False))
def sinks_and_another_column_cut_off(m, q, k, v, ids, mask):
    return _with_sinks(q, k, m.extra.weight[None, :, :, None]).softmax(-1)[..., 1:] @ v


@attention(refused(*BOTH, *NOT_CAUSAL), module=lambda: nn.Linear(1, LONGEST, bias=False))
def sinks_that_differ_by_position(m, q, k, v, ids, mask):
    sinks = m.extra.weight[: q.shape[-2]].expand(q.shape[0], HEADS, -1, 1)
    scores = _masked_scores(q, k)
    return torch.cat([scores, sinks.flip(2)], -1).softmax(-1)[..., :-1] @ v


SINKS = dict(module=lambda: nn.Linear(1, HEADS, bias=False))


@attention(PACKS, **SINKS)
def sinks_as_a_gate(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    share = (scores.logsumexp(dim=-1) - m.extra.weight.view(1, -1, 1)).to(torch.float64).sigmoid()
    weights = F.dropout(scores.softmax(-1, dtype=torch.float64).to(v.dtype), p=0.0)
    return (weights @ v) * share.unsqueeze(-1).to(v.dtype)


@attention(PACKS, padding="left", **SINKS)
def sinks_as_a_gate_with_the_dim_kept(m, q, k, v, ids, mask):
    allowed = causal_mask(q.shape[-2]) & mask[:, None, None].bool()
    scores = scores_of(q, k).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid() * (scores.softmax(3) @ v)


@attention(PACKS, **SINKS)
def sinks_as_a_gate_in_place(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    output = scores.softmax(-1) @ v
    output *= (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()
    return output


@attention(refused(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_of_other_scores(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * ((scores * 2).logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()


@attention(refused(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_of_a_sum_over_queries(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-2) - m.extra.weight[None]).sigmoid()[..., None]


@attention(either(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_of_what_sinks_take(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * (_sinks(m) - scores.logsumexp(-1, keepdim=True)).sigmoid()


@attention(either(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_with_another_function(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid().sigmoid()


@attention(either(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_with_sinks_that_weigh_more(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores.softmax(-1) @ v) * torch.sub(total, _sinks(m), alpha=2).sigmoid()


@attention(either(*BOTH, *NOT_CAUSAL), module=lambda: nn.Linear(1, HIDDEN // HEADS, bias=False))
def gate_that_differs_by_value(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1, keepdim=True) - m.extra.weight[:, 0]).sigmoid()


@attention(either(*BOTH, *NOT_CAUSAL), **SINKS)
def gate_of_queries(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1) - q.sum(-1)).sigmoid()[..., None]


@attention(PACKS, padding="left")
def scores_raised_to_the_lowest_number(m, q, k, v, ids, mask):
    low = torch.finfo(q.dtype).min
    added = torch.full((q.shape[-2], q.shape[-2]), low, dtype=q.dtype).triu(1)
    added = added.masked_fill(~mask[:, None, None].bool(), low)
    scores = torch.max(scores_of(q, k) + added, torch.full((), low, dtype=q.dtype))
    return scores.flatten(0, 1).softmax(-1).view(-1, HEADS, *q.shape[-2:-1] * 2) @ v


@attention(PACKS)
def scores_clamped_at_the_lowest_number(m, q, k, v, ids, mask):
    return _masked_scores(q, k).clamp(min=torch.finfo(q.dtype).min).softmax(-1) @ v


@attention(PACKS)
def capped_scores_clamped_at_the_lowest_number(m, q, k, v, ids, mask):
    scores = (scores_of(q, k).tanh() * 3).masked_fill(~causal_mask(q.shape[-2]), float("-inf"))
    return torch.maximum(torch.tensor(torch.finfo(q.dtype).min), scores).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL, "finite_mask"))
def scores_clamped_before_the_mask(m, q, k, v, ids, mask):
    scores = scores_of(q, k).clamp(min=torch.finfo(q.dtype).min)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(either(*BOTH, *NOT_CAUSAL))
def heads_made_by_a_maximum(m, q, k, v, ids, mask):
    lowest = torch.full((HEADS, 1, 1), torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.maximum(_masked_scores(q[:, :1], k[:, :1]), lowest).softmax(-1) @ v[:, :1]


@attention(refused(*BOTH, *NOT_CAUSAL))
def scores_clamped_at_a_number(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k).clamp(min=-5.0)  # <--
    return scores.softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL))
def scores_clamped_from_above_too(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k).clamp(torch.finfo(q.dtype).min, 0.1)  # <--
    return scores.softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL, "finite_mask"))
def scores_clamped_and_scaled_away(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k).clamp(min=torch.finfo(q.dtype).min)  # <--
    return (scores * 1e-308).softmax(-1) @ v


# Writes and switches of grad mode between what makes up one softmax.


def _sinks(m):
    return m.extra.weight[None, :, :, None]


@attention(WRITTEN, **SINKS)
def scores_written_before_the_gate(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    output = scores.softmax(-1) @ v
    scores[..., 0] = 1.0
    return output * (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()


@attention(WRITTEN, **SINKS)
def values_written_before_the_gate(m, q, k, v, ids, mask):
    scores, v = _masked_scores(q, k), v.clone()
    output = scores.softmax(-1) @ v
    v.mul_(2)
    return output * (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()


@attention(WRITTEN, **SINKS)
def gate_without_gradient(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    with torch.no_grad():
        gate = (scores.logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()
    return scores.softmax(-1) @ v * gate


@attention(WRITTEN, **SINKS)
def gate_of_detached_scores(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return scores.softmax(-1) @ v * (scores.detach().logsumexp(-1, keepdim=True) - _sinks(m)).sigmoid()


@attention(WRITTEN, padding="right", **SINKS)
def padding_masked_behind_the_sinks(m, q, k, v, ids, mask):
    joined = _with_sinks(q, k, _sinks(m))
    joined[..., :-1].masked_fill_(~mask[:, None, None].bool(), float("-inf"))
    return joined.softmax(-1)[..., :-1] @ v


@attention(WRITTEN, **SINKS)
def scores_written_behind_the_sinks(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    joined = torch.cat([scores, _sinks(m).expand(q.shape[0], -1, q.shape[-2], 1)], -1)
    scores.mul_(2)
    return joined.softmax(-1)[..., :-1] @ v


@attention(WRITTEN, **SINKS)
def sinks_written(m, q, k, v, ids, mask):
    joined = _with_sinks(q, k, _sinks(m))
    joined[..., -1] = joined[..., -1] * 2
    return joined.softmax(-1)[..., :-1] @ v


@attention(WRITTEN, **SINKS)
def weights_written_before_the_sink_is_cut_off(m, q, k, v, ids, mask):
    with torch.no_grad():
        weights = _with_sinks(q, k, _sinks(m)).softmax(-1)
        weights[..., 0] = 0.5
        return weights[..., :-1] @ v


@attention(WRITTEN)
def scores_written_after_the_maximum(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    less = scores - scores.max(-1, keepdim=True).values
    scores.mul_(2)
    less[..., 0] = less[..., 0] + 3
    return less.softmax(-1) @ v


@attention(WRITTEN)
def maximum_without_gradient(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    with torch.no_grad():
        less = scores - scores.amax(-1, keepdim=True)
    return less.softmax(-1) @ v


@attention(WRITTEN, **SINKS)
def sinks_joined_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        joined = _with_sinks(q, k, _sinks(m))
    return joined.softmax(-1)[..., :-1] @ v


@attention(WRITTEN, **SINKS)
def weights_with_sinks_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        weights = _with_sinks(q, k, _sinks(m)).softmax(-1)
    return weights[..., :-1] @ v


@attention(WRITTEN)
def scores_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        scores = _masked_scores(q, k)
    return scores.softmax(-1) @ v


@attention(WRITTEN)
def weights_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        weights = _masked_scores(q, k).softmax(-1)
    return weights @ v


@attention(WRITTEN)
def scores_capped_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        scores = 5 * torch.tanh(scores_of(q, k) / 5)
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(PACKS)
def mask_made_without_gradient(m, q, k, v, ids, mask):
    with torch.no_grad():
        hidden = ~causal_mask(q.shape[-2])
    return scores_of(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@attention(WRITTEN)
def keys_repeated_without_gradient(m, q, k, v, ids, mask):
    few = k[:, :2]
    with torch.no_grad():
        k = few.repeat_interleave(HEADS // 2, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@attention(WRITTEN)
def values_expanded_without_gradient(m, q, k, v, ids, mask):
    few = v[:, :2]
    with torch.no_grad():
        v = few.unsqueeze(2).expand(-1, -1, HEADS // 2, -1, -1).reshape(v.shape)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@attention(either(*BOTH, *NOT_CAUSAL))
def queries_and_keys_swapped(m, q, k, v, ids, mask):
    return scores_of(k, q).masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v


@attention(refused(*BOTH, *NOT_CAUSAL))
def scores_transposed(m, q, k, v, ids, mask):
    scores = _masked_scores(q, k)
    return scores.mT.softmax(-1) @ v


@attention(refused("randomness", *NOT_CAUSAL))
def dropout_inside_sdpa(m, q, k, v, ids, mask):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)  # <--


@attention(refused("randomness", *NOT_CAUSAL))
def dropout_on_the_weights(m, q, k, v, ids, mask):
    weights = _masked_scores(q, k).softmax(-1)
    return F.dropout(weights, 0.3, training=True) @ v  # <--


def _square_mask(batch):
    S = batch.input_ids.shape[1]
    return causal_mask(S).expand(batch.input_ids.shape[0], 1, S, S).clone()


@attention(either(*BOTH, *NOT_CAUSAL), inputs=lambda batch: (_square_mask(batch),))
def callers_mask_causal(m, q, k, v, ids, mask, square):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=square)


@attention(refused(*BOTH, *NOT_CAUSAL), inputs=lambda batch: (torch.ones_like(_square_mask(batch)),))
def callers_mask_full(m, q, k, v, ids, mask, square):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=square)


@attention(
    refused(*BOTH, *NOT_CAUSAL),
    inputs=lambda batch: (_square_mask(batch).index_fill(3, torch.tensor(-1), True),),
)
def callers_mask_causal_but_for_the_last_key(m, q, k, v, ids, mask, square):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=square)


@attention(
    refused(*BOTH, *NOT_CAUSAL), inputs=lambda batch: (torch.where(_square_mask(batch), 0.0, -3.0).double(),)
)
def callers_mask_finite(m, q, k, v, ids, mask, square):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=square)


# ---------------------------------------------------------------------------------------------------------------------
# After the last attention: mixing tokens is legitimate
# ---------------------------------------------------------------------------------------------------------------------


@hidden(PACKS)
def late_shift(m, x, ids, mask):
    return x[:, 1:] - x[:, :-1]


@hidden(PACKS)
def late_mean_pooling(m, x, ids, mask):
    return x.mean(1)


@hidden(PACKS, padding="right")
def late_masked_mean_pooling(m, x, ids, mask):
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


@hidden(PACKS, padding="right")
def late_last_token_by_length(m, x, ids, mask):
    last = (mask.sum(1) - 1).clamp(min=0)
    return x[torch.arange(x.shape[0]), last]


@hidden(PACKS)
def late_last_position(m, x, ids, mask):
    return x[:, -1]


@hidden(PACKS)
def late_few_positions(m, x, ids, mask):
    return x[:, -3:, :]


@hidden(PACKS)
def late_flip(m, x, ids, mask):
    return x.flip(1)


@hidden(either("mutation", *BOTH), module=lambda: nn.BatchNorm1d(HIDDEN))
def late_batch_norm(m, x, ids, mask):
    return m.extra(x.transpose(1, 2)).transpose(1, 2)  # <--


@hidden(either(*TOKENS), module=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1))
def late_conv(m, x, ids, mask):
    return m.extra(x.transpose(1, 2)).transpose(1, 2)  # <--


@logits(PACKS)
def late_difference_of_logits(m, y, ids, mask):
    return y[:, 1:] - y[:, :-1]


@logits(PACKS)
def loss_mean(m, y, ids, mask):
    return F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@logits(PACKS)
def loss_and_logits(m, y, ids, mask):
    return F.cross_entropy(y[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)), y


@logits(PACKS, padding="right")
def loss_with_ignored_pads(m, y, ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(y.view(-1, VOCAB), labels.reshape(-1), ignore_index=-100, reduction="sum")


@logits(PACKS)
def loss_with_label_smoothing(m, y, ids, mask):
    return F.cross_entropy(y.transpose(1, 2), ids.roll(-1, 1), label_smoothing=0.1)


@logits(PACKS, inputs=lambda batch: (torch.randint(VOCAB, batch.input_ids.shape),))
def loss_with_labels_that_share_nothing(m, y, ids, mask, labels):
    return F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


@logits(PACKS, inputs=lambda batch: (torch.rand(VOCAB, dtype=torch.float64),))
def loss_with_class_weights(m, y, ids, mask, weight):
    return F.cross_entropy(y.flatten(0, 1), ids.flatten(), weight=weight)


@logits(PACKS)
def entropy_mean(m, y, ids, mask):
    log_probs = y.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


@logits(PACKS)
def log_probs_by_row(m, y, ids, mask):
    rows = [row.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for row, labels in zip(y, ids, strict=True)]
    return torch.stack(rows)


@logits(PACKS)
def log_probs_by_logsumexp(m, y, ids, mask):
    chosen = y[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return chosen - torch.stack([row.logsumexp(-1) for row in y[:, :-1]])


@logits(PACKS, inputs=lambda batch: (torch.randn(batch.input_ids.shape[0], 1, dtype=torch.float64),))
def policy_gradient(m, y, ids, mask, advantages):
    log_probs = y[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio = (log_probs - log_probs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(1).mean()


@logits(PACKS)
def returns_to_go(m, y, ids, mask):
    log_probs = y.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return log_probs.flip(1).cumsum(1).flip(1)


@logits(PACKS)
def normalised_over_the_batch(m, y, ids, mask):
    values = y[..., 0]
    return (values - values.mean()) / (values.std() + 1e-3)


@logits(PACKS)
def sorted_values(m, y, ids, mask):
    return y[..., 0].sort(dim=1).values


@logits(PACKS)
def most_likely_token(m, y, ids, mask):
    return y.argmax(-1), y.amax(-1), (y.argmax(-1) == ids).sum()


@logits(either(*BOTH))
def z_loss_and_balance(m, y, ids, mask):
    return y.logsumexp(-1).pow(2).mean(), y.softmax(-1).mean((0, 1)).pow(2).sum()


@logits(either(*BOTH))
def logits_mixed_over_positions(m, y, ids, mask):
    return y + y.roll(1, 1) + y.mean(0)


@logits(either(*SIZE))
def loss_divided_by_sizes(m, y, ids, mask):
    return F.cross_entropy(y.flatten(0, 1), ids.flatten(), reduction="sum") / (ids.shape[0] * ids.shape[1])


@logits(either("unknown_op", *BOTH))
def gradient_of_each_copy_differs(m, y, ids, mask):
    """The weights of a shared token's copies differ in sign and size, some are zero."""
    weights = torch.arange(ids.numel()).view(ids.shape) % 5 - 2
    return (y.log_softmax(-1)[..., 0] * weights).sum()


@logits(refused("row_layout", "size_as_number", "unknown_op"), min_positions=2)
def memory_around_a_slice(m, y, ids, mask):
    return y[:, :1].as_strided(y.shape, y.stride())


@logits(either("mutation", *BOTH))
def shape_changed_in_place(m, y, ids, mask):
    changed = y.cumsum(1)
    view = changed[:, :1]
    changed.unsqueeze_(1)
    return view.sum(), changed


@logits(either("mutation", *BOTH))
def written_through_the_second_of_two_views(m, y, ids, mask):
    first, second = y.sum((1, 2)), y.sum((0, 2))
    _, grid = torch.meshgrid(first, second, indexing="ij")
    second.mul_(3)
    return grid.sum(), first.sum()


@logits(either("mutation", *BOTH))
def written_through_an_unsafe_chunk(m, y, ids, mask):
    changed = y.exp()
    changed.unsafe_chunk(2, -1)[0].mul_(3)
    return changed


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))


@hidden(refused("mutation", "unknown_op"), module=Statistics)
def running_statistics_of_the_ids(m, x, ids, mask):
    normed = F.batch_norm(ids.to(x)[:, None], m.extra.mean, m.extra.var, training=True)
    return x * normed[:, 0, :, None]
