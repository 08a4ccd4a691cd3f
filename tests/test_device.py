import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mezzotint import device as device_module
from mezzotint.device import (
    Execution,
    autocast,
    bf16_instructions,
    drawing_reasons,
    int8_instructions,
    memory_total,
    packs_weights,
    precision_name,
    quantizes_weights,
    select_device,
    select_precision,
    threads,
)
from mezzotint.errors import ConfigError

CPU = torch.device("cpu")


def linux_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((x for x in lines if x.startswith("flags")), "").split())


def test_auto_is_the_processor_unless_torch_can_use_cuda() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpu", r"device 'gpu': did you mean 'cpu'\? Choose from: auto, cpu, cuda, mps"),
        ("cuda:99", r"device 'cuda:99': torch .* can use \d+ CUDA devices here; choose cpu"),
        ("cpu:x", r"device 'cpu:x': expected a name such as cpu, cuda or cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        select_device(name)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the instructions")
def test_bf16_instructions_are_those_that_the_system_lists() -> None:
    flags = linux_flags()
    expected = {"AMX": "amx_bf16" in flags, "AVX512_BF16": "avx512_bf16" in flags}
    assert {n: n in bf16_instructions() for n in expected} == expected


def test_without_torch_s_word_linux_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(device_module, "_CPUINFO", cpuinfo)
    assert bf16_instructions() == ()
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n")
    assert bf16_instructions() == ("AVX512_BF16",)


@pytest.mark.parametrize("names", [(), ("AMX",), ("AMX", "AVX512_BF16")])
def test_auto_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(device_module, "bf16_instructions", lambda: names)
    execution = select_precision("auto", CPU)
    assert execution.precision is (torch.bfloat16 if names else torch.float32)
    assert all(name in execution.reasons[1] for name in names)
    asked = select_precision("bfloat16", CPU)
    assert asked.precision is torch.bfloat16
    assert ("emulated" in asked.reasons[1]) is (not names)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bf16", r"precision 'bf16': did you mean 'bfloat16'\? Choose from: auto, bfloat16"),
        ("float16", "a processor trains and draws in float32 or bfloat16"),
    ],
)
def test_a_precision_that_is_not_to_be_had_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        select_precision(name, CPU)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_autocast_computes_in_the_chosen_precision(name: str) -> None:
    execution = select_precision(name, CPU)
    with autocast(execution):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is execution.precision
    assert precision_name(product.dtype) == name


def test_memory_is_no_more_than_a_container_s_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_module, "_CGROUP_LIMITS", (limit, tmp_path / "none"))
    whole = memory_total()
    assert whole > 2**28
    limit.write_text("max\n")
    assert memory_total() == whole
    limit.write_text(f"{2**27}\n")
    assert memory_total(CPU) == 2**27


def test_threads_are_torch_s() -> None:
    assert threads() == torch.get_num_threads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_tells_its_name_memory_and_precision() -> None:
    execution = select_precision("auto", select_device("cuda"))
    assert torch.cuda.get_device_name() in execution.reasons[0]
    assert memory_total(execution.device) > 2**28
    with autocast(execution):
        x = torch.ones(2, 2, device="cuda")
        assert (x @ x).dtype is execution.precision


@pytest.mark.parametrize(
    ("device", "precision", "told"),
    [
        ("cuda", torch.bfloat16, "packing is for processors, not cuda"),
        ("cpu", torch.float64, "oneDNN packs none in float64"),
        ("cpu", torch.bfloat16, "bfloat16 is emulated here"),
    ],
)
def test_weights_that_are_not_packed(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: torch.dtype, told: str
) -> None:
    monkeypatch.setattr(device_module, "bf16_instructions", lambda: ())
    monkeypatch.setattr(device_module, "_has_packing", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    execution = Execution(device=torch.device(device), precision=precision, reasons=("", ""))
    packed, why = packs_weights(execution)
    assert not packed
    assert told in why
    assert drawing_reasons(execution)["weights"] == why


def test_a_torch_without_onednn_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = select_precision("float32", CPU)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert packs_weights(execution) == (
        False,
        f"as they are: torch {torch.__version__} has no oneDNN that packs them here",
    )
    assert drawing_reasons(execution)["layout"] == "as torch has it"


@pytest.mark.parametrize("names", [("AMX", "AVX512_BF16"), ("AVX512_BF16",)], ids=str)
def test_tiles_are_for_bfloat16_without_amx(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "bf16_instructions", lambda: names)
    told = {
        name: drawing_reasons(select_precision(name, CPU))["attention"].partition(" ")[0]
        for name in ("float32", "bfloat16")
    }
    assert told == {"float32": "torch's", "bfloat16": "torch's" if "AMX" in names else "tiles"}


def test_weights_in_int8_are_told_what_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = select_precision("float32", CPU)
    monkeypatch.setattr(device_module, "_has_packing", lambda: True)
    monkeypatch.setattr(device_module, "_has_int8", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(device_module, "int8_instructions", lambda: ("AMX", "VNNI"))
    gain = "less memory and time: this processor has AMX and VNNI"
    assert quantizes_weights(execution) == (True, gain)
    told = drawing_reasons(execution)["weights in int8"]
    assert told == f"if asked for (--quantization int8), {gain}"
    monkeypatch.setattr(device_module, "int8_instructions", lambda: ())
    possible, gain = quantizes_weights(execution)
    assert possible
    assert gain.startswith("less memory and more time: this processor has neither AMX nor VNNI")
    monkeypatch.setattr(device_module, "_has_int8", lambda: False)
    assert not quantizes_weights(execution)[0]
    assert "has no oneDNN for int8 here" in drawing_reasons(execution)["weights in int8"]


def test_instructions_for_int8_are_those_that_linux_lists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asks = ("_is_amx_tile_supported", "_is_vnni_supported")
    for name in asks:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    flags = tmp_path / "cpuinfo"
    monkeypatch.setattr(device_module, "_CPUINFO", flags)
    for listed, names in {
        "fpu amx_int8 avx512_vnni": ("AMX", "VNNI"),
        "fpu avx_vnni": ("VNNI",),
        "fpu avx2 amx_bf16": (),
    }.items():
        flags.write_text(f"processor : 0\nflags : {listed}\n")
        assert int8_instructions() == names


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc's allocator is meant")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    script = """
import torch
from mezzotint.device import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

keep_freed_memory()
before = resident()
blocks = [torch.ones(1 << 22) for _ in range(16)]
kept = torch.ones(1 << 10)  # above them, so that the top of the heap is not free
del blocks
freed = resident()
give_back_freed_memory()
print(before, freed, resident())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, freed, after = map(int, done.stdout.split())
    assert freed - before > 240 and after - before < 16
