"""What people read: summaries, explanations, pictures, progress, times."""
