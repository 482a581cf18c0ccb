"""Jitted steps, made once, with shardings and donation in view."""
