"""A model's own rotation is left out where ours takes its place, and nowhere else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvquant.models import quantized_kv_cache, record_keys_and_values
from kvquant.models.attention_hook import attention_modules
from small_models import FAMILIES, exact, prompts_of, small_model

NAME = "apply_rotary_pos_emb"
PROMPTS = prompts_of([20, 9])


def names_of(model: PreTrainedModel) -> dict[str, Any]:
    """The names that the model's attention finds in its file."""
    return inspect.unwrap(type(attention_modules(model)[0]).forward).__globals__


def answer(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
        return kv.new_cache().append(PROMPTS, logits="all")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_multiplies_by_one_and_the_numbers_are_those_of_multiplying(family, monkeypatch) -> None:
    model = small_model(family)
    names = names_of(model)
    rotation, calls = names[NAME], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return rotation(*args, **kwargs)

    monkeypatch.setitem(names, NAME, counted)
    left_out = answer(model)
    assert not calls and names[NAME] is counted
    with monkeypatch.context() as patch:
        patch.setattr("kvquant.models.attention_hook.identity_tables", ones_and_zeros)
        multiplied = answer(model)
    assert len(calls) == len(attention_modules(model)) and torch.equal(left_out, multiplied)


def ones_and_zeros(cos: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(cos), torch.zeros_like(cos)


def test_other_models_of_the_file_rotate_as_ever() -> None:
    model, other = small_model("llama-gqa-llama3"), small_model("llama-gqa-llama3")
    rotation, ids = names_of(model)[NAME], PROMPTS[0][None]
    with torch.inference_mode():
        before = other(input_ids=ids).logits
        with quantized_kv_cache(model, exact(model)):
            assert torch.equal(other(input_ids=ids).logits, before)
    assert names_of(model)[NAME] is rotation


def test_others_may_call_the_rotation_in_any_form() -> None:
    model = small_model("llama-gqa-llama3")
    names, tables = names_of(model), {"cos": torch.rand(1, 3, 8), "sin": torch.rand(1, 3, 8)}
    query, keys = torch.rand(1, 4, 3, 8), torch.rand(1, 2, 3, 8)
    truth = names[NAME](query, keys, **tables)
    with record_keys_and_values(model):
        forms = [names[NAME](query, keys, **tables), names[NAME](q=query, k=keys, **tables)]
    assert all(torch.equal(x, y) for form in forms for x, y in zip(form, truth, strict=True))


def test_contexts_may_close_in_any_order_and_leave_a_later_patch_alone() -> None:
    model, other = small_model("llama-gqa-llama3"), small_model("llama-gqa-llama3")
    names, rotation = names_of(model), names_of(model)[NAME]
    first, second = (record_keys_and_values(m) for m in (model, other))
    first.__enter__()
    recorded = second.__enter__()
    first.__exit__(None, None, None)
    other(input_ids=PROMPTS[0][None], use_cache=False)
    recorded[0][0].sum().backward()
    assert names[NAME] is not rotation
    names[NAME] = patched = lambda *args, **kwargs: rotation(*args, **kwargs)
    second.__exit__(None, None, None)
    assert names[NAME] is patched
    names[NAME] = rotation
