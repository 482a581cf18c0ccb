"""The papers' algorithm boxes, and the verbs they are written in."""
