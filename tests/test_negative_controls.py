"""Break one thing at a time, and see the comparison with eager notice: a test that can't fail proves nothing.

Each control names a check of this file (the same comparison as in test_fuzz.py, on a batch made for it) and a bug to
seed. Without the bug the check passes.
"""

import copy
import dataclasses

import pytest
import torch

import test_fuzz as fuzz
from harness import ALWAYS_PACK, BACKEND, brute_force_packed_tokens

if BACKEND != "pgcompile":
    pytest.skip("breaks pgcompile", allow_module_level=True)

import pgcompile
from pgcompile import backend, columns, copies, plan
from pgcompile.engines import reference
from pgcompile.passes import unpack
from pgcompile.passes.rules import RULES


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Batches that need what is broken, and the checks
# ---------------------------------------------------------------------------------------------------------------------


def tree(holes: bool = False) -> fuzz.Columns:
    """Three rows of one prompt, right padding, and two rows that differ in their position ids only."""
    ids = torch.tensor(
        [[0, 1, 2, 0, 1, 1], [0, 1, 2, 1, 2, 3], [0, 1, 2, 2, 3, 3], [1, 1, 0, 2, 0, 1], [1, 1, 0, 2, 0, 1]]
    )
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 4:] = 0, 0
    if holes:
        mask[0, 1] = 0  # only this tells its first tokens from those of the next row
    positions = torch.arange(6).repeat(5, 1)
    positions[4] += 1
    documents = torch.tensor([0, 0, 1, 1, 0, 0]).repeat(5, 1)
    return fuzz.Columns(ids, mask, positions, documents)


def compare(function, model, batch, *late, kept=None, read=None, engine="reference"):
    """AssertionError unless it packs, with as many tokens as there are distinct prefixes, and equals eager."""
    helper = fuzz.Compiled.__new__(fuzz.Compiled)
    helper.model = model
    options = {**ALWAYS_PACK, "engine": engine}
    fast = torch.compile(function, backend="pgcompile", options=options, dynamic=False)
    arguments = (*(() if function is model else (model,)), *fuzz.columns(batch), *late)
    expected = helper.value_and_gradients(function, arguments, kept)
    pgcompile.reset_stats()
    actual = helper.value_and_gradients(fast, arguments, kept)
    stats = pgcompile.stats()
    for name, want in expected.items():
        fuzz.assert_close(name, actual[name], want, fuzz.largest_gradient(expected))
    assert stats.packed == 1, stats
    keys = [batch.ids, batch.mask, batch.positions] + ([batch.documents] if model.documents else [])
    assert stats.packed_tokens == brute_force_packed_tokens(keys, batch.kept if read is None else read)


def check_values():
    compare(model := fuzz.tiny_lm(), model, tree(), kept=tree().kept)


def check_values_with_a_hole():
    compare(model := fuzz.tiny_lm(), model, tree(holes=True), kept=tree(holes=True).kept)


def check_window():
    compare(model := fuzz.tiny_lm(window=3), model, tree(), kept=tree().kept)


def check_documents():
    compare(model := fuzz.tiny_lm(documents=True), model, tree(), kept=tree().kept)


def check_grpo_loss():
    batch = tree()
    marked = batch.mask.double() * (torch.arange(6) >= 2)
    late = batch.ids.clone(), batch.random(5), -1 - batch.random(), marked
    compare(fuzz.grpo_loss, fuzz.tiny_lm(), batch, *late, read=batch.kept_where_read(marked))


def check_counted_padding():
    batch = tree()
    read = batch.kept_where_read(torch.ones_like(batch.mask))
    compare(fuzz.label_loss, fuzz.tiny_lm(), batch, batch.ids.clone(), read=read)


