"""Text to condition states [B, M, C] with a key mask [B, M]."""
