"""Every check of arguments, and every error text, once for both frameworks."""
