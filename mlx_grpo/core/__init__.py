"""What every room uses: the types stages hand to each other, errors, random keys, statistics."""
