"""`python -m service top`: what a service does just now, in a terminal, from its metrics."""
