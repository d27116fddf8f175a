"""Every method: bytes it accounts for, the same model as exact at eight bits, and what sets it apart."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import NonFiniteActivations
from kvquant.methods import method_class
from kvquant.methods.hadamard import hadamard
from kvquant.models import quantized_kv_cache, record_keys_and_values
from kvquant.spec import METHODS, QuantSpec
from small_models import exact, prompts_of, small_model

H, D = 2, 64
# The settings that a method cannot do without; kvquant/methods/<name>.py and conf/quant/<name>.yaml are all there is.
SETTINGS = {
    "kivi": {"outlier_fraction": 0.0, "recent_tokens": 32},
    "hadamard": {"outlier_fraction": 0.0},
}
BLOCK_METHODS = sorted(name for name in METHODS if name != "none" and not method_class(name).outside)


def spec_of(name: str, **changes: object) -> QuantSpec:
    return QuantSpec(method=name, **{**SETTINGS.get(name, {}), **changes})


def activations(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, H, D, generator=generator) * torch.linspace(0.2, 3, D)
    return keys + torch.linspace(-1, 1, D), torch.randn(tokens, H, D, generator=generator)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_a_ragged_batch_comes_back_and_more_bits_bring_it_closer(name: str) -> None:
    keys, values = activations(400)
    offsets = torch.tensor([0, 1, 64, 129, 400], dtype=torch.int32)
    errors = []
    for bits in (2, 3, 4, 8):
        quantizer = BatchedKVQuantizer.calibrate(spec_of(name, bits=bits), *activations(2000, 1))
        packed = quantizer.quantize(quantizer.turn_keys(keys), values, offsets)
        keys_hat, values_hat = quantizer.dequantize(packed)
        errors.append(
            relative_error(keys_hat, quantizer.turn_keys(keys)) + relative_error(values_hat, values)
        )
        assert packed.nbytes == packed.pool.bytes_held
        assert packed.effective_bits > bits
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04  # of keys and values together


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_a_sequence_does_not_depend_on_its_batch(name: str) -> None:
    keys, values = activations(200)
    quantizer = BatchedKVQuantizer.calibrate(spec_of(name, bits=3), *activations(2000, 1))
    together = quantizer.dequantize(quantizer.quantize(keys, values, torch.tensor([0, 70, 200])))
    alone = quantizer.dequantize(quantizer.quantize(keys[70:], values[70:], torch.tensor([0, 130])))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[70:], b, rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_what_calibration_fixed_survives_saving(name: str) -> None:
    keys, values = activations(100)
    quantizer = BatchedKVQuantizer.calibrate(spec_of(name, bits=3), *activations(2000, 1))
    again = type(quantizer).from_state(quantizer.spec, H, D, quantizer.state())
    a, b = (q.dequantize(q.quantize(keys, values, torch.tensor([0, 100]))) for q in (quantizer, again))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fitted(model, spec: QuantSpec, noise: float = 0.0) -> list[BatchedKVQuantizer]:
    ids = torch.stack(prompts_of([300, 300], seed=5))
    with record_keys_and_values(model) as recorded, torch.no_grad():
        model(ids, use_cache=False)
    quantizers, generator = [], torch.Generator().manual_seed(0)
    for keys, values in recorded:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (keys, values)]
        flat = [x + noise * torch.randn(x.shape, generator=generator) for x in flat]
        quantizers.append(BatchedKVQuantizer.calibrate(spec, *flat))
    return quantizers


def logits_of(model, quantizers, prompts, chunks=(None,), **settings) -> torch.Tensor:
    """Logits of all tokens, the prompts fed in pieces that end at ``chunks``."""
    out = []
    with quantized_kv_cache(model, quantizers) as kv:
        cache = kv.new_cache(max_sequences=len(prompts), **settings)
        edges = [0, *[c for c in chunks if c], max(map(len, prompts))]
        for first, last in itertools.pairwise(edges):
            out.append(
                cache.append([p[first:last] for p in prompts], logits="all").view(
                    len(prompts), last - first, -1
                )
            )
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama-gqa-llama3", "mistral-window", "gemma2-softcap"])
@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_eight_bits_are_nearly_exact_in_a_model(name: str, family: str) -> None:
    model, prompts = small_model(family), prompts_of([150, 150])
    reference = logits_of(model, exact(model), prompts)
    # One group per KV head: eight-bit indices reach 256 channels.
    spec = spec_of(name, bits=8, value_groups=model.config.num_key_value_heads)
    got = logits_of(model, fitted(model, spec), prompts)
    assert relative_error(got, reference) < 0.06


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_chunks_give_what_one_call_gives(name: str) -> None:
    """Each query sees what it would see if tokens came one by one; KIVI's open groups and window included."""
    model, prompts = small_model("llama-gqa-llama3"), prompts_of([130] * 5)
    fraction = 0.0 if name == "kivi" else 0.01
    # Keys of the first layer are those of 97 tokens: thresholds would lie exactly on some, and rounding would decide.
    quantizers = fitted(model, spec_of(name, bits=4, outlier_fraction=fraction), noise=0.05)
    whole = logits_of(model, quantizers, prompts)
    pieces = logits_of(model, quantizers, prompts, (1, 40, 41, 97))
    # A code on a boundary may fall either way, and layers above make much of it: hence most tokens, not all.
    assert float((pieces - whole).norm(dim=-1).div(whole.norm(dim=-1)).median()) < 1e-3


