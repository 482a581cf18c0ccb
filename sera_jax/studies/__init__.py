"""Many runs as one thing: planned by a file of studies/, run a few at a time, kept as rows."""
