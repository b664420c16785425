"""A base model and its tokenizer, loaded through Transformers: from a directory, or by a name on the Hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import HubError, LocalError, UsageError
from ..base.stopping import stop_unmasked
from .extra import check_available, check_model
from .options import ModelDtype
from .prompts import Example

_DTYPES: dict[ModelDtype, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class BaseModel(NamedTuple):
    """A causal language model, ready to answer, and its tokenizer; no gradients are kept."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    @property
    def vocabulary(self) -> int:
        """The number of logits of a position."""
        return int(self.model.config.get_text_config().vocab_size)

    def check_length(self, examples: list[Example]) -> None:
        """Raise UsageError for examples with more tokens than the model has positions."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(example.ids) for example in examples), default=0)
        if most is not None and longest > most:
            raise UsageError(
                f"a row has {longest:,} tokens with its answer, but {self.name} takes {most:,}",
                "lower «prompt_tokens», or leave the row out",
            )

    def logits(self, ids: Tensor, mask: Tensor, wanted: range) -> Tensor:
        """Logits [n, wanted, vocabulary] at some positions of ids [n, t], of which ``mask`` says what is no padding."""
        positions = torch.arange(wanted.start, wanted.stop, device=ids.device)
        known = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        few = {"logits_to_keep": positions} if known else {}
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **few).logits
        # A model that passes the argument over gives the logits of all positions, too.
        found: Tensor = out if out.shape[1] == len(positions) else out[:, wanted.start : wanted.stop]
        return found


def load_base_model(name: str, device: torch.device, dtype: ModelDtype = "f32") -> BaseModel:
    """The model at a directory, or of that name on the Hub, on ``device`` and in ``dtype``.

    Only safetensors files are read, and no code that comes with a model is run. Raises LocalError where Transformers is
    missing or a directory cannot be loaded, UsageError for what is no model, HubError where the Hub has none to give.
    """
    check_available()
    check_model(name)
    with _quiet(), stop_unmasked():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model, info = AutoModelForCausalLM.from_pretrained(
                name, dtype=_DTYPES[dtype], use_safetensors=True, output_loading_info=True
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # Transformers raises what its libraries do
            raise _failure(name, error) from error
    if missing := sorted(info["missing_keys"]):  # Transformers would fill them with random numbers
        raise LocalError(f"{name}: {len(missing)} weights are missing, the first is {missing[0]}", "fetch it again")
    return BaseModel(name, model.to(device).eval().requires_grad_(False), tokenizer, _DTYPES[dtype])


def _failure(name: str, error: Exception) -> LocalError | HubError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[0].split())
    if Path(name).exists():
        return LocalError(f"{name}: this model cannot be loaded: {reason}")
    return HubError(f"{name}: this model cannot be had from the Hub: {reason}", "or name a directory that has it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what Transformers would print: bars and advice."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
