"""Costs of a network: parameters, multiply–adds, time."""
