"""Launch plans: a call and a target → grid, tile, warps and kernel arguments, as plain integers."""
