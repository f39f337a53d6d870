"""The worker's side: teachers, students, their losses, the training loop, and the functions that run tasks."""
