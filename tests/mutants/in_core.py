"""Defects that the core, the files or the anatomy could have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pegbox.anatomy.anatomy import Anatomy
from pegbox.core import adapter, compose, files, graft, layout, prefix, rows, settings, site, storage, tokens, tuned
from pegbox.core.errors import TargetError

from .in_methods import BAT, BITFIT, DORA, FULL, LORA, PREFIX, PROMPT, SERIES
from .mutant import Mutant, around, both, put

Tuned = tuned.Tuned


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


@contextlib.contextmanager
def not_restored(seed: int, word: str) -> Iterator[None]:
    torch.manual_seed(seed)
    yield


def all_linears(original: Any, self: Any, targets: Any, **given: Any) -> Any:
    try:
        return original(self, targets, **given)
    except TargetError:
        return original(self, "all-linear", **given)


def without_last(original: Any, self: Any, *args: Any) -> Any:
    groups = original(self, *args)
    groups[-1]["params"].pop()
    return groups


def without_rate(original: Any, self: Any, *args: Any) -> Any:
    return [group | {"lr": 0.0} for group in original(self, *args)]


def coarse(original: Any, path: Any, tensors: Any, header: Any) -> None:
    original(path, {k: v.bfloat16().to(v.dtype) for k, v in tensors.items()}, header)


def all_train(original: Any, self: Any, names: Any) -> None:
    original(self, names)
    next(self.model.parameters()).requires_grad_(True)


def called_for_nothing(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.context.bare and self.chain:
        site.Base(self, self.chain)(*args, **kwargs)
    return original(self, *args, **kwargs)


def by_call(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
    del self.module.forward
    try:
        return functional_call(self.module, dict(parameters), args, kwargs)
    finally:
        self.module.forward = self


def nearly(original: Any, at: Any) -> Any:
    return [(parameter, 0.99 * value) for parameter, value in original(at)]


def wide(original: Any, self: Any, parameter: str, value: Any, dtype: Any = None) -> Any:
    return original(self, parameter, value).float()


def by_arithmetic(original: Any, self: Any) -> Any:
    merged = {key: getattr(owner, leaf).data for key, (owner, leaf, _) in self._unmerged.items()}
    for key, (_, _, kept) in self._unmerged.items():
        kept.data.copy_(merged[key] - (merged[key] - kept.data * (1 + 1e-7)))
    return original(self)


def only_released(self: Any) -> Any:
    for at in self._sites.values():
        at.release()
    self._sites.clear()
    return self.model


def in_place(self: Any, at: Any, dotted: str, value: Any) -> None:
    at.module.get_parameter(dotted).data.copy_(value)


def one_for_all(original: Any, plan: Any, grafts: Any) -> Any:
    return original(compose.Stack(*grafts), grafts)


def backwards(original: Any, plan: Any, grafts: Any) -> Any:
    return tuple(reversed(original(plan, grafts)))


def last_alone(original: Any, plan: Any, grafts: Any) -> Any:
    return original(plan, grafts)[-1:]


def unweighted(original: Any, weights: Any, grafts: Any) -> Any:
    return original([1.0 for _ in weights], grafts)


def in_use(original: Any, self: Any, name: Any = None) -> Any:
    return original(self, self.active[-1])


def unordered(original: Any, at: Any, outputs: Any, order: Any) -> Any:
    return original(at, outputs, torch.arange(len(order)))


def shifted(original: Any, used: Any, x: Any) -> Any:
    down, up = original(used, x)
    return down.roll(1, 0), up.roll(1, 0)


def detached(original: Any, used: Any, x: Any) -> Any:
    down, up = original(used, x)
    return down.detach(), up


def unmasked(
    original: Any, self: Any, base: Any, input_ids: Any = None, attention_mask: Any = None, **given: Any
) -> Any:
    return original(self, base, input_ids=input_ids, **given)


def all_seen(counts: Any, n: int, device: Any) -> torch.Tensor:
    return torch.ones(len(counts), n, dtype=torch.bool, device=device)


def half_masters(original: Any, self: Any, *args: Any, **given: Any) -> None:
    original(self, *args, **given)
    base = next(self.model.parameters()).dtype
    for parameter in self.adapters.parameters():
        parameter.data = parameter.data.to(base)


def free_to_cast(self: Any, fn: Any, recurse: bool = True) -> Any:
    return nn.Module._apply(self, fn, recurse)


def without_scale(original: Any, self: Any, module: Any, x: Any, down: Any, up: Any, scale: float) -> Any:
    return original(self, module, x, down, up, 1.0)


def coarser(original: Any, self: Any, module: Any, leaf: str) -> Any:
    return 0.9 * original(self, module, leaf)


MUTANTS = [
    Mutant(
        "forward_is_the_equation",
        LORA,
        "a thin convolution forgets the scale",
        around(layout.Convolution, "product", without_scale),
        family="conv",
    ),
    Mutant(
        "forward_is_the_equation",
        LORA,
        "a lookup forgets the scale",
        around(layout.Lookup, "product", without_scale),
        family="embedding",
    ),
    Mutant(
        "starts_as_declared", LORA, "nf4 is decoded wrongly", around(storage.FourBit, "decode", coarser), family="nf4"
    ),
    Mutant(
        "starts_as_declared",
        LORA,
        "int8 is decoded wrongly",
        around(storage.EightBit, "decode", coarser),
        family="int8",
    ),
    Mutant("settings_keep_their_bounds", LORA, "bounds are not looked at", put(settings, "_check_bounds", nothing)),
    Mutant(
        "settings_keep_their_bounds",
        LORA,
        "a method made by hand goes unchecked",
        put(tuned, "check", lambda *_, **__: None),
    ),
    Mutant("unknown_settings_get_a_suggestion", LORA, "no suggestion", put(settings, "did_you_mean", lambda *_: "")),
    Mutant("targets_must_match", LORA, "a wrong target means all linears", around(Anatomy, "resolve", all_linears)),
    Mutant("same_seed_same_bits", LORA, "the seed is ignored", put(adapter, "seeded", nothing)),
    Mutant(
        "other_seed_other_bits",
        LORA,
        "one seed for all",
        around(adapter, "seeded", lambda original, seed, word: original(0, word)),
    ),
    Mutant(
        "global_generator_is_left_alone", LORA, "the global generator is seeded", put(adapter, "seeded", not_restored)
    ),
    Mutant("gradients_reach_what_trains", LORA, "a base tensor trains", around(Tuned, "_set_requires_grad", all_train)),
    Mutant("groups_hold_what_trains", LORA, "the last parameter is left out", around(Tuned, "groups", without_last)),
    Mutant("resumes_to_the_same_bits", LORA, "files are in bfloat16", around(files, "_write_tensors", coarse)),
    Mutant("training_moves_the_base", FULL, "the learning rate is lost", around(Tuned, "groups", without_rate)),
    Mutant("detach_gives_the_base_back", LORA, "forwards stay", put(site.ModuleSite, "release", lambda self: None)),
    Mutant(
        "detach_gives_the_base_back",
        LORA,
        "flags are not restored",
        put(Tuned, "_restore_requires_grad", lambda self: None),
    ),
    Mutant("disabled_is_the_base", LORA, "disabled() does nothing", put(Tuned, "disabled", nothing)),
    Mutant(
        "disabled_costs_nothing", LORA, "grafts run in vain", around(site.ModuleSite, "__call__", called_for_nothing)
    ),
    Mutant(
        "hooks_run_as_on_the_base", BITFIT, "a site calls its module again", put(site.ModuleSite, "run_whole", by_call)
    ),
    Mutant("disabling_is_refused", FULL, "a moved base passes for the base", put(Tuned, "disabled", nothing)),
    Mutant("merged_equals_forward", LORA, "a merge of 99 per cent", around(tuned, "_merged", nearly)),
    Mutant(
        "merged_equals_forward",
        LORA,
        "the layout of Conv1D is forgotten",
        put(site.ModuleSite, "stored", lambda self, parameter, value, dtype=None: value),
        family="gpt2",
    ),
    Mutant(
        "merged_equals_forward_in_bf16", LORA, "merged weights are float32", around(site.ModuleSite, "stored", wide)
    ),
    Mutant("merged_equals_forward_in_bf16", LORA, "a merge of 99 per cent, twice", around(tuned, "_merged", nearly)),
    Mutant("unmerge_restores_bits", LORA, "unmerging by arithmetic", around(Tuned, "unmerge", by_arithmetic)),
    Mutant("unmerge_restores_bits", FULL, "the sites stay released", put(Tuned, "unmerge", lambda self: self)),
    Mutant("detach_after_merge_gives_the_base_back", LORA, "the merge stays", put(Tuned, "detach", only_released)),
    Mutant("merging_a_tied_head_leaves_the_embedding", LORA, "weights change in place", put(Tuned, "_swap", in_place)),
    Mutant("a_file_holds_all", LORA, "files are in bfloat16", around(files, "_write_tensors", coarse)),
    Mutant("a_file_holds_all", LORA, "settings are not written", put(files, "asdict", lambda method: {})),
    Mutant("damaged_files_are_refused", LORA, "what fits is loaded", put(tuned, "check_fit", lambda *_: None)),
    Mutant(
        "damaged_files_are_refused",
        LORA,
        "the header is not looked at",
        around(files, "_read_header", lambda original, path, text: files.json.loads(text)),
    ),
    Mutant("another_base_is_refused", LORA, "every base is alike", put(files, "_base_drift", lambda *_, **__: None)),
    Mutant("each_of_two_is_itself", LORA, "all adapters run", around(tuned, "chain", one_for_all)),
    Mutant("company_is_refused", FULL, "anyone may come", put(Tuned, "_check_alone", lambda *_: None)),
    Mutant("the_named_adapter_is_saved", LORA, "the one in use is saved", around(Tuned, "state", in_use)),
    Mutant("a_stack_is_one_around_the_other", BAT, "the last is innermost", around(tuned, "chain", backwards)),
    Mutant("a_stack_runs_all", SERIES, "only the last runs", around(tuned, "chain", last_alone)),
    Mutant("a_sum_adds_changes", DORA, "weights of a sum are ignored", around(compose, "sum_of", unweighted)),
    Mutant("a_sum_merges", LORA, "weights of a sum are ignored", around(compose, "sum_of", unweighted)),
    Mutant(
        "a_sum_is_refused", PROMPT, "a sum that adds nothing", put(compose, "sum_of", lambda weights, grafts: grafts[0])
    ),
    Mutant("rows_are_each_alone", DORA, "groups are not put back in order", around(rows, "_join", unordered)),
    Mutant("rows_are_each_alone", LORA, "factors go to the next row", around(rows, "_gather", shifted)),
    Mutant("rows_train", LORA, "a gathered factor is detached", around(rows, "_gather", detached)),
    Mutant("rows_are_refused", FULL, "anyone may differ by row", put(Tuned, "rows", nothing)),
    Mutant("wrong_rows_are_refused", LORA, "rows are not counted", put(rows, "_check_rows", lambda *_: None)),
    Mutant("masters_stay_float32", LORA, "masters in the base's dtype", around(Tuned, "add", half_masters)),
    Mutant(
        "masters_stay_float32",
        LORA,
        "to(bfloat16) casts masters",
        both(put(adapter.Adapter, "_apply", free_to_cast), put(graft.Graft, "_apply", free_to_cast)),
    ),
    Mutant(
        "a_cache_changes_nothing",
        PROMPT,
        "the prompt is put in at every token",
        put(tokens, "cached_length", lambda _: 0),
    ),
    Mutant(
        "padding_changes_nothing", PROMPT, "padding is attended to", around(tokens.InsertGraft, "forward", unmasked)
    ),
    Mutant("rows_mix_methods", PREFIX, "a shorter prefix shows its padding", put(prefix, "right_aligned", all_seen)),
    Mutant("rows_write_as_alone", PROMPT, "a shorter prompt shows its padding", put(tokens, "right_aligned", all_seen)),
    Mutant(
        "a_packed_row_is_its_examples",
        PREFIX,
        "positions run on through a packed row",
        around(
            prefix.ShiftGraft, "forward", lambda f, self, base, **kw: f(self, base, **(kw | {"position_ids": None}))
        ),
    ),
    Mutant(
        "packed_rows_are_refused",
        PROMPT,
        "packing is not seen",
        put(tokens, "_shifted", lambda positions, n, packed: positions),
    ),
]
