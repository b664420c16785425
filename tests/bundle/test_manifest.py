"""What a manifest tells in words."""

from __future__ import annotations

from msgspec.structs import replace

from lorazip_core.bundle.manifest import Parameters


def test_aims_are_told_in_words() -> None:
    plain = Parameters("coded", None, 0, "bf16", 0, "adapter", 0.1)
    assert plain.aims == ["no adapter's squared error above 0.1"]
    assert Parameters("joint", 16, 3, "bf16", 0, "adapter", None).aims == []
    of_a_device = replace(plain, max_error=None, objective="resident")
    assert of_a_device.aims == ["few bytes on a device"]
    assert replace(of_a_device, budget=5_000_000).aims == ["at most 5.0 MB on a device"]
    assert replace(plain, budget=5_000_000, calibration="ab" * 32).aims == [
        "no adapter's squared error above 0.1",
        "at most 5.0 MB",
        "errors of outputs, by moments abababababab",
    ]
    assert replace(plain, max_error=None, max_mean_error=0.05).aims == ["a mean squared error of at most 0.05"]
