"""Ahead of time: what the programs of a run take on devices that are not there, and how long they must take."""
