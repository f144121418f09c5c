"""What the run is looked at for; test_run.py has all of it."""
