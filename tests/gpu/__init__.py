"""Computing as a GPU does: packed weights, 16-bit blocks, on whatever device is there."""
