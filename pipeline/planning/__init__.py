"""What an iteration costs: counted, timed by fitted constants, and simulated on many devices."""
