"""Driver scripts that tests run in one or several processes, and the code that starts them."""
