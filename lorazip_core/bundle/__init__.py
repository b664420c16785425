"""The shared-basis bundle, format 1: what docs/format.md specifies, written and read."""
