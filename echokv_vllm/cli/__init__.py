"""The `echokv` command."""
