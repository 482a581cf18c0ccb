"""What is said about a policy: gold rewards, held-out pairs, and the report. Numpy only; matplotlib for the picture."""
