"""Userpilot's HTTP API: `payloads` builds requests, `client` sends them, `answers` decides what an answer means."""
