"""The ops, registered with torch.library."""
