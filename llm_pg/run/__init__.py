"""What surrounds the loop of the trainer: its parts, the folder, saves and resumes, ranks, watchers, and the end."""
