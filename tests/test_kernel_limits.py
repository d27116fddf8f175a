"""A backend that cannot run is refused before anything starts, with the reason and the one that works."""

from __future__ import annotations

import itertools
import logging
import sys
import types

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvquant import calibration, kernels
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.errors import ConfigError, DeviceError
from kvquant.kernel_limits import gpu_refusal, layer_refusal, spec_refusal
from kvquant.kernels import KeyStore, Rope, StoredLayer, ValueStore
from kvquant.models import load_tokenizer
from kvquant.models.backend_check import check_backend
from kvquant.prefill_quant import PrefillQuantizedAttention
from kvquant.preflight import check_gpu
from kvquant.results import load_result
from kvquant.spec import QuantSpec
from kvquant.tasks import run_task
from kvquant.tasks.run_task import check_kernel
from small_models import tiny_llama
from test_cli import run

GPU = torch.device("cuda")


def composed(*overrides: str):
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["kernel=triton", *overrides])


@pytest.fixture
def nvml(monkeypatch):
    """A driver that shows GPUs of these compute capabilities."""

    def show(*capabilities: tuple[int, int], driver: bool = True) -> None:
        class NVMLError(Exception):
            pass

        def init() -> None:
            if not driver:
                raise NVMLError

        fake = types.SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=init,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: len(capabilities),
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetCudaComputeCapability=lambda index: capabilities[index],
        )
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return show


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.bits=8"], "decodes codes of 2, 3 or 4 bits, got quant.key_bits=8"),
        (["quant.value_bits=1"], "got quant.value_bits=1"),
        (["cache.block_size=256"], "decodes blocks of 32, 64 or 128 tokens, got cache.block_size=256"),
        (["quant=none", "cache.block_size=256"], "decodes blocks of 16, 32, 64 or 128 tokens"),
        (["task=kernels", "task.bits=[4,8]"], r"got task.bits=\[4, 8\]"),
        (["task=energy", "task.bits=[5]"], r"got task.bits=\[5\]"),
        (["quant=kivi"], "reads the blocks of the nuq family, got quant=kivi"),
        (["quant=nuq_window"], "reads no recent tokens and knows no logit bias, got quant.recent_tokens=32"),
        (
            ["task=compare", "task.variants=[{option: nuq, bits: [2, 8]}]"],
            "decodes codes of 2, 3 or 4 bits, got quant.key_bits=8, in the row nuq8-1% of task.variants",
        ),
        (
            ["task=compare", "task.variants=[{option: [nuq, hadamard], bits: 2}]"],
            "got quant=hadamard, in the row hadamard2 of task.variants",
        ),
        (["device=cpu"], "must run on an NVIDIA GPU, got device=cpu"),
    ],
)
def test_settings_that_no_triton_kernel_runs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=f"^kernel.backend=triton .*{message}.*; try kernel="):
        validate(composed(*overrides))
    validate(composed(*(o for o in overrides if o != "device=cpu"), "kernel=auto"))


def test_a_machine_without_a_gpu_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, err = run(tmp_path, "kernel=triton")
    assert code == 2 and out == "" and list(tmp_path.iterdir()) == []
    assert (
        err.startswith("error: kernel.backend=triton must run on an NVIDIA GPU, got none")
        and err.count("\n") == 1
    )
    code, _, err = run(tmp_path, "-m", "kernel=triton,auto")
    assert code == 2 and "sweep's point kernel=triton" in err


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ([], "got a machine without one"),
        ([(7, 5)], "compute capability 8.0 or later, got 7.5"),
        ([(7, 5), (8, 6)], None),
        ([(9, 0)], None),
    ],
)
def test_the_driver_says_which_gpus_there_are(capabilities, message, nvml):
    nvml(*capabilities)
    reason = gpu_refusal()
    assert reason is None if message is None else message in reason
    if message is not None:
        with pytest.raises(ConfigError, match="kernel.backend=triton .*try kernel=pytorch_fused"):
            check_gpu(composed(), None)


def test_no_driver_is_no_gpu_and_jobs_elsewhere_are_not_judged_here(nvml):
    nvml((9, 0), driver=False)
    assert "without one" in gpu_refusal()
    check_gpu(composed(), "athena")
    check_gpu(composed("kernel=auto"), None)


def test_the_run_itself_refuses_too():
    with pytest.raises(
        DeviceError, match="kernel=triton must run on an NVIDIA GPU, got cpu; try kernel=pytorch"
    ):
        check_kernel("triton", torch.device("cpu"))
    check_kernel("auto", torch.device("cpu"))


def quantizer(head_dim=64, heads=2, **spec):
    x = torch.randn(64, heads, head_dim, generator=torch.Generator().manual_seed(0))
    return BatchedKVQuantizer.calibrate(QuantSpec(**spec), x, x)


