"""What knows no LoRA: errors, files that appear whole or not at all, progress, threads, devices."""
