"""What a compression would take and lose, before anything is encoded."""
