"""A model with its cache in our blocks: as exact as the stock one where nothing is quantized, and left as it was."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, ModelError, NonFiniteActivations, PoolExhausted
from kvquant.models import load_model, load_tokenizer, model_shape, quantized_kv_cache, record_keys_and_values
from kvquant.models.loading import SHIPPED_MODEL, model_fingerprint
from kvquant.spec import QuantSpec

HEADS, HEAD_DIM, LAYERS, VOCAB = 2, 64, 3, 300


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return load_model(None, dtype="float32")


def exact(model: LlamaForCausalLM) -> list[BatchedKVQuantizer]:
    shape = model_shape(model)
    return [BatchedKVQuantizer.exact(shape.num_kv_heads, shape.head_dim)] * shape.num_layers


def quantized(model: LlamaForCausalLM, **spec) -> list[BatchedKVQuantizer]:
    ids = torch.randint(0, VOCAB, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), record_keys_and_values(model) as recorded:
        model(input_ids=ids, use_cache=False)
        return [
            BatchedKVQuantizer.calibrate(QuantSpec(**spec), k[0].transpose(0, 1), v[0].transpose(0, 1))
            for k, v in recorded
        ]


def prompts_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]


def padded(prompts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = (
        torch.zeros(len(prompts), width, dtype=torch.int64),
        torch.zeros(len(prompts), width, dtype=torch.int64),
    )
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


class TestFidelity:
    @torch.inference_mode()
    def test_shipped_model_ragged_logits_equal_the_stock_models(self, tiny) -> None:
        prompts = prompts_of([1, 63, 64, 65, 600])
        stock = torch.cat([tiny(input_ids=p[None]).logits[0] for p in prompts])
        with quantized_kv_cache(tiny, exact(tiny)) as kv:
            ours = kv.new_cache().append(prompts, logits="all")
        assert (ours - stock).abs().max() <= 1e-4

    @torch.inference_mode()
    def test_shipped_model_greedy_tokens_are_identical_over_200_steps_alone_and_in_a_batch(
        self, tiny
    ) -> None:
        tokenizer = load_tokenizer()
        texts = [
            "def read(self, size=-1):\n",
            "The quick brown fox jumps over the lazy dog and then",
            "import os\n\n",
        ]
        prompts = [torch.tensor(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
        settings = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
        alone = [tiny.generate(p[None], **settings)[0, len(p) :] for p in prompts]
        with quantized_kv_cache(tiny, exact(tiny)) as kv:
            for prompt, expected in zip(prompts[:1], alone, strict=False):
                got = tiny.generate(prompt[None], past_key_values=kv.new_cache(), **settings)
                assert torch.equal(got[0, len(prompt) :], expected)
            cache = kv.new_cache(num_blocks=12, max_sequences=3)
            tokens = [cache.append(prompts).argmax(-1)]
            for _ in range(199):
                tokens.append(cache.append(list(tokens[-1][:, None])).argmax(-1))
        assert torch.equal(torch.stack(tokens, 1), torch.stack(alone))

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.inference_mode()
    def test_padded_batch_equals_each_prompt_alone(self, small, side) -> None:
        prompts = prompts_of([5, 64, 130])
        batch = padded(prompts, side)
        with quantized_kv_cache(small, exact(small)) as kv:
            ours = small(**batch, past_key_values=kv.new_cache()).logits
        for row, prompt in enumerate(prompts):
            stock = small(input_ids=prompt[None]).logits[0]
            assert (ours[row][batch["attention_mask"][row].bool()] - stock).abs().max() <= 1e-4

    @torch.inference_mode()
    def test_generate_on_a_left_padded_batch_equals_the_stock_cache(self, small) -> None:
        batch = padded(prompts_of([5, 64, 130]), "left")
        stock = small.generate(**batch, max_new_tokens=20, do_sample=False)
        with quantized_kv_cache(small, exact(small)) as kv:
            ours = small.generate(**batch, max_new_tokens=20, do_sample=False, past_key_values=kv.new_cache())
        assert torch.equal(ours, stock)

    @pytest.mark.parametrize("stored", ["exact", "quantized"])
    @torch.inference_mode()
    def test_chunks_and_turns_equal_one_call(self, small, stored) -> None:
        prompts = prompts_of([40, 150, 7])
        quantizers = exact(small) if stored == "exact" else quantized(small, bits=3, sink_tokens=3)
        with quantized_kv_cache(small, quantizers) as kv:
            whole = kv.new_cache(block_size=32).append(prompts)
            cache = kv.new_cache(block_size=32)
            for part in (slice(0, 1), slice(1, 6), slice(6, None)):
                last = cache.append([p[part] for p in prompts])
        if stored == "exact":
            torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)
            return
        # Another summation order moves a few elements across a decision boundary: far less than quantizing does.
        stock = torch.stack([small(input_ids=p[None]).logits[0, -1] for p in prompts])
        assert (last - whole).norm() < 0.1 * (whole - stock).norm()

    @torch.inference_mode()
    def test_bf16_error_is_at_most_twice_the_stock_models(self, small) -> None:
        half = copy.deepcopy(small).bfloat16()
        ids = prompts_of([200])[0]
        truth = small(input_ids=ids[None]).logits[0]
        stock = (half(input_ids=ids[None]).logits[0].float() - truth).square().mean().sqrt()
        with quantized_kv_cache(half, exact(half)) as kv:
            ours = (kv.new_cache().append([ids], logits="all").float() - truth).square().mean().sqrt()
        assert ours <= 2 * stock

    @torch.inference_mode()
    def test_fewer_bits_lose_more(self, small) -> None:
        ids = prompts_of([300])[0]
        truth = small(input_ids=ids[None]).logits[0]
        errors = []
        for bits in (8, 4, 3, 2):
            with quantized_kv_cache(small, quantized(small, bits=bits)) as kv:
                errors.append(float((kv.new_cache().append([ids], logits="all") - truth).norm()))
        assert errors == sorted(errors) and errors[0] > 0


class TestCache:
    def test_fork_shares_and_crop_takes_back(self, small) -> None:
        prompt, more = prompts_of([100, 9])
        with quantized_kv_cache(small, quantized(small, bits=4)) as kv:
            cache = kv.new_cache(num_blocks=20, max_sequences=4, block_size=32)
            cache.append([prompt])
            before = cache.pools[0].blocks_in_use
            fork = cache.fork(cache.rows[0])
            assert (
                cache.pools[0].blocks_in_use == before + 1
            )  # three full blocks are shared, the open one copied
            a = cache.append([more, more])
            torch.testing.assert_close(a[0], a[1])
            cache.crop(-9)
            assert [cache.length(row) for row in cache.rows] == [100, 100]
            torch.testing.assert_close(cache.append([more, more]), a)
            cache.free(fork)
            cache.reset()
            assert cache.pools[0].blocks_in_use == 0

    def test_a_full_pool_refuses_and_keeps_what_it_holds(self, small) -> None:
        prompt, more = prompts_of([60, 1])
        with quantized_kv_cache(small, quantized(small, bits=3)) as kv:
            cache = kv.new_cache(num_blocks=2, max_sequences=2, block_size=32)
            cache.append([prompt])
            with pytest.raises(PoolExhausted, match=r"3 missing.*cache.num_blocks"):
                cache.append([prompts_of([100])[0]], rows=cache.rows)
            after_refusal = cache.append([more])
            fresh = kv.new_cache(num_blocks=2, max_sequences=1, block_size=32)
            fresh.append([prompt])
            torch.testing.assert_close(after_refusal, fresh.append([more]))

    def test_sizes_that_cannot_be_allocated_say_what_fits(self, small) -> None:
        with quantized_kv_cache(small, exact(small)) as kv:
            with pytest.raises(PoolExhausted, match=r"try cache.num_blocks=\d+, which fits"):
                kv.new_cache(num_blocks=10**9)
            with pytest.raises(PoolExhausted, match="memory_budget_gib must hold at least one block"):
                kv.new_cache(memory_budget_gib=1e-6)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [([[]], "at least 1 token"), ([[1] * 1025], "1024 tokens"), ([[1], [2], [3]], None)],
        ids=["empty", "longer than the context", "fine"],
    )
    def test_prompts_that_cannot_be(self, small, prompts, message) -> None:
        with quantized_kv_cache(small, exact(small)) as kv:
            cache = kv.new_cache()
            if message is None:
                assert cache.append(prompts).shape == (3, VOCAB)
            else:
                with pytest.raises(DataError, match=message):
                    cache.append(prompts)

    @pytest.mark.parametrize("stored", ["exact", "quantized"])
    def test_nan_is_named_by_layer_and_channel_and_nothing_is_lost(self, small, stored) -> None:
        broken = copy.deepcopy(small)
        prompt, more = prompts_of([50, 4])
        quantizers = exact(small) if stored == "exact" else quantized(small, bits=3)
        with quantized_kv_cache(broken, quantizers) as kv:
            cache = kv.new_cache(num_blocks=8, max_sequences=2)
            expected = kv.new_cache(num_blocks=8)
            cache.append([prompt])
            expected.append([prompt])
            layer = broken.model.layers[1].self_attn.v_proj
            saved = layer.weight.detach().clone()
            with torch.no_grad():
                layer.weight[70] = torch.nan
            with pytest.raises(NonFiniteActivations, match=r"value.*layer 1, channel 70 \(head 1\)"):
                cache.append([more])
            with torch.no_grad():
                layer.weight.copy_(saved)
            assert cache.length(cache.rows[0]) == 50
            torch.testing.assert_close(cache.append([more]), expected.append([more]))

    def test_a_call_that_fails_in_one_group_of_layers_is_kept_in_none(self, small) -> None:
        broken = copy.deepcopy(small)
        mixed = [*quantized(small, bits=3)[:1], *quantized(small, bits=2)[1:]]
        with torch.no_grad(), quantized_kv_cache(broken, mixed) as kv:
            cache = kv.new_cache(num_blocks=8, max_sequences=1)
            cache.append(prompts_of([50]))
            broken.model.layers[2].self_attn.v_proj.weight[3] = torch.nan
            with pytest.raises(NonFiniteActivations, match="layer 2, channel 3 "):
                cache.append(prompts_of([4]))
            assert [pool.length(cache.rows[0]) for pool in cache.pools] == [50, 50]


class TestContext:
    def test_the_model_is_left_as_it_was_also_after_an_exception(self, small) -> None:
        ids = prompts_of([20])[0][None]
        before = small(input_ids=ids).logits
        implementation = small.config._attn_implementation
        with pytest.raises(RuntimeError, match="boom"), quantized_kv_cache(small, exact(small)):
            raise RuntimeError("boom")
        assert small.config._attn_implementation == implementation
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in small.modules())
        assert torch.equal(small(input_ids=ids).logits, before)

    def test_hooks_of_others_and_the_whole_config_stay_also_after_a_call_that_raised(self, small) -> None:
        ids, seen = prompts_of([20])[0][None], []
        attention = small.model.layers[0].self_attn
        handle = attention.register_forward_pre_hook(lambda *args: seen.append("before"))
        config, hooks = small.config.to_dict(), list(attention._forward_pre_hooks.values())
        state = {name: dict(vars(module)) for name, module in small.named_modules()}
        with pytest.raises(DataError), quantized_kv_cache(small, exact(small)) as kv:
            kv.new_cache().append([ids[0]])
            kv.new_cache(max_length=10).append([ids[0]])
        assert seen == ["before"]
        assert small.config.to_dict() == config and small.config._attn_implementation == "sdpa"
        assert list(attention._forward_pre_hooks.values()) == hooks
        assert {name: dict(vars(module)) for name, module in small.named_modules()} == state
        handle.remove()

    @pytest.mark.slow
    def test_a_model_compiled_inside_runs_the_same_and_is_left_as_it_was(self, small) -> None:
        ids = prompts_of([20])[0][None]
        with torch.inference_mode(), quantized_kv_cache(small, exact(small)) as kv:
            expected = small(input_ids=ids, past_key_values=kv.new_cache()).logits
            compiled = torch.compile(small, backend="eager")
            ours = compiled(input_ids=ids, past_key_values=kv.new_cache()).logits
            torch.testing.assert_close(ours, expected)
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in small.modules())

    def test_other_caches_and_nesting_are_refused(self, small) -> None:
        ids = prompts_of([20])[0][None]
        with quantized_kv_cache(small, exact(small)):
            with pytest.raises(ModelError, match="pass kv.new_cache"):
                small(input_ids=ids)
            with (
                pytest.raises(ModelError, match="leave the outer context"),
                quantized_kv_cache(small, exact(small)),
            ):
                pass

    def test_a_cache_does_not_outlive_its_context(self, small) -> None:
        with quantized_kv_cache(small, exact(small)) as kv:
            cache = kv.new_cache()
            cache.append(prompts_of([5]))
        with pytest.raises(ModelError, match="enter the context again"):
            cache.append(prompts_of([1]))

    def test_two_models_at_once(self, small) -> None:
        other = copy.deepcopy(small)
        prompt = prompts_of([30])
        with quantized_kv_cache(small, exact(small)) as one, quantized_kv_cache(other, exact(other)) as two:
            torch.testing.assert_close(one.new_cache().append(prompt), two.new_cache().append(prompt))

    def test_a_calibration_for_another_shape_is_refused(self, small) -> None:
        wrong = [BatchedKVQuantizer.exact(4, 32)] * 3
        with pytest.raises(ModelError, match="3 layers of 2 heads x 64"), quantized_kv_cache(small, wrong):
            pass

    def test_an_unfitted_family_is_refused_by_name(self) -> None:
        config = OPTConfig(
            vocab_size=50, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2
        )
        with pytest.raises(ModelError, match="opt: its attention has not been fitted"):
            model_shape(OPTForCausalLM(config))

    def test_sub_configs_and_another_owner_of_the_config_are_left_as_they_were(self, small) -> None:
        twin = LlamaForCausalLM(small.config).eval()
        assert twin.config is small.config
        prompt = prompts_of([20])
        before = twin(input_ids=prompt[0][None]).logits
        implementation = small.config._attn_implementation
        with quantized_kv_cache(small, exact(small)) as kv:
            kv.new_cache().append(prompt)
            with pytest.raises(ModelError, match="shares its config object"):
                twin(input_ids=prompt[0][None])
            with quantized_kv_cache(twin, exact(twin)) as other:
                ours = other.new_cache().append(prompt, logits="all")
            assert (ours - before[0]).abs().max() <= 1e-4
            kv.new_cache().append(prompt)
        assert small.config._attn_implementation == implementation
        assert torch.equal(twin(input_ids=prompt[0][None]).logits, before)

    def test_contexts_that_share_a_config_may_close_in_any_order(self, small) -> None:
        twin, prompt = LlamaForCausalLM(small.config).eval(), prompts_of([20])
        implementation = small.config._attn_implementation
        first, second = quantized_kv_cache(small, exact(small)), quantized_kv_cache(twin, exact(twin))
        first.__enter__()
        kv = second.__enter__()
        expected = kv.new_cache().append(prompt)
        first.__exit__(None, None, None)
        assert torch.equal(kv.new_cache().append(prompt), expected)
        second.__exit__(None, None, None)
        assert small.config._attn_implementation == implementation

    def test_a_deep_copy_made_inside_is_an_ordinary_model(self, small) -> None:
        prompt = prompts_of([20])
        with torch.inference_mode():
            before = small(input_ids=prompt[0][None]).logits
            with quantized_kv_cache(small, exact(small)) as kv:
                copied = copy.deepcopy(small)
                assert copied.config._attn_implementation == "sdpa"
                assert torch.equal(copied(input_ids=prompt[0][None]).logits, before)
                with quantized_kv_cache(copied, exact(copied)) as other:
                    ours = other.new_cache().append(prompt)
                assert torch.equal(kv.new_cache().append(prompt), ours)
            assert torch.equal(copied(input_ids=prompt[0][None]).logits, before)
        assert type(copied.config._attn_implementation) is str

    def test_a_forward_call_that_raises_leaves_cache_and_model_usable(self, small) -> None:
        prompt, broken = prompts_of([20])[0], copy.deepcopy(small)
        with torch.inference_mode(), quantized_kv_cache(broken, exact(broken)) as kv:
            cache = kv.new_cache(num_blocks=4, max_sequences=1)
            norm = broken.model.norm
            broken.model.norm = torch.nn.Linear(7, 7)
            with pytest.raises(RuntimeError):
                cache.append([prompt])
            broken.model.norm = norm
            assert cache.pools[0].blocks_in_use == 0
            ours = cache.append([prompt])
            assert (ours - small(input_ids=prompt[None]).logits[0, -1]).abs().max() <= 1e-4

    @pytest.mark.parametrize("how", ["function", "method", "layer"])
    def test_a_compiled_model_is_refused(self, small, how) -> None:
        model = copy.deepcopy(small)
        if how == "function":
            model = torch.compile(model)
        elif how == "method":
            model.compile()
        else:
            model.model.layers[1] = torch.compile(model.model.layers[1])
        with pytest.raises(ModelError, match="must not be compiled"), quantized_kv_cache(model, exact(small)):
            pass


class TestLoading:
    def test_missing_and_corrupt_models_are_one_line(self, tmp_path) -> None:
        with pytest.raises(ModelError, match="config.json"):
            load_model(tmp_path / "nothing")
        broken = tmp_path / "broken"
        shutil.copytree(SHIPPED_MODEL, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load_model(broken)
        assert "\n" not in str(caught.value)

    def test_fingerprint_follows_content_not_place(self, tmp_path) -> None:
        moved = tmp_path / "moved"
        shutil.copytree(SHIPPED_MODEL, moved)
        assert model_fingerprint(moved) == model_fingerprint(None)
        config = json.loads((moved / "config.json").read_text())
        (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
        assert model_fingerprint(moved) != model_fingerprint(None)
