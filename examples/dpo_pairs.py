"""DPO: each prompt with a chosen and a rejected answer, through the model and through its reference.

A pair shares its prompt, and all prompts begin with the same instructions.
"""

import copy

import torch
import torch.nn.functional as F
from side_by_side import compare, right_padded, small_qwen, token_logprobs

BETA = 0.1
INSTRUCTIONS = "You are given a sum of numbers. Answer with the result, and nothing else. " * 3
generator = torch.Generator().manual_seed(0)


def dpo_loss(model, reference, input_ids, attention_mask, answer_mask):
    """Rows are chosen and rejected in turns (Rafailov et al., arXiv 2305.18290)."""
    with torch.no_grad():
        expected = (token_logprobs(reference, input_ids, attention_mask) * answer_mask).sum(1)
    actual = (token_logprobs(model, input_ids, attention_mask) * answer_mask).sum(1)
    chosen, rejected = (actual - expected).view(-1, 2).unbind(1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


rows, prompts = [], []
for _ in range(16):
    numbers = torch.randint(100, (30,), generator=generator).tolist()
    prompt = INSTRUCTIONS + " + ".join(map(str, numbers)) + " = "
    for answer in (f"{sum(numbers)}.", f"{sum(numbers) + 1}, if I am not mistaken."):
        rows.append(list((prompt + answer).encode()))
        prompts.append(len(prompt))
input_ids, attention_mask = right_padded(rows)
columns = torch.arange(1, input_ids.shape[1])
answer_mask = attention_mask[:, 1:] * (columns >= torch.tensor(prompts)[:, None])

model = small_qwen()
reference = copy.deepcopy(model).requires_grad_(False)
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)  # as if trained for a while
print(f"{len(rows) // 2} pairs")
compare(dpo_loss, model, reference, input_ids, attention_mask, answer_mask)