@pytest.fixture
def with_triton(monkeypatch):
    """A GPU of the right kind, as far as the backend's choice goes."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "triton_refusal", lambda device_type: None)
    kernels.say_once.cache_clear()


@pytest.mark.parametrize(
    ("layers", "rotated", "message"),
    [
        (
            [quantizer(), quantizer(head_dim=40)],
            None,
            r"got head_dim=40 \(layer 1\); try kernel=pytorch_fused",
        ),
        ([quantizer(bits=5)] * 3, 64, r"got quant.key_bits=5 \(3 layers from layer 0 on\)"),
        ([quantizer()], 32, "rotates whole heads, got 32 rotated channels of 64"),
        (
            [quantizer(value_groups=4)],
            64,
            "value groups of whole heads, got quant.value_groups=4 for 2 heads",
        ),
        ([quantizer(recent_tokens=4)], 64, "reads no recent tokens .*got quant.recent_tokens=4"),
        ([quantizer(logit_bias=True)], 64, "knows no logit bias, got quant.logit_bias=true"),
        ([BatchedKVQuantizer.exact(2, 24)], 24, "multiple of 16 up to 256 channels, got head_dim=24"),
    ],
)
def test_a_model_that_triton_cannot_run_is_refused_or_said_once(
    layers, rotated, message, with_triton, caplog
):
    devices = [GPU] * len(layers)
    with pytest.raises(DeviceError, match=f"^kernel=triton .*{message}"):
        check_backend("triton", layers, devices, block_size=64, query_heads=4, rotated=rotated)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        check_backend("auto", layers, devices, block_size=64, query_heads=4, rotated=rotated)
    assert len(caplog.records) == 1 and caplog.text.count("kernel=auto attends with plain PyTorch in") == 1


def test_a_method_with_blocks_of_its_own_is_refused_too(with_triton):
    own = quantizer(method="hadamard", outlier_fraction=0.0)
    with pytest.raises(DeviceError, match="reads the blocks of the nuq family, got quant=hadamard"):
        check_backend("triton", [own], [GPU], block_size=64, query_heads=4, rotated=64)


def test_nothing_is_said_where_the_kernels_run(with_triton, caplog):
    layers = [quantizer(), BatchedKVQuantizer.exact(2, 64)]
    for backend in ("auto", "triton"):
        check_backend(backend, layers, [GPU] * 2, block_size=64, query_heads=4, rotated=64)
    check_backend(
        "auto", [quantizer(bits=8)], [torch.device("cpu")], block_size=64, query_heads=4, rotated=64
    )
    assert not caplog.records


def test_more_query_heads_than_a_program_holds_are_refused(with_triton):
    with pytest.raises(DeviceError, match="up to 32 query heads per KV head, got 66 for 2 KV heads"):
        check_backend("triton", [quantizer()], [GPU], block_size=64, query_heads=66, rotated=64)


def test_a_model_is_refused_before_it_is_calibrated(monkeypatch, tmp_path):
    """As on a machine whose GPU runs the kernels: only the model's heads are wrong."""
    folder = tmp_path / "model"
    tokenizer = load_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), head_dim=40).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(run_task, "check_kernel", lambda *_: None)
    monkeypatch.setattr(calibration, "activation_statistics", lambda *_, **__: pytest.fail("calibrated"))
    cfg = composed("task=calibrate", "model=local", f"model.path={folder}", f"calibration.dir={tmp_path}")
    with pytest.raises(DeviceError, match="^kernel=triton decodes heads .* got head_dim=40; try kernel=pyt"):
        run_task.execute(cfg, run_dir=tmp_path / "run", console=Console(quiet=True))
    assert load_result(tmp_path / "run")["status"] == "failed"


def reader_of(**spec):
    q = quantizer(**spec)
    stores = (KeyStore, ValueStore)
    keys, values = (kind(*[torch.empty(1, 1, 1, 1)] * len(kind._fields)) for kind in stores)
    return StoredLayer(kernels, keys, values, q.constants, *q.spec.widths, q.head_dim)


PROMPTS = [
    (torch.bfloat16, None, None),
    (torch.float16, None, None),
    (torch.float32, None, "FlashAttention takes fp16 and bf16, got torch.float32"),
    (torch.bfloat16, 50.0, "FlashAttention has no softcap here"),
    # As queries of a 16-bit model come where a softcap asks for fp32.
    (torch.float32, 50.0, "FlashAttention has no softcap here"),
]


