"""A folder for a Jetson, and the program in it."""
