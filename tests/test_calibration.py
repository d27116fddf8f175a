"""Calibration: found by content, refused by content, made once however many need it."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from kvquant import calibration
from kvquant.calibration import CalibrationText, activation_statistics, calibrate
from kvquant.errors import CalibrationError
from kvquant.models.attention_mass import NEAR, attention_mass
from kvquant.spec import QuantSpec
from small_models import prompts_of, small_model, tiny_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=100)


@pytest.fixture
def text() -> CalibrationText:
    ids = torch.randint(0, 100, (200,), generator=torch.Generator().manual_seed(2))
    return CalibrationText(ids, 64, "model", "data")


def test_fisher_information_is_the_squared_gradient_of_the_loss(model, text, tmp_path) -> None:
    folder = activation_statistics(model, text, tmp_path)
    stored = load_file(folder / "layer_001.safetensors")
    ids = text.token_ids[:64]
    # The same by hand: nudge one value element of the last layer and watch the loss of its sequence.
    layer = model.model.layers[1].self_attn.v_proj
    token, channel = 10, 5

    def loss(nudge: float) -> float:
        def add(module, args, output):
            changed = output.clone()
            changed[0, token, channel] += nudge
            return changed

        handle = layer.register_forward_hook(add)
        try:
            with torch.inference_mode():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
                return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        finally:
            handle.remove()

    gradient = (loss(3e-2) - loss(-3e-2)) / 6e-2
    assert float(stored["value_fisher"][token, 0, channel]) == pytest.approx(gradient**2, rel=0.05)
    assert stored["keys"].shape == (200, 1, 64)
    assert stored["positions"].tolist() == [i % 64 for i in range(200)]


def test_keys_are_before_rope(model, text, tmp_path) -> None:
    folder = activation_statistics(model, text, tmp_path)
    ids = text.token_ids[:64]
    with torch.inference_mode():
        first = model.model.layers[0]
        hidden = first.input_layernorm(model.model.embed_tokens(ids))
        expected = first.self_attn.k_proj(hidden).view(64, 1, 64)
    torch.testing.assert_close(load_file(folder / "layer_000.safetensors")["keys"][:64], expected)


def test_second_time_is_read_from_disk_and_equal(model, text, tmp_path) -> None:
    made = calibrate(model, text, QuantSpec(bits=3), tmp_path)
    found = calibrate(model, text, QuantSpec(bits=3), tmp_path)
    assert not made.from_cache and found.from_cache
    for a, b in zip(made.quantizers, found.quantizers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.constants, b.constants, strict=True))


def test_another_width_reuses_the_activations_and_other_texts_do_not(model, text, tmp_path) -> None:
    for bits in (2, 4):
        calibrate(model, text, QuantSpec(bits=bits), tmp_path)
    assert len(list(tmp_path.glob("activations-*"))) == 1
    assert len(list(tmp_path.glob("codebooks-*"))) == 2
    calibrate(model, dataclasses.replace(text, token_ids=text.token_ids.flip(0)), QuantSpec(bits=2), tmp_path)
    assert len(list(tmp_path.glob("activations-*"))) == 2


def test_equal_settings_share_a_file_however_they_are_written(model, text, tmp_path) -> None:
    calibrate(model, text, QuantSpec(bits=3), tmp_path)
    assert calibrate(model, text, QuantSpec(bits=3, key_bits=3, value_bits=3), tmp_path).from_cache


def test_a_calibration_for_another_model_is_refused_not_used(model, text, tmp_path) -> None:
    calibrate(model, text, QuantSpec(), tmp_path)
    (mine,) = tmp_path.glob("codebooks-*.safetensors")
    other = dataclasses.replace(text, model_hash="another model")
    calibrate(model, other, QuantSpec(), tmp_path / "elsewhere")
    (theirs,) = (tmp_path / "elsewhere").glob("codebooks-*.safetensors")
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(CalibrationError, match=r"made for another model; delete it"):
        calibrate(model, text, QuantSpec(), tmp_path)


@pytest.mark.parametrize("stage", ["codebooks-*.safetensors", "activations-*/layer_000.safetensors"])
def test_a_corrupt_file_is_named(model, text, tmp_path, stage) -> None:
    calibrate(model, text, QuantSpec(bits=2), tmp_path)
    (file,) = tmp_path.glob(stage)
    file.write_bytes(file.read_bytes()[:100])
    # The first stage is read again when another spec needs it.
    spec = QuantSpec(bits=2) if stage.startswith("codebooks") else QuantSpec(bits=3)
    with pytest.raises(CalibrationError, match="cannot be read") as caught:
        calibrate(model, text, spec, tmp_path)
    assert file.name in str(caught.value)


@pytest.mark.parametrize("family", ["llama-gqa-llama3", "mistral-window", "gemma2-softcap", "phi3-long"])
def test_attention_mass_is_the_mean_of_the_model_s_own_weights(family) -> None:
    model = small_model(family)
    (ids,) = prompts_of([200], seed=3)
    drawn = attention_mass(model, [ids[:150], ids])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids[None], use_cache=False, output_attentions=True).attentions
    at = torch.arange(200)
    behind = at[:, None] - at
    for layer, mass in enumerate(drawn):
        own = weights[layer][0].float()
        visible = (own > 0).any(0)
        shares = own.mean(0) * visible.sum(1, keepdim=True)
        expected = torch.where(behind >= NEAR, shares, 0).sum(0) / (200 - NEAR - at)
        torch.testing.assert_close(
            mass[150:][: 200 - 2 * NEAR], expected[: 200 - 2 * NEAR], rtol=1e-3, atol=1e-4
        )
        assert mass[150:].isnan().tolist() == (200 - NEAR - at < NEAR).tolist()


def test_sinks_are_found_by_the_attention_they_draw(model, text, tmp_path, monkeypatch) -> None:
    spec = QuantSpec(sink_tokens=4, sink_rule="attention_mass")
    measured = []
    monkeypatch.setattr(
        calibration, "attention_mass", lambda *args: measured.append(1) or [_one_sink(3), _one_sink(None)]
    )
    found = [calibrate(model, text, s, tmp_path) for s in (spec, dataclasses.replace(spec, bits=2), spec)]
    assert [[q.spec.sink_tokens for q in c.quantizers] for c in found] == [[3, 0]] * 3
    assert len(measured) == 1 and found[2].from_cache
    calibrate(model, text, dataclasses.replace(spec, sink_rule="position"), tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").glob("attention-*"))


def _one_sink(count: int | None) -> torch.Tensor:
    mass = torch.rand(64, generator=torch.Generator().manual_seed(0))
    if count is not None:
        mass[count - 1] = 100.0
    return mass.repeat(3)


def test_of_several_that_need_it_one_computes(model, text, tmp_path, monkeypatch) -> None:
    runs = []
    record = calibration._record
    monkeypatch.setattr(calibration, "_record", lambda *args: runs.append(1) or record(*args))
    errors = []

    def work() -> None:
        try:
            # A copy each, as processes have: hooks of one model are not for two threads.
            calibrate(LlamaForCausalLM(model.config).eval(), text, QuantSpec(bits=2), tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(runs) == 1


def test_waiting_ends(model, text, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with (
        calibration._only_one(path, 1.0),
        pytest.raises(CalibrationError, match="lock_timeout_s"),
        calibration._only_one(path, 0.1),
    ):
        pass


def test_an_interrupted_calibration_leaves_nothing_behind(model, text, tmp_path, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, text, QuantSpec(), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix != ".lock"]


def test_nan_activations_are_refused(model, text, tmp_path) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[3] = torch.inf
    with pytest.raises(CalibrationError, match="layer 1"):
        calibrate(broken, text, QuantSpec(), tmp_path)


def test_sequences_longer_than_the_context_are_refused(model, text, tmp_path) -> None:
    with pytest.raises(CalibrationError, match="context of 256"):
        calibrate(model, dataclasses.replace(text, sequence_length=300), QuantSpec(), tmp_path)


def test_calibrating_leaves_parameters_trainable_and_without_gradients(model, text, tmp_path) -> None:
    calibrate(model, text, QuantSpec(), tmp_path)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
