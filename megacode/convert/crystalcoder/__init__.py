"""Remote code of the `crystalcoder` family, as it is shipped beside exported weights."""
