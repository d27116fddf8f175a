"""The CUDA decode kernel without a GPU: it compiles, asks for what it lays out, and where it is not for is said."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "triton", reason="what is made before the kernel needs triton, which is for Linux on x86-64"
)

from kvquant import kernels
from kvquant.bench.compiled_cuda import MOST_STACK_BYTES, SHARED_BYTES
from kvquant.bench.machine_code import inspect_cubin
from kvquant.kernels import Rope
from kvquant.kernels.cuda_decode import launch, nvrtc
from kvquant.kernels.cuda_decode.arguments import Arguments
from kvquant.kernels.cuda_decode.configuration import Configuration, read_source
from kvquant.kernels.cuda_decode.nvrtc import NvrtcError, compile_cubin, nvrtc_refusal
from kvquant.kernels.triton_kernels import attention
from test_triton_decode import Case, decode_call

needs_nvrtc = pytest.mark.skipif(nvrtc_refusal() is not None, reason=str(nvrtc_refusal()))
PLAIN = Configuration(4, 4, 4, True, 96, 12)
CONFIGURATIONS = {
    "4 bits": PLAIN,
    "3 bits": dataclasses.replace(PLAIN, key_bits=3, value_bits=3),
    "2 bits": dataclasses.replace(PLAIN, key_bits=2, value_bits=2),
    "mixed, fp16": dataclasses.replace(PLAIN, value_bits=2, is_bfloat16=False),
    "narrow keys": dataclasses.replace(PLAIN, key_bits=3, key_base=168),
    "one head": dataclasses.replace(PLAIN, key_bits=3, value_bits=3, groups=1),
    "window and cap": dataclasses.replace(PLAIN, groups=8, has_window=True, has_softcap=True),
    "no outliers": dataclasses.replace(
        PLAIN, key_bits=2, value_bits=2, groups=7, key_base=0, value_entries=0
    ),
}


@needs_nvrtc
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_kernel_compiles_and_keeps_little_in_local_memory(
    configuration: Configuration, architecture: int
) -> None:
    chosen = configuration.with_most_warps(SHARED_BYTES[architecture])
    assert chosen is not None and chosen.shared_bytes <= SHARED_BYTES[architecture]
    found = inspect_cubin(compile_cubin(read_source(), chosen.options, architecture))
    assert found["stack_bytes"] <= MOST_STACK_BYTES
    assert found["hmma"] > 0 and found["loads_128_bit"] > 0
    assert 32 * chosen.warps * found["registers"] <= 1 << 16


@needs_nvrtc
@pytest.mark.parametrize("warps", [4, 5, 16])
@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_shared_memory_is_what_the_source_lays_out(configuration: Configuration, warps: int) -> None:
    chosen = dataclasses.replace(configuration, warps=warps)
    program = (
        "TABLE_AT - RESERVED + TABLE_BYTES + (WARPS > BEFORE_TABLE ? WARPS - BEFORE_TABLE : 0) * W_BYTES"
    )
    checks = f"""
        static_assert(W_BYTES == {chosen.warp_bytes}, "of a warp");
        static_assert({program} == {chosen.shared_bytes}, "of a program");
        static_assert(W_BYTES % 32 == 0 && W_SCORES % 32 == 0 && K_PLACES >= K_BASE + 32 && G <= GN, "room");
    """
    # Without the kernel, which is what takes time to compile.
    declared = re.sub(r'extern "C" __global__.*?^}$', "", read_source(), flags=re.DOTALL | re.MULTILINE)
    compile_cubin(f"{declared}\n{checks}", chosen.options, 80)


@needs_nvrtc
def test_a_wrong_size_is_noticed() -> None:
    source = read_source() + f'static_assert(W_BYTES == {PLAIN.warp_bytes + 128}, "of a warp");'
    with pytest.raises(NvrtcError, match="of a warp"):
        compile_cubin(source, PLAIN.options, 80)


def test_the_argument_is_the_struct_of_the_source() -> None:
    (body,) = re.findall(r"^struct Arguments \{(.*?)^\};", read_source(), re.DOTALL | re.MULTILINE)
    kinds = {"float": ctypes.c_float, "int": ctypes.c_int, "u32": ctypes.c_uint}
    expected = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*((?:const )?(?:unsigned )?\w+\*?)\s+(.*?)\s*", declaration).groups()  # type: ignore[union-attr]
        expected += [(n, ctypes.c_void_p if kind.endswith("*") else kinds[kind]) for n in names.split(", ")]
    assert list(Arguments._fields_) == expected


@needs_nvrtc
def test_a_broken_source_gives_the_compilers_words() -> None:
    with pytest.raises(NvrtcError, match=r"does not compile for sm_80 .*NVRTC_ERROR_COMPILATION.*not_a_type"):
        compile_cubin("not_a_type x;", (), 80)
    with pytest.raises(NvrtcError, match="sm_12"):
        compile_cubin("int x;", (), 12)


@pytest.fixture(scope="module")
def stored() -> Any:
    """A decode call on the CPU that the kernel would serve on a GPU."""
    return decode_call(Case((5,), bits=4, head_dim=128, groups=2), "cpu")


def device_of(capability: tuple[int, int], shared_kib: int) -> SimpleNamespace:
    """What PyTorch says of a device."""
    return SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        shared_memory_per_block_optin=shared_kib << 10,
        multi_processor_count=132,
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, stored: Any) -> Any:
    """A query that says it is on an H200, which everything that is asked of PyTorch confirms."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: device_of((9, 0), 227))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels.say_once.cache_clear()
    launch._build.cache_clear()
    yield SimpleNamespace(shape=stored.query.shape, is_cuda=True, device=torch.device("cuda", 0))
    kernels.say_once.cache_clear()
    launch._build.cache_clear()


