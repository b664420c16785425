"""Whether a bundle is sound, its claims true, and its errors small enough."""

from .run import AdapterReport, Gates, ModuleErrors, Verification, VerifyReport, verify, verify_by_module

__all__ = ["AdapterReport", "Gates", "ModuleErrors", "Verification", "VerifyReport", "verify", "verify_by_module"]
