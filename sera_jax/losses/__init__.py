"""Objectives: pure functions of small arrays, one per equation."""