def changed(layer: Any, side: str, **fields: torch.Tensor) -> Any:
    """A layer with other tensors on one side."""
    return dataclasses.replace(layer, **{side: getattr(layer, side)._replace(**fields)})


def refused(call: Any, *, query: Any = None, layer: Any = None, rope: Any = 0, block_size: int = 64) -> str:
    """The reason against a changed call, or nothing."""
    return str(
        launch.cuda_decode_refusal(
            call.query if query is None else query,
            call.layer if layer is None else layer,
            call.rope if rope == 0 else rope,
            block_size,
        )
    )


def test_what_the_kernel_is_not_for_is_said(stored: Any) -> None:
    layer, rope = stored.layer, stored.rope
    bfloat16 = layer.values.zero.bfloat16()
    many = torch.empty(1, 64, 512, dtype=torch.int16)
    half_turned = Rope(*(table[..., :32] for table in rope))
    for reason, changes in {
        "packed codes of the nuq family": {"layer": lambda ids: (ids, ids)},
        "decodes 2, 3, 4 bits, got 4 and 5": {"layer": dataclasses.replace(layer, value_bits=5)},
        "head_dim must be 128, got 64": {"query": stored.query[..., :64]},
        "block_size must be 64, got 32": {"block_size": 32},
        "it rotates whole heads": {"rope": half_turned},
        "up to 8 query heads per KV head, got 9": {"query": torch.empty(1, 18, 128)},
        "a value group must hold whole heads": {
            "layer": changed(layer, "values", zero=layer.values.zero.repeat(1, 1, 4))
        },
        "must be bf16 or fp16, got torch.bfloat16, torch.float16": {
            "layer": changed(layer, "values", zero=bfloat16)
        },
        "by eights, got 6 in": {
            "layer": changed(layer, "keys", outlier_index=layer.keys.outlier_index[..., :6])
        },
        "up to 32767, got 32768": {"layer": changed(layer, "values", outlier_index=many)},
        "it runs on a GPU": {},
    }.items():
        assert reason in refused(stored, **changes), reason
    assert "rotates" in str(launch.cuda_decode_refusal(stored.query, layer, None, 64))


