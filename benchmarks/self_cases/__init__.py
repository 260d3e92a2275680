"""What ``benchmarks/self_teachers.py`` compares: tasks, teachers, methods, tables and pictures."""
