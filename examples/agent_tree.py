"""Agent dialogues as a tree: rows are the turns 1 to k of forked trajectories, each trained on its turn k.

A trajectory forks at every turn, as in tree search over an agent's actions. The usual batch has a row for each node of
the tree, with its whole history; pgcompile computes each turn once.
"""

import torch
from side_by_side import compare, right_padded, small_qwen, token_logprobs

TURNS, FORKS = 3, 3
SYSTEM = list(
    b"You can search a library. Answer with a query, or with the result when you have found it." * 3
)
generator = torch.Generator().manual_seed(0)


def policy_gradient_loss(model, input_ids, attention_mask, turn_mask, advantages):
    """REINFORCE: the last turn of each row, by its advantage, averaged over all trained tokens."""
    logprobs = token_logprobs(model, input_ids, attention_mask)
    return -(logprobs * turn_mask * advantages[:, None]).sum() / turn_mask.sum()


def turn():
    """What a tool returned and what the agent said to it: 48 to 96 bytes."""
    length = int(torch.randint(48, 97, (1,), generator=generator))
    return torch.randint(32, 127, (length,), generator=generator).tolist()


rows, starts = [], []
histories = [SYSTEM]
for _ in range(TURNS):
    forked = []
    for history in histories:
        for _ in range(FORKS):
            forked.append(history + turn())
            starts.append(len(history))
    rows += forked
    histories = forked

input_ids, attention_mask = right_padded(rows)
columns = torch.arange(1, input_ids.shape[1])
turn_mask = attention_mask[:, 1:] * (columns >= torch.tensor(starts)[:, None])
advantages = torch.randn(len(rows), generator=generator)
print(f"{len(rows)} rows, the nodes of a tree of {TURNS} turns with {FORKS} forks each")
compare(policy_gradient_loss, small_qwen(), input_ids, attention_mask, turn_mask, advantages)
