"""Functions under the names and with the parameters that other systems have for them."""
