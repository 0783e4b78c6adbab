"""Adapters: what was written for another library runs on Tercet's core."""