@pytest.mark.parametrize("name", ["nuq", "kivi", "hadamard"])
def test_a_window_as_long_as_the_text_makes_everything_exact(name: str) -> None:
    model, prompts = small_model("llama-gqa-llama3"), prompts_of([120, 120])
    quantizers = fitted(model, spec_of(name, bits=2, recent_tokens=128))
    got = logits_of(model, quantizers, prompts, (50, 51))
    torch.testing.assert_close(got, logits_of(model, exact(model), prompts), rtol=1e-3, atol=1e-3)


def test_a_recent_window_helps_and_costs_its_bytes() -> None:
    model, prompts = small_model("llama-gqa-llama3"), prompts_of([300, 300])
    reference = logits_of(model, exact(model), prompts)
    plain, window = (
        logits_of(model, fitted(model, spec_of("nuq", bits=2, recent_tokens=n)), prompts) for n in (0, 64)
    )
    assert relative_error(window, reference) < relative_error(plain, reference)
    layouts = [
        fitted(model, spec_of("nuq", recent_tokens=n))[0].layout(1, torch.float32, 64, 2.0).row_shapes()
        for n in (0, 64)
    ]
    assert "recent_keys" not in layouts[0] and layouts[1]["recent_keys"][0] == (64, 2, 64)


@pytest.mark.parametrize("name", ["nuq", "kivi"])
def test_a_cropped_window_falls_back_to_what_is_stored(name: str) -> None:
    model = small_model("llama-gqa-llama3")
    (prompt,) = prompts_of([200])
    quantizers = fitted(model, spec_of(name, bits=8, recent_tokens=32))
    with torch.inference_mode(), quantized_kv_cache(model, quantizers) as kv:
        cache = kv.new_cache(max_sequences=2)
        cache.append([prompt])
        fork = cache.fork(cache.rows[0])
        cache.free(cache.rows[0])
        cache.crop(-57)
        got = cache.append([prompt[143:]], rows=[fork], logits="all")
    want = logits_of(model, exact(model), [prompt])[0, 143:]
    assert relative_error(got, want) < 0.03


