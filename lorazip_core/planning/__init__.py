"""What a compression would take, before any weight is read."""
