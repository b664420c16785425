"""Adapters taken out of a bundle as ordinary PEFT adapters, which any engine that serves LoRA can load."""