def test_the_logit_bias_lowers_quantized_keys_alone() -> None:
    model, prompts = small_model("llama-gqa-llama3"), prompts_of([200, 200])
    outputs = []
    for bias in (False, True):
        spec = spec_of("nuq", bits=2, outlier_fraction=0.0, recent_tokens=16, logit_bias=bias)
        outputs.append(logits_of(model, fitted(model, spec), prompts))
    # The first 16 tokens see exact keys only.
    torch.testing.assert_close(outputs[0][:, :16], outputs[1][:, :16])
    assert not torch.allclose(outputs[0][:, 100:], outputs[1][:, 100:], atol=1e-3)
    # Without exact keys the same bias on all of a head's keys cancels in the softmax.
    quantizers = fitted(model, spec_of("nuq", bits=2, outlier_fraction=0.0, logit_bias=True))
    plain = fitted(model, spec_of("nuq", bits=2, outlier_fraction=0.0))
    without = logits_of(model, plain, prompts)
    # Rounding may move a code to the other side of a boundary, and layers above make much of it.
    assert relative_error(logits_of(model, quantizers, prompts), without) < 0.01
    assert relative_error(outputs[0], outputs[1]) > 0.02


def test_the_hadamard_matrix_is_orthogonal_and_spreads_an_outlier() -> None:
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), atol=1e-6, rtol=0)
    assert float((torch.eye(64)[3] @ matrix).abs().max()) == pytest.approx(1 / 8)


