"""Userpilot's HTTP API: the payloads, the client, and what its answers mean."""
