"""What the tests share: made-up adapters and bundles, a Hub on loopback, readers that owe the product nothing.

The folder above is on the path (pyproject.toml), so every test imports these as `from testing import …`.
"""
