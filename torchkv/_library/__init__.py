"""Registration of the ops with torch.library: what all have in common, and what is particular to each."""
