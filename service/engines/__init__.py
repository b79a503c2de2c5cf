"""Engines run experts; base.py is what the service asks of one."""
