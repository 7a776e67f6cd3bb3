"""Scheduler side: two KV cache managers over one block pool, and the pressure policy."""
