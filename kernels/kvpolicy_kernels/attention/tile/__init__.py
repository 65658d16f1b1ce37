"""What attention does with a tile of entries that are not encoded."""
