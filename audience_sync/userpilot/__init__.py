"""Userpilot's HTTP API: payloads, the HTTP client, and the meaning of its answers."""
