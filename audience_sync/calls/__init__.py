"""Identify, Track and Group: what a valid call is, and what each one asks of Userpilot. Pure."""
