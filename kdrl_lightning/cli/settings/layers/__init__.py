"""What a later file or flag does to the settings of an earlier one."""