CHECKS = [
    check_values,
    check_values_with_a_hole,
    check_window,
    check_documents,
    check_grpo_loss,
    check_counted_padding,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_passes_without_a_bug(check):
    check()


# ---------------------------------------------------------------------------------------------------------------------
# The bugs
# ---------------------------------------------------------------------------------------------------------------------


def forget(**forgotten):
    """The mask formula without one of its parts."""

    def seed(monkeypatch):
        original = reference.visible_mask

        def visible(queries, keys, mask):
            return original(queries, keys, mask._replace(**forgotten))

        monkeypatch.setattr(reference, "visible_mask", visible)

    return seed


def see_the_future(monkeypatch):
    original = reference.visible_mask

    def visible(queries, keys, mask):
        later = torch.arange(keys.start, keys.stop) > torch.arange(queries.start, queries.stop)[:, None]
        return original(queries, keys, mask) | later

    monkeypatch.setattr(reference, "visible_mask", visible)


def see_other_branches(monkeypatch):
    """Causal in packed order, but not along the tree: siblings see each other."""
    original = reference.visible_mask

    def visible(queries, keys, mask):
        end = mask.subtree_end_T
        return original(queries, keys, mask._replace(subtree_end_T=torch.full_like(end, len(end))))

    monkeypatch.setattr(reference, "visible_mask", visible)


def window_off_by_one(monkeypatch):
    original = reference.visible_mask

    def visible(queries, keys, mask):
        return original(queries, keys, mask._replace(window=mask.window + 1))

    monkeypatch.setattr(reference, "visible_mask", visible)


def gather_the_next_position(monkeypatch):
    change_tree(monkeypatch, lambda p: {"position": (p.tree.position + 1) % p.positions})


def gather_from_another_row(monkeypatch):
    change_tree(monkeypatch, lambda p: {"row": (p.tree.row + 1) % p.rows})


def change_tree(monkeypatch, changes):
    """Columns are gathered by a tree with other tensors than the plan's."""
    original = backend.pack_column

    def pack(value, dims, p):
        changed = copy.copy(p.tree)
        vars(changed).update(changes(p))
        return original(value, dims, dataclasses.replace(p, tree=changed))

    monkeypatch.setattr(backend, "pack_column", pack)


def swap_dims_of_transpose(monkeypatch):
    """The rule forgets to swap: sizes are followed to the wrong places."""
    original = RULES[torch.ops.aten.transpose.int]

    def rule(op, x, dim0, dim1):
        found = original(op, x, dim0, dim1)
        dims = list(found.layout.dims)
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return dataclasses.replace(found, layout=found.layout.with_dims(dims))

    monkeypatch.setitem(RULES, torch.ops.aten.transpose.int, rule)


def drop_key(wanted):
    """A column that enters the stream isn't compared (nor what was computed from it, where it is wide)."""

    def seed(monkeypatch):
        original = columns._key_columns
        monkeypatch.setattr(
            columns, "fingerprint", lambda bits: torch.zeros(bits.shape[:2], dtype=torch.int64)
        )

        def key_columns(*arguments):
            keys, _ = original(*arguments)
            kept = [c for c in keys if not torch.equal(c.long(), wanted())]
            assert len(kept) < len(keys), "nothing to drop: this control controls nothing"
            return kept, []

        monkeypatch.setattr(columns, "_key_columns", key_columns)

    return seed


def wrong_classes_for_labels(monkeypatch):
    original = unpack.flat_map
    monkeypatch.setattr(unpack, "flat_map", lambda *arguments: original(*arguments).roll(1))


def last_copy_wins(monkeypatch):
    """The backward of every gather that repeats: a shared token gets the gradient of one of its copies."""

    def segment_sums(row_M, rows, dtype):
        def last_copies(values_MC):
            out_RC = values_MC.new_zeros(rows, values_MC.shape[1], dtype=dtype)
            for m, r in enumerate(row_M.tolist()):
                if r >= 0:
                    out_RC[r] = values_MC[m]
            return out_RC

        return last_copies

    monkeypatch.setattr(copies, "_segment_sums", segment_sums)


def ignore_padding_guards(monkeypatch):
    original = plan.read_columns

    def read_columns(graphs, *rest):
        return original(dataclasses.replace(graphs, guards=[], can_drop_padding=True), *rest)

    monkeypatch.setattr(plan, "read_columns", read_columns)


CONTROLS = {
    "mask: future": (see_the_future, check_values),
    "mask: other branches": (see_other_branches, check_values),
    "mask: padding": (forget(key_valid=[]), check_values_with_a_hole),
    "mask: window": (forget(window=None), check_window),
    "mask: window off by one": (window_off_by_one, check_window),
    "mask: documents": (forget(same_value=[]), check_documents),
    "gather: position": (gather_the_next_position, check_values),
    "gather: row": (gather_from_another_row, check_values),
    "rule: transpose": (swap_dims_of_transpose, check_values),
    "key: position_ids": (drop_key(lambda: tree().positions), check_values),
    "key: attention_mask": (drop_key(lambda: tree(holes=True).mask), check_values_with_a_hole),
    "labels": (wrong_classes_for_labels, check_grpo_loss),
    "labels in the loss": (wrong_classes_for_labels, check_counted_padding),
    "backward of unpack": (last_copy_wins, check_values),
    "backward of the label gather": (last_copy_wins, check_counted_padding),
    "padding guards": (ignore_padding_guards, check_counted_padding),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_bug_is_caught(control, monkeypatch):
    seed, check = CONTROLS[control]
    seed(monkeypatch)
    # A wrong layout is noticed before it computes anything: the graph doesn't pack.
    with pytest.raises(AssertionError, match="eager=1" if control.startswith("rule") else "differs by"):
        check()
