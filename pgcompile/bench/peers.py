"""Others that share prefixes, each used as its authors say, or as well as an engineer would by hand.

They are told the groups, which pgcompile has to find. All get the log-probabilities of the same answer tokens from the
logits of the tokens that predict one, each once. What a data loader can prepare isn't part of the timed call: the
packed ids, and TRL's trie. What needs the device and belongs to one batch is: block masks, Prefix Grouper's input.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .cases import Batch
from .models import Model

Run = Callable[[], Tensor]
FLEX, GROUPER = "bench_flex_tree", "bench_prefix_grouper"


def packed_logprobs(model: Model, ids: Tensor, positions: Tensor, predictors: Tensor, which: Tensor, labels: Tensor,
                    **attention: Any) -> Tensor:  # fmt: skip
    """Of a batch packed into one row of T tokens, U of which predict something.

    Args:
        ids, positions: [1, T].
        predictors: [U], where they stand.
        which: [N, K], for each answer token the index of its predictor among these.
        labels: [N, K].
    """
    out = model.module(
        input_ids=ids, position_ids=positions, logits_to_keep=predictors, **model.fixed, **attention
    )
    return out.logits[0].float().log_softmax(-1)[which, labels]


def _why_not_packed(model: Model) -> str | None:
    if not (model.is_transformers and model.has_logits_to_keep):
        return "needs a transformers model with logits_to_keep"
    return None


def _packed_inputs(batch: Batch) -> tuple[Tensor, ...]:
    """The arguments of packed_logprobs, the tokens in depth-first preorder."""
    ids = batch.ids.new_zeros(len(batch.depths))
    ids[batch.class_of[batch.mask]] = batch.ids[batch.mask]
    predictors, which = batch.predictors.unique(return_inverse=True)
    return ids[None], batch.depths[None], predictors, which, batch.labels


# -- FlexAttention with a tree mask ----------------------------------------------------------------------------------


def why_no_flex_tree(model: Model, batch: Batch, phase: str) -> str | None:
    if batch.ids.device.type != "cuda" and phase == "step":
        return "FlexAttention has no backward pass on CPU"
    return _why_not_packed(model)


def flex_tree(model: Model, batch: Batch) -> Run:
    """One packed row through FlexAttention under a tree mask, model and loss compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, flex_tree_attention)
    twin, inputs, end = model.twin(FLEX), _packed_inputs(batch), subtree_ends(batch)
    run = torch.compile(packed_logprobs, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    def call() -> Tensor:
        tree_mask = make_mask(sees, None, None, len(end), len(end), device=end.device)
        return run(twin, *inputs, tree_mask=tree_mask)

    return call


def flex_tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, tree_mask: Any,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """For transformers' AttentionInterface."""
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(query, key, value, block_mask=tree_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def subtree_ends(batch: Batch) -> Tensor:
    """int64 [T], one past the last descendant of each token."""
    last = batch.class_of.max(1, keepdim=True).values.expand_as(batch.class_of)
    ends = torch.zeros_like(batch.depths)
    return ends.scatter_reduce(0, batch.class_of[batch.mask], last[batch.mask] + 1, "amax")


# -- Prefix Grouper --------------------------------------------------------------------------------------------------


def why_no_prefix_grouper(model: Model, batch: Batch, phase: str) -> str | None:
    if importlib.util.find_spec("prefix_grouper") is None:
        return 'prefix_grouper is not installed; pip install "pgcompile[bench]"'
    if batch.prompt is None:
        return "shares one prompt per group, not a tree"
    if batch.prompt == 0:
        return "needs a prompt"
    return None if model.is_transformers else "needs a transformers model"


def prefix_grouper(model: Model, batch: Batch) -> Run:
    """As its README says, with SDPA as the attention function; the head comes after the split, for the answers only."""
    from prefix_grouper import PrefixGrouper
    from transformers import AttentionInterface

    AttentionInterface.register(GROUPER, prefix_grouper_attention)
    twin: Any = model.twin(GROUPER).module
    at = batch.prompt
    assert at is not None
    # rows of one group are neighbours and begin with the same token class
    sizes = batch.class_of[:, 0].unique_consecutive(return_counts=True)[1].tolist()
    firsts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=batch.ids.device)
    prompts, prompt_mask = batch.ids[firsts, :at], batch.mask[firsts, :at]
    answers, answer_mask = batch.ids[:, at:], batch.mask[:, at:]

    def call() -> Tensor:
        grouper = PrefixGrouper.from_ungrouped_masks(
            prompt_mask, answer_mask, sizes, device=batch.ids.device, padding_mode="right"
        )
        ids = grouper.concat_input(prompts, prompt_mask, answers, answer_mask)
        parts = [
            [torch.arange(info.prefix_len), *(torch.arange(s) + info.prefix_len for s in info.suffix_lens)]
            for info in grouper.group_info
        ]
        positions = torch.nn.utils.rnn.pad_sequence([torch.cat(p) for p in parts], batch_first=True).to(
            ids.device
        )
        hidden = twin.base_model(
            input_ids=ids, position_ids=positions, prefix_grouper=grouper, **model.fixed
        ).last_hidden_state
        _, _, suffix, _ = grouper.split_output(hidden, include_prefix_last=1)
        logits = twin.get_output_embeddings()(suffix[:, :-1]).float()
        return logits.log_softmax(-1).gather(-1, answers[:, :, None]).squeeze(-1)

    return call


def prefix_grouper_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, prefix_grouper: Any,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """For transformers' AttentionInterface."""
    return prefix_grouper.forward(_lower_right, query, key, value, scaling), None


def _lower_right(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scaling: float | None
) -> Tensor:
    """Causal, the last query aligned with the last key; on CUDA that is a flash kernel.

    `attn_mask` says what is padding: only queries at the end, whose output is dropped, for prompts of one length.
    """
    from torch.nn.attention.bias import causal_lower_right

    mask: Any = causal_lower_right(query.shape[2], key.shape[2])
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


# -- TRL's tree attention --------------------------------------------------------------------------------------------


def why_no_trl_tree(model: Model, batch: Batch, phase: str) -> str | None:
    if batch.ids.device.type != "cuda":
        return "needs CUDA and FlashAttention-3"
    try:
        from trl.experimental.async_grpo import packing

        packing._flash_attn()  # fetches the kernel
    except Exception as error:  # no TRL, no `kernels`, no network, no kernel for this GPU
        return f"needs TRL ≥ 1.16, kernels and FlashAttention-3: {type(error).__name__}: {error}"
    return _why_not_packed(model)


def trl_tree(model: Model, batch: Batch) -> Run:
    """AsyncGRPO's packing: its trie, where a token stands once for each next token, and its attention."""
    from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow, register_tree_attention

    register_tree_attention()
    twin, tree, device = model.twin(TREE_ATTENTION), TreeRow(), batch.ids.device
    used = batch.weights != 0
    for ids, length, counts in zip(batch.ids.cpu(), batch.lengths.tolist(), used.cpu(), strict=True):
        mask = torch.zeros_like(ids)
        mask[-batch.answer_positions :] = counts
        tree.add(
            {
                "input_ids": ids[:length], "completion_mask": mask[:length], "group_id": 0, "advantage": 0.0,
                "old_log_probs": torch.zeros(length),
            }
        )  # fmt: skip
    pack = {name: tensor.to(device) for name, tensor in tree.pack().items()}
    # its targets are listed row by row, as `used` finds them
    predictors, found = pack["token_index"].unique(return_inverse=True)
    which = batch.labels.new_zeros(batch.labels.shape).masked_scatter(used, found)
    longest_query, longest_key = pack["tree_max_seqlens"].tolist()
    attention = {name: pack[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    attention |= {"tree_max_seqlen_q": longest_query, "tree_max_seqlen_k": longest_key}
    inputs = pack["input_ids"][None], pack["position_ids"][None], predictors, which, batch.labels
    return lambda: packed_logprobs(twin, *inputs, **attention)