@pytest.mark.parametrize(("dtype", "softcap", "reason"), PROMPTS)
def test_queries_are_rounded_where_flash_attention_reads_them(
    dtype, softcap, reason, with_triton, monkeypatch
):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    layer = reader_of()
    monkeypatch.setattr(BatchedKVQuantizer, "reader", lambda *_, **__: layer)

    def chosen(lengths=(5, 1), is_cuda=True, backend="auto", **spec):
        query = types.SimpleNamespace(
            is_cuda=is_cuda, dtype=dtype, shape=(6, 4, 64), device=GPU if is_cuda else torch.device("cpu")
        )
        attention = PrefillQuantizedAttention(quantizer(**spec), 64, 0.125, softcap=softcap, backend=backend)
        return attention.query_dtype(query, None, types.SimpleNamespace(lengths=lengths))

    assert chosen() == chosen(backend="triton") == (dtype if reason is None else torch.float32)
    # Plain PyTorch multiplies in fp32, decoding kernels round on their own.
    assert chosen(backend="pytorch_fused") == chosen(is_cuda=False) == torch.float32
    assert chosen(lengths=(1, 1)) == torch.float32
    assert chosen(recent_tokens=4) == chosen(logit_bias=True) == torch.float32


@pytest.mark.parametrize(("dtype", "softcap", "reason"), PROMPTS)
def test_prompts_that_flash_attention_does_not_read_are_told_once(
    dtype, softcap, reason, monkeypatch, caplog
):
    pytest.importorskip("triton")
    from kvquant.kernels.triton_kernels import attention

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "attend_tiled", lambda *_, **__: "tiles")
    monkeypatch.setattr(attention, "attend_prefill", lambda *_, **__: "flash")
    kernels.say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    query = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(6, 4, 64))
    settings = {"block_size": 64, "blocks_per_tile": 8, "softmax_scale": 0.125, "softcap": softcap}
    for _ in range(3):
        step = types.SimpleNamespace(lengths=(5, 1))
        way = attention.attend(query, step, reader_of(), None, None, None, **settings)
        assert way == ("flash" if reason is None else "tiles")
    assert len(caplog.records) == (reason is not None)
    if reason is not None:
        assert f"with plain PyTorch on the GPU, tile by tile: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("3.5.1", (9, 0), "needs triton 3.6 or later, got 3.5.1"),
        ("3.6.0", (7, 5), "must run on compute capability 8.0 or later, got 7.5"),
        ("3.6.0", (8, 0), None),
    ],
)
def test_an_old_triton_or_gpu_is_refused_by_name_and_said_of_auto(
    version, capability, message, monkeypatch, caplog
):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda _: version)
    for cached in (kernels.triton_refusal, kernels.say_once):
        cached.cache_clear()
    caplog.set_level(logging.WARNING)
    try:
        chosen = kernels.get_backend("auto", "cuda").__name__.rpartition(".")[2]
        if message is None:
            assert (
                chosen
                == kernels.get_backend("triton", "cuda").__name__.rpartition(".")[2]
                == "triton_kernels"
            )
            assert not caplog.records
        else:
            assert (
                chosen == "pytorch_fused"
                and f"kernel=auto runs plain PyTorch on the GPU: triton {message}" in caplog.text
            )
            with pytest.raises(
                DeviceError, match=f"^kernel=triton {message}; try kernel=pytorch_fused, which runs on cuda"
            ):
                check_kernel("triton", GPU)
    finally:
        kernels.triton_refusal.cache_clear()


def test_the_limits_are_those_of_the_kernels_launcher():
    pytest.importorskip("triton")
    from kvquant.kernels.triton_kernels.attention import decode_refusal

    for bits, head_dim, block_size, rotated, groups, query_heads in itertools.product(
        (1, 2, 3, 4, 5, 8),
        (16, 32, 40, 48, 64, 80, 96, 128, 256, 272),
        (16, 32, 64, 128, 256),
        (16, None),
        (1, 2),
        (2, 64, 66),
    ):
        H, rotated = 2, head_dim if rotated is None else rotated
        layer = StoredLayer(
            kernels,
            KeyStore(*[torch.empty(1, H, 1, 1)] * len(KeyStore._fields)),
            ValueStore(*[torch.empty(1, H, groups)] * len(ValueStore._fields)),
            None,
            bits,
            bits,
            head_dim,
        )
        theirs = decode_refusal(
            torch.empty(1, query_heads, head_dim),
            layer,
            Rope(*[torch.empty(1, rotated // 2)] * 4),
            block_size,
        )
        spec = QuantSpec(bits, value_groups=groups)
        ours = layer_refusal(
            spec, block_size, num_kv_heads=H, head_dim=head_dim, query_heads=query_heads, rotated=rotated
        )
        case = (bits, head_dim, block_size, rotated, groups, query_heads)
        assert (ours is None) == (theirs is None), (case, ours, theirs)
        assert spec_refusal(spec, block_size) is None or ours is not None
