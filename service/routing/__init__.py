"""Where a call goes and whether it goes again: choice, circuit breakers, retry budget, key pools."""
