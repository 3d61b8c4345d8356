import json
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphlib.errors import InputError
from morphlib.latency import DATA, hardware
from morphlib.latency.hardware import GPUS, Estimate


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MORPH_HOME", str(tmp_path / "morph"))
    return tmp_path / "morph"


def _stored(**changes):
    numbers = {"memory_bandwidth_bytes_per_s": 1e10, "peak_flops_per_s": 1e10, "launch_s": 1e-6}
    estimates = {key: {"value": x, "low": x / 2, "high": x * 2, "origin": "test"} for key, x in numbers.items()}
    machine = {"name": "this", "memory_bytes": 10**10, "clock_hz": None, "verified": True, "measured": True}
    return {f"{bits}_bits": machine | estimates | changes for bits in (16, 32)}


def _write(home, text):
    home.mkdir(parents=True)
    (home / "calibration.json").write_text(text)


def test_datasheet_figures():
    figures = {
        "A30": (933e9, 165e12, 24e9),
        "A40": (696e9, 149.7e12, 48e9),
        "A100-40GB": (1555e9, 312e12, 40e9),
        "A100-80GB": (2039e9, 312e12, 80e9),
        "H100": (3350e9, 989.5e12, 80e9),
        "H200": (4800e9, 989.5e12, 141e9),
        "L40S": (864e9, 362.05e12, 48e9),
    }
    assert set(figures) == set(GPUS) == set(pd.read_csv(DATA / "hardware.csv")["name"])
    for name, figure in figures.items():
        gpu = hardware.get(name)
        assert (gpu.memory_bandwidth_bytes_per_s.value, gpu.peak_flops_per_s.value, gpu.memory_bytes) == figure


@pytest.mark.parametrize("name", GPUS)
def test_a_peak_is_a_whole_number_of_flops_per_cycle(name):
    """Multiprocessors times a power of two: the clock, the peak and NVIDIA's counts fit together."""
    multiprocessors = {"A30": 56, "A40": 84, "A100-40GB": 108, "A100-80GB": 108, "H100": 132, "H200": 132, "L40S": 142}
    gpu = hardware.get(name)
    per_cycle = gpu.peak_flops_per_s.value / gpu.clock_hz / multiprocessors[name]
    assert 2 ** round(math.log2(per_cycle)) == pytest.approx(per_cycle, rel=0.005)


def test_unverified_specifications_are_marked_and_wider():
    unverified = {name for name in GPUS if not hardware.get(name).verified}
    assert unverified == {"H200"}
    for name in GPUS:
        for number in (hardware.get(name).memory_bandwidth_bytes_per_s, hardware.get(name).peak_flops_per_s):
            assert number.origin and number.low < number.value < number.high
            assert number.high / number.value - 1 == pytest.approx(0.10 if name in unverified else 0.02, rel=1e-3)


@pytest.mark.parametrize("name", ["H900", "", "a100", "A100"])
def test_another_gpu_lists_the_known(name):
    with pytest.raises(InputError, match=r"A30, A40, A100-40GB, A100-80GB, H100, H200, L40S, this"):
        hardware.get(name)


@given(*[st.floats(allow_nan=True, allow_infinity=True)] * 3)
def test_an_estimate_lies_in_its_interval(value, low, high):
    try:
        estimate = Estimate(value, low, high)
    except InputError:
        assert not 0 <= low <= value <= high < math.inf
    else:
        assert 0 <= estimate.low <= estimate.value <= estimate.high < math.inf


def test_without_calibration_this_machine_says_what_to_run(home):
    with pytest.raises(InputError, match=r"calibration\.json.*run `morph latency calibrate`"):
        hardware.get("this")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"16_bits": {}}',
        '{"16_bits": 1}',
        b"\xff".decode("latin1"),
        json.dumps(_stored(memory_bytes=0)),
        json.dumps(_stored(clock_hz=-1)),
        json.dumps(_stored(memory_bytes="much")),
        json.dumps(_stored(launch_s={"value": 1})),
        json.dumps(_stored(peak_flops_per_s=1e10)),
        json.dumps(_stored()).replace("1e-06", "NaN"),
        json.dumps(_stored()).replace("5000000000.0", "0"),
    ],
)
def test_a_broken_calibration_says_what_to_run(home, text):
    _write(home, text)
    with pytest.raises(InputError, match=r"not a calibration of this version; run `morph latency calibrate` anew"):
        hardware.get("this")


def test_a_calibration_reads_back_by_its_bits(home):
    stored = _stored()
    stored["32_bits"]["memory_bandwidth_bytes_per_s"] = {"value": 1.5e10, "low": 1e10, "high": 2e10, "origin": "test"}
    _write(home, json.dumps(stored))
    sixteen, thirty_two = hardware.get("this"), hardware.get("this", bits=32)
    assert sixteen.memory_bandwidth_bytes_per_s.value == 1e10 and thirty_two.memory_bandwidth_bytes_per_s.value == 1.5e10
    assert sixteen.measured and sixteen.clock_hz is None and sixteen.launch_s.value == 1e-6


def test_calibrating_this_machine(home, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(hardware, "_STREAMED", (256, 128))
    monkeypatch.setattr(hardware, "_GEMM", (64, 128))
    written = hardware.calibrate("cpu", seconds=0.02)
    assert json.loads((home / "calibration.json").read_text()) == written
    assert [path.name for path in home.iterdir()] == ["calibration.json"]
    assert written["device"] == "cpu" and written["torch"] == torch.__version__
    this = hardware.get("this")
    assert this.measured and this.clock_hz is None
    assert 1e-8 < this.launch_s.value < 1e-3


def test_calibrating_into_a_place_that_is_none(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hardware, "_STREAMED", (256, 128))
    monkeypatch.setattr(hardware, "_GEMM", (64, 128))
    monkeypatch.setenv("MORPH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="name a place of yours"):
        hardware.calibrate("cpu", seconds=0.02)
