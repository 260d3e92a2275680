"""Plans what hardware a run needs, and checks that this machine works."""
