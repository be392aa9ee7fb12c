"""Running a user's code to look at it, so that nothing of it is left afterwards."""
