"""The muscle: teachers, students, their losses, the one training loop, and the tasks of a worker."""