@pytest.mark.parametrize(
    ("bits", "device", "reason"),
    [
        (4, device_of((8, 0), 163), "it is for compute capability 9.0 and later, got 8.0"),
        (
            4,
            device_of((12, 0), 99),
            r"4 warps need \d+ bytes of shared memory at 4 and 4 bits, got .* 101376",
        ),
        (2, device_of((9, 0), 227), None),
        (4, device_of((9, 0), 227), None),
    ],
)
def test_small_and_old_devices_are_refused(
    bits: int, device: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    configuration = dataclasses.replace(PLAIN, key_bits=bits, value_bits=bits)
    found = launch._device_refusal(configuration, torch.device("cuda", 0))
    assert found is None if reason is None else re.search(reason, str(found))


def attended(call: Any, query: Any, monkeypatch: pytest.MonkeyPatch, times: int = 2) -> list[Any]:
    """What ``attend`` gives when Triton's kernel says that it was called, and few blocks are enough for CUDA's."""
    monkeypatch.setattr(launch, "_FEWEST_FOR_A_WARP", 0)
    monkeypatch.setattr(attention, "attend_decode", lambda *_, **__: "triton")
    settings = call.settings
    return [
        attention.attend(query, call.step, call.layer, call.rope, None, call.sinks, **settings)
        for _ in range(times)
    ]


def test_a_missing_compiler_is_said_once_and_triton_decodes(stored, on_gpu, monkeypatch, caplog) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    assert attended(stored, on_gpu, monkeypatch) == ["triton", "triton"]
    assert caplog.text.count("NVRTC was not found") == 1 and "Triton's kernel" in caplog.text
    with pytest.raises(NvrtcError, match="pip install nvidia-cuda-nvrtc"):
        compile_cubin("int nothing;", (), 80)


@needs_nvrtc
@pytest.mark.parametrize(
    ("sequences", "columns", "chosen"), [(1, 16, False), (8, 340, False), (8, 350, True)]
)
def test_it_is_chosen_where_warps_have_blocks(sequences, columns, chosen, stored, on_gpu) -> None:
    table = torch.empty(sequences, columns, dtype=torch.int32)
    # Twelve warps on each of 132 multiprocessors, two KV heads.
    assert launch.is_chosen(on_gpu, table, stored.layer, stored.rope, 64) is chosen
    assert not launch.is_chosen(on_gpu, table, stored.layer, stored.rope, 32)
    # A window of 340 blocks sees 341 at most.
    assert launch.is_chosen(on_gpu, table, stored.layer, stored.rope, 64, 64 * 400) is chosen
    assert not launch.is_chosen(on_gpu, table, stored.layer, stored.rope, 64, 64 * 340)


@needs_nvrtc
def test_what_does_not_compile_is_tried_and_said_once(stored, on_gpu, monkeypatch, caplog) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(launch, "read_source", lambda: "not_a_type x;")
    monkeypatch.setattr(launch, "compile_cubin", lambda *given: tried.append(given) or compile_cubin(*given))
    assert attended(stored, on_gpu, monkeypatch) == ["triton", "triton"]
    assert caplog.text.count("does not compile for sm_90") == 1 and len(tried) == 1


@needs_nvrtc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_driver_that_refuses_is_said_once(stored, on_gpu, monkeypatch, caplog) -> None:
    assert attended(stored, on_gpu, monkeypatch) == ["triton", "triton"]
    assert caplog.text.count("driver was not found") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the driver is Linux's C library")
def test_an_error_of_the_driver_has_its_name_and_text(monkeypatch) -> None:
    from kvquant.kernels.cuda_decode import driver

    class Refusing:
        def cuInit(self, flags: int) -> int:
            return 999

        def cuGetErrorName(self, code: int, into: Any) -> int:
            into._obj.value = b"CUDA_ERROR_UNKNOWN"
            return 0

        def cuGetErrorString(self, code: int, into: Any) -> int:
            into._obj.value = b"unknown error"
            return 0

    monkeypatch.setattr(driver, "_driver", Refusing)
    with pytest.raises(
        driver.CudaDriverError, match=r"^cuInit gave CUDA_ERROR_UNKNOWN \(999\): unknown error$"
    ):
        driver._call("cuInit", 0)