def test_kivi_is_the_published_arithmetic() -> None:
    """Round to nearest between minimum and maximum, groups of 32 tokens of a channel, 32 channels of a token."""
    keys, values = (x[:, :, :].to(torch.float32) for x in activations(64))
    quantizer = BatchedKVQuantizer.calibrate(spec_of("kivi", bits=2), keys, values)
    keys_hat, values_hat = quantizer.dequantize(quantizer.quantize(keys, values, torch.tensor([0, 64])))

    def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        step = (high - low) / 3
        return torch.round((x - low) / step) * step + low

    want_keys = rounded(keys.view(2, 32, H, D), 1).view(64, H, D)
    want_values = rounded(values.view(64, H * D // 32, 32), 2).view(64, H, D)
    # fp16 ranges move an element across a boundary now and then; nothing else may differ.
    for got, want in ((keys_hat, want_keys), (values_hat, want_values)):
        assert float(((got - want).abs() < 5e-3).float().mean()) > 0.995


def test_outliers_of_one_byte_cost_half_and_hardly_differ() -> None:
    keys, values = activations(2000)
    keys[::7, 0, 3] *= 6
    quantizers = [
        BatchedKVQuantizer.calibrate(spec_of(name, bits=3, outlier_fraction=0.02), keys, values)
        for name in ("nuq", "nuq_int8")
    ]
    packed = [q.quantize(keys, values, torch.tensor([0, 2000]), spill_headroom=9) for q in quantizers]
    assert packed[1].effective_bits < packed[0].effective_bits - 0.3
    errors = [
        [relative_error(got, want) for got, want in zip(q.dequantize(p), (keys, values), strict=True)]
        for q, p in zip(quantizers, packed, strict=True)
    ]
    assert errors[1][0] < 1.2 * errors[0][0] and errors[1][1] < 1.05 * errors[0][1]


@pytest.mark.parametrize("name", BLOCK_METHODS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_number_that_is_none_is_named(name: str, side: str) -> None:
    keys, values = activations(70)
    quantizer = BatchedKVQuantizer.calibrate(spec_of(name, bits=3), *activations(2000, 1))
    (keys if side == "key" else values)[33, 1, 5] = torch.nan
    with pytest.raises(NonFiniteActivations, match=f"{side} activations must be finite"):
        quantizer.quantize(keys, values, torch.tensor([0, 70]))


def test_optimal_clipping_lowers_the_error_of_a_uniform_grid() -> None:
    keys, values = activations(3000)
    errors = []
    for clip in ("none", "optimal"):
        spec = spec_of("uniform", bits=2, outlier_fraction=0.0, options={"clip": clip})
        quantizer = BatchedKVQuantizer.calibrate(spec, keys, values)
        keys_hat, values_hat = quantizer.dequantize(quantizer.quantize(keys, values, torch.tensor([0, 3000])))
        errors.append(relative_error(keys_hat, keys) + relative_error(values_hat, values))
    assert errors[1] < 0.9 * errors[0]


def test_outliers_of_a_head_or_of_the_whole_layer_are_as_many() -> None:
    keys, values = activations(3000)
    keys[:, 0] = keys[:, 0] ** 3  # a head with heavy tails
    fractions, of_heads = {}, {}
    for rule in ("channel", "head", "layer"):
        spec = spec_of("nuq", bits=2, outlier_fraction=0.02, key_outliers=rule)
        packed = BatchedKVQuantizer.calibrate(spec, keys, values).quantize(
            keys, values, torch.tensor([0, 3000]), spill_headroom=9
        )
        fractions[rule] = packed.key_outlier_fraction
        counts = packed.pool.tensors["key_outlier_count"].sum((0, 1)).tolist()
        of_heads[rule] = counts[0] / counts[1]
    assert fractions["layer"] == pytest.approx(fractions["channel"], rel=0.1)
    assert fractions["head"] == pytest.approx(fractions["channel"], rel=0.1)
    # The tails of one head take outliers from the other only where they share them.
    assert of_heads["head"] == pytest.approx(1, rel=0.1) and of_heads["layer"] > 1.2


def test_sinks_are_predicted_where_the_key_norm_stands_out() -> None:
    keys, values = activations(640)
    positions = torch.arange(640) % 64
    spec = spec_of("nuq", sink_tokens=4, sink_rule="key_norm")
    assert BatchedKVQuantizer.calibrate(spec, keys, values, positions=positions).spec.sink_tokens == 0
    keys[positions < 2] *= 20
    assert BatchedKVQuantizer.calibrate(spec, keys, values, positions=positions).spec.sink_tokens == 2


def test_sinks_are_predicted_where_the_attention_mass_stands_out() -> None:
    keys, values = activations(640)
    positions = torch.arange(640) % 64
    spec = spec_of("nuq", sink_tokens=4, sink_rule="attention_mass")
    # A few sequences only, and the last tokens of each are seen by too few queries.
    drawn = torch.rand(128, generator=torch.Generator().manual_seed(0))
    drawn[positions[:128] >= 56] = torch.nan

    def sinks() -> int:
        fitted = BatchedKVQuantizer.calibrate(spec, keys, values, positions=positions, attention_mass=drawn)
        return fitted.spec.sink_tokens

    assert sinks() == 0
    drawn[positions[:128] < 2] = -50.0  # nobody looks there: no sink
    assert sinks() == 0
    drawn[positions[:128] == 1] = 300.0
    assert sinks() == 2
    with pytest.raises(ValueError, match="must be calibrated with a model's attention_mass, got none"):
        BatchedKVQuantizer.calibrate(spec, keys, values, positions=positions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "kivi", "options": {"group_size": 48}}, "group_size must be a power of two, got 48; try 32"),
        ({"method": "kivi", "recent_tokens": 40}, "must be a multiple of .*32 with quant=kivi, got 40; try 32"),
        ({"method": "kivi", "recent_tokens": 32}, "outlier_fraction must be 0 with quant=kivi"),
        ({"method": "hadamard", "options": {"block": 60}}, "block must be a power of two, got 60"),
        ({"method": "uniform", "options": {"clip": "tight"}}, "clip must be none or optimal, got 'tight'"),
        ({"method": "nuq", "options": {"clip": "optimal"}}, "must be among none, got clip; leave it out"),
        ({"method": "nuq_token_norm", "logit_bias": True}, "logit_bias must be false"),
    ],
)  # fmt: skip
def test_settings_a_method_does_not_have_are_refused(settings: dict, message: str) -> None:
    spec = QuantSpec(**settings)
    with pytest.raises(ValueError, match=message):
        method_class(spec.method).check(spec)


def test_a_spec_can_be_a_key_and_a_dictionary() -> None:
    a, b = (QuantSpec(method="uniform", options=o) for o in ({"clip": "optimal"}, (("clip", "optimal"),)))
    assert a == b and hash(a) == hash(b)
    assert QuantSpec(**dataclasses.asdict(a)) == a
