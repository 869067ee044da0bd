"""A finished run in the formats that others read."""
