"""A judge answers many short questions about one long text: forward only, the text computed once.

The text is real prose, Python's own help on classes; the judge is a random model, so its answers are worth nothing, but
its work is that of a trained one.
"""

import pydoc_data.topics

import torch
from side_by_side import compare, right_padded, small_qwen, token_logprobs

TEXT = pydoc_data.topics.topics["class"][:2048]
SUBJECTS = "classes instances methods attributes inheritance decorators namespaces scopes annotations".split()
VERBS = ("define", "mention", "forbid")
QUESTIONS = [f"\n\nDoes the text {verb} {what}? yes" for what in SUBJECTS for verb in VERBS]


@torch.no_grad()
def judge(model, input_ids, attention_mask, answer_mask):
    """How likely each question's answer is: [N]."""
    return (token_logprobs(model, input_ids, attention_mask) * answer_mask).sum(1)


rows = [list((TEXT + question).encode()) for question in QUESTIONS]
input_ids, attention_mask = right_padded(rows)
answer_mask = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1)
for n, row in enumerate(rows):
    answer_mask[n, len(row) - 1 - len(" yes") : len(row) - 1] = 1

print(f"{len(rows)} questions about a text of {len(TEXT):,} characters")
compare(judge, small_qwen(), input_ids, attention_mask, answer_mask)
