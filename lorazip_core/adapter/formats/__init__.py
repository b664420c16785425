"""The forms in which tools store LoRA adapters: their names of files, tensors and fields, which nobody else knows.

To read one more form, describe it by a `Format` in a file of its own and list that in `registry`. The tools in
`foreign` are known by name only, to refuse their files. PEFT's form, which is also written, is in `peft`; its
configuration, the names of its tensors and its variants of LoRA have files of their own beside it.
"""
